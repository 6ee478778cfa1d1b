"""What test_hosts.py runs as host 0: FOLDER CONFIG OUT.

One request whose output it keeps, one that is cancelled, the first again, and from a checkpoint, and one that goes on until
something ends it.
"""

import sys

import numpy as np

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.engine.pipeline import Inputs, Pause, Pipeline
from smartdiff_jax.errors import Cancelled

REQUEST = dict(prompt="a red fox", size=(48, 32), num_frames=1, num_inference_steps=3, seed=1, output_type="np")


def cancel(progress):
    if (progress.stage, progress.done) == ("denoise", 2):
        raise Cancelled("enough")


def show(progress):
    print(progress.stage, progress.done, flush=True)


def save_and_resume(pipe):
    """The picture from a checkpoint after the second step, and the preview that was made there."""
    fields = {name: value for name, value in REQUEST.items() if name != "output_type"}
    request, kind = GenerateParams.create(**fields), REQUEST["output_type"]
    paused = (event for event in pipe.stream(request, Inputs(), kind, stops={2}) if isinstance(event, Pause))
    event = next(event for event in paused if event.done == 2)
    saved, preview = event.checkpoint(), event.preview()
    *_, resumed = pipe.stream(request, Inputs(), kind, resume=saved)
    return resumed.frames, preview


def main(folder, config, out):
    pipe = Pipeline.from_pretrained(folder, system=config)
    first = pipe(**REQUEST, on_progress=show)
    try:
        pipe(**REQUEST, on_progress=cancel)
    except Cancelled:
        print("cancelled", flush=True)
    again = pipe(**REQUEST)
    resumed, preview = save_and_resume(pipe)
    np.savez(out, latents=first.latents, frames=first.frames, again=again.frames, steps=first.report.steps,
             resumed=resumed, preview=preview)  # fmt: skip
    print("saved", flush=True)
    while True:
        pipe(**REQUEST | dict(num_inference_steps=200), on_progress=show)


if __name__ == "__main__":
    from smartdiff_jax import cli

    cli.app = lambda: main(*sys.argv[1:])  # errors end it as they end the command
    cli.main()
