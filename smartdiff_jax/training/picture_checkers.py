"""Did the picture show what was asked? One object or two beside each other: background, position, subject, colour, style.

Built on `checkers`: the background is taken away, and what is left is compared with every sprite of the atlas. Two objects are
told apart by the emptiest line that splits the foreground near its middle, a column or a row: whichever is emptier says
whether they stand side by side or one above the other. Which is which is decided by likeness: the asked order must look more
like the picture than the order turned round. NumPy only; made apart from the models.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from smartdiff_jax.training.checkers import Foreground, Gallery, background, foreground, likeness, object_colour
from smartdiff_jax.training.data.atlas import STYLES
from smartdiff_jax.training.data.pictures import PictureAttributes

MIDDLE = (0.3, 0.7)  # where a line between two objects may lie, as shares of the foreground's extent


def halves(scene: Foreground) -> tuple[str, Foreground, Foreground]:
    """The axis along which the foreground falls apart most cleanly ("x" or "y"), and its two parts in that order."""
    weights = scene.mask.sum(0)
    found = []
    for axis, name in ((0, "x"), (1, "y")):
        along = weights.sum(axis)  # of every column, or of every row
        shown = np.flatnonzero(along)
        if len(shown) == 0:
            return "x", scene, scene
        first, last = shown[0], shown[-1] + 1
        low, high = (int(round(first + share * (last - first))) for share in MIDDLE)
        line = along[low : high + 1]
        emptiest = np.flatnonzero(line == line.min())
        cut = low + int(emptiest[len(emptiest) // 2])
        # An elongated foreground is more likely two objects along its length: empty lines alone would tie.
        found.append((float(line.min()) / max(float(along.max()), 1e-6), -(last - first), name, cut))
    _, _, name, cut = min(found)
    before, behind = scene.mask.copy(), scene.mask.copy()
    if name == "x":
        before[:, :, cut:], behind[:, :, :cut] = 0, 0
    else:
        before[:, cut:], behind[:, :cut] = 0, 0
    return name, dataclasses.replace(scene, mask=before), dataclasses.replace(scene, mask=behind)


def score(frames: UInt8[np.ndarray, "1 h w 3"], asked: PictureAttributes, gallery: Gallery) -> Mapping[str, Any]:
    """Holds one picture against what was asked.

    `subject_rank` counts from 1 among all subjects, one for each thing asked for. `background_ok` (the colours asked for and no
    others), `gradient_order_ok` (the first on top besides), `position_ok` (of two: along the asked axis, in the asked order),
    `colour_ok` (of all things that were to be painted) and `style_ok` are None where the prompt does not ask. What was seen
    is with it: `background`, `colour` and `subject`, of the things as asked, the best match.
    """
    scene = foreground(frames)
    seen_background = background(scene)
    if asked.relation is None:
        parts, position = [scene], None
    else:
        axis, before, behind = halves(scene)
        if asked.relation in ("right", "below"):
            before, behind = behind, before
        parts, position = _assign(axis, [before, behind], asked, gallery)
    scores = [likeness(part, gallery, thing.colour) for part, thing in zip(parts, asked.things, strict=True)]
    seen_colours = [object_colour(part) for part in parts]
    ranks, styles, seen = [], [], []
    for own_scores, thing in zip(scores, asked.things, strict=True):
        subjects = gallery.by_subject(own_scores)
        target = gallery.atlas.subject(thing.subject)
        own = np.flatnonzero(gallery.owner == target)
        ranks.append(int((subjects >= subjects[target]).sum()))
        styles.append(STYLES[int(gallery.style[own[np.argmax(own_scores[own])]])] == asked.style)
        seen.append(gallery.atlas.names[int(np.argmax(subjects))])
    painted = [colour == thing.colour for colour, thing in zip(seen_colours, asked.things, strict=True) if thing.colour]
    return {
        "subject_rank": ranks,
        "background_ok": sorted(seen_background) == sorted(asked.background),
        "gradient_order_ok": seen_background == asked.background,
        "position_ok": position,
        "style_ok": all(styles),
        "colour_ok": all(painted) if painted else None,
        "subject": seen,
        "background": " to ".join(seen_background),
        "colour": seen_colours,
    }


def _assign(axis: str, parts: list[Foreground], asked: PictureAttributes, gallery: Gallery) -> tuple[list[Foreground], bool]:
    """The parts in the order of the things, by likeness, and whether that is the asked place."""
    first, second = (_alike(parts, thing.subject, thing.colour, gallery) for thing in asked.things)
    swapped = first[1] + second[0] > first[0] + second[1]
    along = axis == ("x" if asked.relation in ("left", "right") else "y")
    return (parts[::-1] if swapped else parts), along and not swapped


def _alike(parts: list[Foreground], subject: str, colour: str | None, gallery: Gallery) -> Float[np.ndarray, "2"]:
    """How much each part looks like a subject."""
    target = gallery.atlas.subject(subject)
    return np.array([gallery.by_subject(likeness(part, gallery, colour))[target] for part in parts])
