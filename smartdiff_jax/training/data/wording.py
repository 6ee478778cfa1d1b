"""The words of captions: colours, motions, styles, and how they are put into a sentence.

`TRAINING` wordings are what a model learns from; `HELD_OUT` wordings say the same in verbs and sentence shapes it never saw.
Most often the first phrase of a list is used, else a synonym. A model that learns one shape of sentence reads others as noise,
so training has many, and none of them holds a held-out phrase.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BACKGROUNDS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.99, 0.86, 0.20),
    "green": (0.18, 0.65, 0.28),
    "cyan": (0.25, 0.80, 0.88),
    "blue": (0.14, 0.35, 0.88),
    "purple": (0.50, 0.22, 0.72),
    "pink": (0.98, 0.55, 0.75),
    "brown": (0.47, 0.30, 0.17),
    "black": (0.06, 0.06, 0.06),
    "gray": (0.55, 0.55, 0.55),
    "white": (0.96, 0.96, 0.96),
}
COLOURS: Mapping[str, tuple[float, float, float]] = {
    name: BACKGROUNDS[name] for name in ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
}
PROCEDURAL = (
    "left",
    "right",
    "up",
    "down",
    "clockwise",
    "counterclockwise",
    "grow",
    "shrink",
    "bounce",
    "shake",
    "swing",
)
MOTIONS = (*PROCEDURAL, "still", "animated")
RELATIONS = ("left", "right", "above", "below")
"""Where the first of two objects is, seen from the second."""


@dataclass(frozen=True)
class Attributes:
    """What a scene shows, by name. `background` holds one colour, or two from top to bottom; `colour` None is its own."""

    subject: str
    style: str
    colour: str | None
    background: tuple[str, ...]
    motion: str


@dataclass(frozen=True)
class Wording:
    """Phrases after the subject and adjectives before it for every motion, and the shapes of sentences.

    plain: how often a motion is said in the first of its phrases.
    """

    after: Mapping[str, Sequence[str]]
    before: Mapping[str, Sequence[str]]
    style_before: Mapping[str, Sequence[str]]
    style_after: Mapping[str, Sequence[str]]
    background_first: Sequence[str]
    background_last: Sequence[str]
    gradients: Sequence[str]
    plain: float = 0.8


GOING = (
    "moving", "sliding", "going", "drifting", "gliding", "flying", "rolling", "creeping", "sailing", "racing", "wandering",
    "driving", "crawling", "running",
)  # fmt: skip
"""So many that none of them says anything: where it goes is in the word behind."""

GETTING = ("getting", "growing", "swelling", "turning out", "looking", "ever")

TRAINING = Wording(
    after={
        "left": (
            *(f"{verb} left" for verb in GOING), *(f"{verb} to the left" for verb in GOING),
            "that moves left", "on its way to the left", "going off to the left",
        ),
        "right": (
            *(f"{verb} right" for verb in GOING), *(f"{verb} to the right" for verb in GOING),
            "that moves right", "on its way to the right", "going off to the right",
        ),
        "up": (
            *(f"{verb} up" for verb in GOING), "rising", "moving upwards", "floating up", "that moves up",
            "climbing upwards", "on its way up", "flying upwards", "drifting upwards",
        ),
        "down": (
            *(f"{verb} down" for verb in GOING), "falling", "moving downwards", "sinking down", "that moves down",
            "coming down", "on its way down", "sinking downwards", "drifting downwards",
        ),
        "clockwise": (
            "spinning clockwise", "rotating clockwise", "turning clockwise", "going round clockwise", "that spins clockwise",
            "in a clockwise spin",
        ),
        "counterclockwise": (
            "spinning counterclockwise", "rotating counterclockwise", "spinning counter-clockwise", "spinning anticlockwise",
            "turning counterclockwise", "going round anticlockwise", "that spins counterclockwise",
            "in an anticlockwise spin",
        ),
        "grow": (
            "growing", "zooming in", "growing larger", "that grows", "coming closer", "bigger and bigger",
            *(f"{verb} bigger" for verb in GETTING),
        ),
        "shrink": (
            "shrinking", "zooming out", "that shrinks", "shrinking down", "going away", "smaller and smaller",
            *(f"{verb} smaller" for verb in GETTING),
        ),
        "bounce": (
            "bouncing", "jumping", "hopping", "bouncing up and down", "that bounces", "jumping around", "hopping about",
        ),
        "shake": ("shaking", "trembling", "vibrating", "that shakes", "shaking from side to side", "trembling all the time"),
        "swing": (
            "swinging", "rocking", "swaying", "swinging back and forth", "that swings", "swaying to both sides",
            "rocking and swaying",
        ),
        "still": (
            "standing still", "not moving", "motionless", "that does not move", "without any motion", "keeping still",
            "at rest", "sitting still", "holding still", "not moving at all", "never moving", "without motion",
            "without going anywhere", "without a move",
        ),
        "animated": ("animated", "in motion", "coming alive", "that comes alive", "in its own motion", "full of life"),
    },
    before={
        "grow": ("growing",),
        "shrink": ("shrinking",),
        "bounce": ("bouncing", "jumping"),
        "shake": ("shaking", "trembling"),
        "swing": ("swinging", "swaying"),
        "still": ("still", "motionless"),
        "animated": ("animated",),
    },
    style_before={
        "3d": ("3d", "3d style", "3d rendered"),
        "flat": ("flat", "flat style", "flat drawn"),
        "noto": ("cartoon", "noto style", "noto", "cartoon drawn"),
    },
    style_after={
        "3d": ("3d", "3d style", "in 3d", "rendered in 3d", "a 3d picture", "as 3d art"),
        "flat": ("flat style", "flat", "flat design", "drawn flat", "a flat picture", "as flat art", "in flat style"),
        "noto": (
            "cartoon style", "noto style", "drawn as a cartoon", "cartoon", "a cartoon picture", "as cartoon art",
            "in cartoon style",
        ),
    },
    background_first=(
        "{} background, ", "on a {} background, ", "on {}: ", "{} backdrop, ", "against {}, ", "before a {} background: ",
        "{}, ", "with a {} backdrop, ", "all in front of {}, ", "{} at the back, ",
    ),
    background_last=(
        " on a {} background", ", {} background", " on {}", " in front of a {} background", " against a {} background",
        ", with {} behind it", " over {}", ", the background {}", ", {}", " before {}", ", the backdrop is {}",
        ", background: {}",
    ),
    gradients=(
        "{} to {}", "{} to {} gradient", "{} fading to {}", "{} into {}", "{} that turns {}", "{} then {}", "{} and then {}",
        "{} down to {}",
    ),
    plain=0.5,
)  # fmt: skip

HELD_OUT = Wording(
    after={
        "left": ("heading left", "travelling to the left"),
        "right": ("heading right", "travelling to the right"),
        "up": ("travelling up", "going upwards"),
        "down": ("travelling down", "dropping down"),
        "clockwise": ("revolving clockwise", "turning round clockwise"),
        "counterclockwise": ("revolving counterclockwise", "rotating anticlockwise"),
        "grow": ("becoming bigger", "growing and growing"),
        "shrink": ("becoming smaller", "shrinking away"),
        "bounce": ("hopping up and down", "bouncing around"),
        "shake": ("shaking and trembling", "shaking all over"),
        "swing": ("rocking back and forth", "swinging to and fro"),
        "still": ("without moving", "staying still"),
        "animated": ("shown in motion", "shown animated"),
    },
    before={},
    style_before={"3d": ("3d",), "flat": ("flat design",), "noto": ("cartoon style",)},
    style_after={"3d": ("as a 3d picture",), "flat": ("as a flat picture",), "noto": ("as a cartoon",)},
    background_first=("{} behind, ", "in front of {}: "),
    background_last=(" over a {} background", ", the background is {}", " with a {} background"),
    gradients=("{} turning to {}",),
)

A_BEFORE_VOWEL = re.compile(r"(u[nf][oi]|uni|eu|one)")
AN_BEFORE_CONSONANT = re.compile(r"(x-|suv|hour)")
PLURAL = re.compile(r"(?<![sui])s$")
REST_OF_NAME = re.compile(r" (of|in|with|on|at|up|down|pointing|raised|spouting|lowered)\b.*")


def article(noun: str, subject: str) -> str:
    """ "a", "an", or nothing before a plural; `noun` starts with the next word, `subject` is the name itself."""
    if PLURAL.search(REST_OF_NAME.sub("", subject)):
        return ""
    vowel = noun[0] in "aeiou" and not A_BEFORE_VOWEL.match(noun)
    return "an " if vowel or AN_BEFORE_CONSONANT.match(noun) else "a "


def pick(choices: Sequence[str], dice: random.Random, first: float = 0.8) -> str:
    """One of them; the first with this share."""
    return choices[0] if len(choices) == 1 or dice.random() < first else choices[1 + int(dice.random() * (len(choices) - 1))]


def sentence(
    shown: Attributes,
    own_motion: str,
    dice: random.Random,
    synonyms: Sequence[str] = (),
    wording: Wording = TRAINING,
    drop: bool = True,
) -> str:
    """One caption of `shown`.

    `own_motion` is what this picture does when nobody says anything ("animated" or "still"). With `drop`, words that may be
    omitted sometimes are: the style if it is 3d, the background, the motion if it is the picture's own, the article.
    """
    subject = dice.choice(synonyms) if synonyms and drop and dice.random() < 0.2 else shown.subject
    noun = f"{shown.colour} {subject}" if shown.colour else subject

    say_motion = shown.motion != own_motion or dice.random() < (0.5 if drop else 1.0)
    motion_before = ""
    motion_after = ""
    if say_motion:
        if shown.motion in wording.before and dice.random() < (0.7 if shown.motion in ("still", "animated") else 0.2):
            motion_before = pick(wording.before[shown.motion], dice)
        else:
            motion_after = pick(wording.after[shown.motion], dice, wording.plain)

    style_before, style_after = style_words(shown.style, dice, wording, drop)
    head = named(" ".join(word for word in (style_before, motion_before, noun) if word), subject, dice, drop)
    if motion_after:
        head += " " + motion_after
    return with_style_and_ground(head, style_after, shown.background, dice, wording, drop)


def style_words(style: str, dice: random.Random, wording: Wording, drop: bool) -> tuple[str, str]:
    """What is said of the style before the subject, or else behind it; nothing may be if it is 3d."""
    if style == "3d" and not (drop and dice.random() < 0.25):
        return "", ""
    if dice.random() < 0.5:
        return pick(wording.style_before[style], dice, 0.6), ""
    return "", pick(wording.style_after[style], dice, 0.6)


def named(head: str, subject: str, dice: random.Random, drop: bool) -> str:
    """`head`, which ends in `subject`, behind its article; with `drop` sometimes without."""
    return article(head, subject) + head if not drop or dice.random() < 0.75 else head


def with_style_and_ground(
    head: str, style_after: str, background: Sequence[str], dice: random.Random, wording: Wording, drop: bool
) -> str:
    """The sentence about what `head` says, in that style and before that background; with `drop` sometimes before none."""
    if style_after:
        head += ", " + style_after
    if drop and dice.random() < 0.12:
        return head
    ground = background[0]
    if len(background) == 2:
        ground = pick(wording.gradients, dice).format(*background)
    if dice.random() < 0.2:
        return fix_article(pick(wording.background_first, dice, 0.5).format(ground)) + head
    tail = fix_article(pick(wording.background_last, dice, 0.5).format(ground))
    return head + ("," if style_after and not tail.startswith(",") else "") + tail


def fix_article(phrase: str) -> str:
    """ "on a orange background" with its "an"."""
    return phrase.replace(" a orange", " an orange")


def vocabulary(names: Sequence[str], synonyms: Sequence[Sequence[str]], moving: bool = True) -> list[str]:
    """Every lower-case word that a training caption can hold, sorted: what a tokenizer is built from.

    A word that only held-out captions have is none of them: as a token of its own it would keep the vector it was drawn with,
    while spelled it is read as any unknown word. moving: words of motions too.
    """
    texts = [*names, *(word for words in synonyms for word in words), *BACKGROUNDS, "a an to"]
    of_motion = (TRAINING.after, TRAINING.before) if moving else ()
    for table in (*of_motion, TRAINING.style_before, TRAINING.style_after):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    texts += [*TRAINING.background_first, *TRAINING.background_last, *TRAINING.gradients]
    return words_of(texts)


def words_of(texts: Sequence[str]) -> list[str]:
    """The different words of some phrases, sorted."""
    return sorted({word for text in texts for word in re.findall(r"[^\s,:{}]+", text)})
