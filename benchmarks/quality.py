"""How well a bundled model follows its text: scoring prompts through the public Pipeline, judged by the checkers.

    smartdiff train pocket-video --stage prepare   fetches the sprites once, which the checkers compare with
    python benchmarks/quality.py                   100 prompts in the wording of training, 100 held out
    python benchmarks/quality.py --model runs/pocket-image/bundle --recipe pocket-image      a model that is not bundled yet

Writes benchmarks/results/quality-<model>-<device>.json, and a sheet of the first prompts, 32 as in training and 16 held out.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import stamp, table, write  # noqa: E402
from smartdiff_jax.engine.pipeline import Pipeline  # noqa: E402
from smartdiff_jax.training.data import atlas as atlas_file  # noqa: E402
from smartdiff_jax.training.evaluate import Scorer, evaluate  # noqa: E402
from smartdiff_jax.training.sampling import sheet  # noqa: E402
from smartdiff_jax.training.settings import load_recipe  # noqa: E402
from smartdiff_jax.training.worlds import World, captioner_of  # noqa: E402

SERVED = "guidance_scale", "num_inference_steps", "negative_prompt", "shift", "sampler"
SHOWN = 32, 16  # on the contact sheet, of the prompts as in training and of those held out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-video")
    parser.add_argument("--recipe", help="that the model was trained by; its name, if not given")
    parser.add_argument("--atlas", type=Path, help="data/FILE of the recipe, if not given")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--cache-ratio", type=float, help="with cache=auto")
    parser.add_argument("--config", type=Path, help="YAML file of system parameters")
    parser.add_argument("--sheet", type=Path, help="where the contact sheet goes (.png)")
    parser.add_argument("--dry-run", action="store_true", help="do not write the result file")
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(arguments.model, system=arguments.config)
    recipe = load_recipe(arguments.recipe or arguments.model)
    atlas = atlas_file.load(arguments.atlas or ROOT / "data" / recipe.atlas.file)
    task, size = recipe.served_by.task, recipe.output
    world = World.of(task, captioner_of(task, atlas), size.num_frames)
    # As the recipe serves it: a folder by itself would get what large models of its family do, their negative prompt too.
    settings = {name: getattr(recipe.served_as, name) for name in SERVED}
    asked = {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.num_inference_steps}
    if arguments.cache_ratio is not None:
        asked |= {"cache": "auto", "cache_ratio": arguments.cache_ratio}
    settings |= {name: value for name, value in asked.items() if value is not None}
    settings |= {"size": (size.width, size.height), "num_frames": size.num_frames}
    kept: list[tuple[str, np.ndarray]] = []

    def generate(prompts):
        began = time.monotonic()
        clips = [pipe(prompt, seed=seed, **settings).frames[0] for seed, prompt in enumerate(prompts)]
        kept.extend(zip(prompts, clips, strict=True))
        print(f"{len(clips)} clips in {time.monotonic() - began:.0f} s", flush=True)
        return np.stack(clips)

    with Scorer(world) as scorer:
        report = evaluate(generate, world, scorer, arguments.prompts)
    for name in ("trained", "held_out"):
        print(name, report[name])
    if arguments.sheet:
        shown = [*kept[: SHOWN[0]], *kept[arguments.prompts :][: SHOWN[1]]]
        sheet(np.stack([clip for _, clip in shown]), [prompt for prompt, _ in shown], arguments.sheet)
    if not arguments.dry_run:
        resolved = pipe("", seed=0, **settings, output_type="latent").report.params
        # What decides besides the request: a file that --config made must not be taken for the default's.
        system = {name: getattr(pipe.system, name) for name in ("dtype", "attention", "precision")}
        tables = {name: table(part) if isinstance(part, list) else part for name, part in report.items()}
        print(write(f"quality-{recipe.name}", {"stamp": stamp(), "system": system, "params": resolved, **tables}))


if __name__ == "__main__":
    main()
