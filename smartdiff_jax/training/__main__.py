"""`python -m smartdiff_jax.training`: the recipe's stages, where the `smartdiff` command is not installed."""

import argparse
import sys
from pathlib import Path

from smartdiff_jax.errors import SmartdiffError
from smartdiff_jax.training.recipe import STAGES, main_train


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m smartdiff_jax.training", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="pocket-video", help="a recipe's name, or a YAML file")
    parser.add_argument("--stage", default="all", choices=STAGES)
    parser.add_argument("--atlas", type=Path, help="training data, which `prepare` makes; data/FILE of the recipe if not given")
    parser.add_argument("--run-dir", type=Path, help="checkpoints and logs; runs/NAME if not given")
    parser.add_argument("--out", type=Path, help="where the trained model goes; RUN_DIR/bundle if not given")
    parser.add_argument("--init-from", type=Path, help="start from the weights of this model folder")
    parser.add_argument("--call-minutes", type=float, help="stop, to be continued, when this many minutes have passed")
    parser.add_argument("--finish", action="store_true", help="end the schedule when the call's minutes end")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="overrides")
    arguments = parser.parse_args()
    try:
        main_train(**vars(arguments))
    except SmartdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
