"""Numbers that the authors of policies published for known models: one JSON file a model, {policy: numbers}."""

import json
from importlib import resources
from typing import Any


def published_numbers(model: str) -> dict[str, Any]:
    """What is published for a model, by policy; empty for a model nobody measured."""
    file = resources.files("smartdiff_jax.cache") / "data" / f"{model}.json"
    return json.loads(file.read_text()) if file.is_file() else {}
