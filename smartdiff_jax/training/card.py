"""The model card of a trained bundle: what it is, what it was trained on, how it scores, what it cannot do."""

from collections.abc import Mapping
from typing import Any

from smartdiff_jax.training.data.wording import BACKGROUNDS, COLOURS, MOTIONS
from smartdiff_jax.training.settings import Recipe
from smartdiff_jax.training.worlds import CLIP_SHARES, PICTURE_SHARES

CARD = """---
license: apache-2.0
library_name: smartdiff_jax
pipeline_tag: {tag}
---
# {name}

{about} It was trained from nothing by `smartdiff train {name}` and is stored in {bits} bits, {parameters}

    smartdiff generate "{example}" --model {name}

## What it knows

{knows}

## Scores

{scores}

The checkers ({checkers}) are made apart from the model: a subject counts as found if it is among the
1 or 5 most alike of all subjects of the atlas, a background if it has the colours asked for and no others. Gradient order asks
besides that the first of two colours is on top, as it was in training.{position}

## Data and licences

Rendered scenes of {sprites} (Copyright Microsoft Corporation, MIT) and Noto Emoji (Copyright
Google, Apache-2.0); names from Unicode CLDR by unicode-emoji-json and emojilib (MIT). Packages and checksums:
`smartdiff_jax/training/data/sources.py`. The pictures themselves are not part of this model. Weights: Apache-2.0.
"""

OF_CLIPS = {
    "tag": "text-to-video",
    "about": """\
A very small text-to-video model of the Wan architecture (UMT5-type text encoder, causal video autoencoder, diffusion
transformer): {frames} frames of {width}x{height} pixels at {fps} frames a second.""",
    "example": "a dog moving left on a blue background",
    "knows": """\
A closed world of emoji: one picture of an animal, a thing, a food, a vehicle, a hand or a face, before a plain background.
Say the subject, and if you like the style (3d, flat, cartoon), a colour ({colours}), the background ({backgrounds},
or "red to blue"), and the motion ({motions}).

It is an emoji model, not a general one. Subjects outside its {subjects} names, several subjects, scenes, actions of people and
counting are beyond it, and it has seen every subject it can draw. Held-out below are wordings, and pairs of subject and
background or motion, that training never showed.""",
    "checkers": "`smartdiff_jax/training/checkers.py`",
    "position": "",
    "sprites": "Fluent Emoji and Fluent animated emoji",
}

OF_PICTURES = {
    "tag": "text-to-image",
    "about": """\
A very small text-to-image model of the Qwen-Image architecture (Qwen2.5-type text encoder, causal autoencoder, diffusion
transformer of two streams): {width}x{height} pixels.""",
    "example": "a red apple left of a cat on a blue background",
    "knows": """\
A closed world of emoji: one picture of an animal, a thing, a food, a vehicle, a hand or a face before a plain background, or
two of them beside each other. Say the subject, and if you like the style (3d, flat, cartoon), a colour ({colours}),
the background ({backgrounds}, or "red to blue"), and a second subject that the
first is left of, right of, above or below.

It is an emoji model, not a general one. Subjects outside its {subjects} names, more than two, scenes, actions of people and
counting are beyond it, and it has seen every subject it can draw. Held-out below are wordings, and pairs of subject and
background or relation, that training never showed.""",
    "checkers": "`smartdiff_jax/training/picture_checkers.py`",
    "position": """ Position is
right if two objects are side by side, or one above the other, in the order asked for.""",
    "sprites": "Fluent Emoji",
}
CARDS = {"t2v": (OF_CLIPS, CLIP_SHARES), "t2i": (OF_PICTURES, PICTURE_SHARES)}


def model_card(recipe: Recipe, scores: Mapping[str, Any]) -> str:
    """The text of README.md; without scores it says so."""
    texts, shares = CARDS[recipe.served_by.task]
    facts = {
        "colours": ", ".join(COLOURS),
        "backgrounds": ", ".join(BACKGROUNDS),
        "motions": ", ".join(MOTIONS),
        "subjects": scores.get("subjects", "few"),
        "frames": recipe.output.num_frames,
        **recipe.output.model_dump(),
    }
    filled = {name: text.format(**facts) for name, text in texts.items()}
    table = _table(scores, ("subject_top1", "subject_top5", *shares), recipe.served_by.task)
    return CARD.format(name=recipe.name, bits=recipe.bits, parameters=_parameters(scores), scores=table, **filled)


def _parameters(scores: Mapping[str, Any]) -> str:
    counts = scores.get("parameters", {})
    listed = ", ".join(f"{name} {number / 1e6:.2f} M" for name, number in counts.items())
    return f"{sum(counts.values()) / 1e6:.1f} million parameters ({listed})."


def _table(scores: Mapping[str, Any], shares: tuple[str, ...], task: str) -> str:
    if "trained" not in scores:
        return "Not scored yet."
    lines = [f"| prompts | {' | '.join(share.replace('_', ' ') for share in shares)} |", "|---" * (len(shares) + 1) + "|"]
    for name, title in (("trained", "as in training"), ("held_out", "held out")):
        row = scores[name]
        cells = ("-" if row[share] is None else f"{row[share]:.0%}" for share in shares)
        lines.append(f"| {row['prompts']}, {title} | " + " | ".join(cells) + " |")
    if "autoencoder_psnr" in scores:
        unseen = "clips" if task == "t2v" else "pictures"
        lines.append(f"\nThe autoencoder restores unseen {unseen} at {scores['autoencoder_psnr']} dB.")
    return "\n".join(lines)
