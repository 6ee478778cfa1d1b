"""The model card of a trained bundle: what it is, what it was trained on, how it scores, what it cannot do."""

from collections.abc import Mapping
from typing import Any

from smartdiff_jax.training.data.wording import BACKGROUNDS, COLOURS, MOTIONS
from smartdiff_jax.training.settings import Recipe

SHARES = ("subject_top1", "subject_top5", "background", "gradient_order", "motion", "style", "colour")

CARD = """---
license: apache-2.0
library_name: smartdiff_jax
pipeline_tag: text-to-video
---
# {name}

A very small text-to-video model of the Wan architecture (UMT5-type text encoder, causal video autoencoder, diffusion
transformer): {frames} frames of {width}x{height} pixels at {fps} frames a second. It was trained from nothing by
`smartdiff train --recipe {name}` and is stored in 8 bits, {parameters}

    smartdiff generate "a dog moving left on a blue background" --model {name}

## What it knows

A closed world of emoji: one picture of an animal, a thing, a food, a vehicle, a hand or a face, before a plain background.
Say the subject, and if you like the style (3d, flat, cartoon), a colour ({colours}), the background ({backgrounds},
or "red to blue"), and the motion ({motions}).

It is an emoji model, not a general one. Subjects outside its {subjects} names, several subjects, scenes, actions of people and
counting are beyond it, and it has seen every subject it can draw. Held-out below are wordings, and pairs of subject and
background or motion, that training never showed.

## Scores

{scores}

The checkers (`smartdiff_jax/training/checkers.py`) are made apart from the model: a subject counts as found if it is among the
1 or 5 most alike of all subjects of the atlas, a background if it has the colours asked for and no others. Gradient order asks
besides that the first of two colours is on top, as it was in training.

## Data and licences

Rendered scenes of Fluent Emoji and Fluent animated emoji (Copyright Microsoft Corporation, MIT) and Noto Emoji (Copyright
Google, Apache-2.0); names from Unicode CLDR by unicode-emoji-json and emojilib (MIT). Packages and checksums:
`smartdiff_jax/training/data/sources.py`. The pictures themselves are not part of this model. Weights: Apache-2.0.
"""


def model_card(recipe: Recipe, scores: Mapping[str, Any]) -> str:
    """The text of README.md; without scores it says so."""
    video = recipe.video
    return CARD.format(
        name=recipe.name,
        frames=video.num_frames,
        width=video.width,
        height=video.height,
        fps=video.fps,
        parameters=_parameters(scores),
        subjects=scores.get("subjects", "few"),
        colours=", ".join(COLOURS),
        backgrounds=", ".join(BACKGROUNDS),
        motions=", ".join(MOTIONS),
        scores=_table(scores),
    )


def _parameters(scores: Mapping[str, Any]) -> str:
    counts = scores.get("parameters", {})
    listed = ", ".join(f"{name} {number / 1e6:.2f} M" for name, number in counts.items())
    return f"{sum(counts.values()) / 1e6:.1f} million parameters ({listed})."


def _table(scores: Mapping[str, Any]) -> str:
    if "trained" not in scores:
        return "Not scored yet."
    lines = [f"| prompts | {' | '.join(share.replace('_', ' ') for share in SHARES)} |", "|---" * (len(SHARES) + 1) + "|"]
    for name, title in (("trained", "as in training"), ("held_out", "held out")):
        row = scores[name]
        lines.append(f"| {row['prompts']}, {title} | " + " | ".join(f"{row[share]:.0%}" for share in SHARES) + " |")
    if "autoencoder_psnr" in scores:
        lines.append(f"\nThe autoencoder restores unseen clips at {scores['autoencoder_psnr']} dB.")
    return "\n".join(lines)
