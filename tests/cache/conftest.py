"""The goldens' weights are read as the models' tests read them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
