import random
import re
from collections import Counter

import numpy as np
import pytest

from smartdiff_jax.training.data.captions import ANIMATED, Captioner, Mix, draw_held_out, held_out_pairs
from smartdiff_jax.training.data.wording import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MOTIONS,
    PROCEDURAL,
    RELATIONS,
    TRAINING,
    Attributes,
    article,
    sentence,
)


def test_captions_and_choices_repeat_for_the_same_generator(drawn_atlas):
    captioner = Captioner(drawn_atlas)

    def draw(seed):
        rng = np.random.default_rng(seed)
        choice = captioner.choose(50, rng)
        return captioner.captions(choice, rng), captioner.attributes(choice)

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_shares_of_the_mix(drawn_atlas):
    captioner = Captioner(drawn_atlas, held_out={})
    rng = np.random.default_rng(0)
    choice = captioner.choose(4000, rng)
    kinds = Counter(MOTIONS[m] for m in choice.motion)
    assert abs(kinds["animated"] / 4000 - 0.30) < 0.03 and abs(kinds["still"] / 4000 - 0.15) < 0.03
    assert set(kinds) == set(MOTIONS)
    assert abs(np.mean([caption == "" for caption in captioner.captions(choice, rng)]) - 0.1) < 0.02
    assert abs((choice.colour >= 0).mean() - 0.7 * 0.2) < 0.03
    gradient = choice.ground[:, 0] != choice.ground[:, 1]
    assert abs(gradient.mean() - 0.25) < 0.03
    assert (drawn_atlas.clip_index[choice.subject[choice.motion == ANIMATED]] >= 0).all()


def test_held_out_pairs_never_come_up_in_training_and_do_in_scoring(drawn_atlas):
    held = {
        "background": {"arrow": "green", "boot": "green"},
        "colour": {name: "pink" for name in drawn_atlas.names},
        "motion": {name: "bounce" for name in drawn_atlas.names[:8]},
    }
    captioner = Captioner(drawn_atlas, Mix(coloured=1.0), held)
    for shown in captioner.attributes(captioner.choose(3000, np.random.default_rng(1))):
        assert shown.colour != "pink"
        assert not (shown.subject in held["background"] and "green" in shown.background)
        assert not (shown.subject in held["motion"] and shown.motion == "bounce")
    scored = [shown for _, shown in captioner.prompts_for_scoring(260, 0, held_out=True)]
    assert all(shown.subject in held["motion"] for shown in scored if shown.motion == "bounce")


def test_scoring_prompts_cover_motions_and_backgrounds_evenly_and_say_both(drawn_atlas):
    prompts = Captioner(drawn_atlas).prompts_for_scoring(156, 5)
    assert prompts == Captioner(drawn_atlas).prompts_for_scoring(156, 5)
    assert set(Counter(shown.motion for _, shown in prompts).values()) == {12}
    assert set(Counter(shown.background[0] for _, shown in prompts).values()) == {13}
    for prompt, shown in prompts:
        assert shown.subject in prompt and all(colour in prompt for colour in shown.background)
        assert shown.colour is None or shown.colour in prompt
        phrases = (*TRAINING.after[shown.motion], *TRAINING.before.get(shown.motion, ()))
        assert any(phrase in prompt for phrase in phrases)


def test_omitted_style_means_3d_and_other_styles_are_always_said(drawn_atlas):
    dice = random.Random(0)
    flat = Attributes("arrow", "flat", None, ("red",), "still")
    assert all("flat" in sentence(flat, "still", dice) for _ in range(100))
    plain = Attributes("arrow", "3d", None, ("red",), "left")
    captions = [sentence(plain, "still", dice) for _ in range(200)]
    assert 100 < sum("3d" not in caption for caption in captions) < 190
    assert all(any(phrase in caption for phrase in TRAINING.after["left"]) for caption in captions)


def test_a_motion_is_only_left_out_if_it_is_the_pictures_own(drawn_atlas):
    dice = random.Random(0)
    still = Attributes("boot", "3d", None, ("blue",), "still")
    words = (*TRAINING.after["still"], *TRAINING.before["still"])
    said, silent = ([sentence(still, own, dice) for _ in range(100)] for own in ("animated", "still"))
    assert all(any(word in caption for word in words) for caption in said)
    assert not all(any(word in caption for word in words) for caption in silent)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("apple", "an "),
        ("dog", "a "),
        ("ufo", "a "),
        ("unicorn", "a "),
        ("x-ray", "an "),
        ("umbrella", "an "),
        ("chopsticks", ""),
    ]
    + [
        ("octopus", "an "),
        ("glass of milk", "a "),
        ("bunch of grapes", "a "),
        ("dress", "a "),
        ("euro bill", "a "),
        ("bus", "a "),
    ],
)
def test_articles(noun, expected):
    assert article(noun, noun) == expected


def test_vocabulary_holds_every_word_of_training_and_none_that_only_held_out_captions_have(drawn_atlas):
    captioner = Captioner(drawn_atlas)
    rng = np.random.default_rng(2)
    words = set(captioner.vocabulary())
    captions = captioner.captions(captioner.choose(1500, rng), rng)
    captions += [prompt for prompt, _ in captioner.prompts_for_scoring(300, 1)]
    assert {word for caption in captions for word in re.findall(r"[^\s,:]+", caption)} <= words
    assert words.isdisjoint({"heading", "travelling", "dropping", "becoming", "shown", "staying"})


def test_no_held_out_shape_of_a_sentence_is_in_training():
    grounds = [*HELD_OUT.background_first, *HELD_OUT.background_last]
    held = [phrase.format("red") for phrase in (*grounds, *(g.format("{}", "blue") for g in HELD_OUT.gradients))]
    held += [phrase for phrases in HELD_OUT.after.values() for phrase in phrases]
    shown = Attributes("kite", "noto", None, ("red", "blue"), "left")
    dice = random.Random(0)
    captions = [
        sentence(Attributes("kite", "flat", None, ground, motion), "animated", dice)
        for motion in MOTIONS
        for ground in (("red",), ("red", "blue"))
        for _ in range(300)
    ]
    assert sentence(shown, "still", dice, wording=HELD_OUT, drop=False) not in captions
    found = {phrase for phrase in held for caption in captions if phrase in caption}
    assert not found


def test_invisible_choices_are_avoided(drawn_atlas):
    captioner = Captioner(drawn_atlas, held_out={})
    choice = captioner.choose(2000, np.random.default_rng(0))
    grounds, _ = captioner.allowed(choice)
    assert grounds[np.arange(2000), choice.ground[:, 0]].all()
    for shown in captioner.attributes(choice):
        assert shown.colour is None or shown.colour not in shown.background


def test_the_committed_list_is_five_per_cent_of_known_words():
    pairs = held_out_pairs()
    for kind, words in (("background", BACKGROUNDS), ("colour", COLOURS), ("motion", PROCEDURAL), ("relation", RELATIONS)):
        assert set(pairs[kind].values()) == set(words)
    names = [f"thing {i}" for i in range(200)]
    drawn = draw_held_out(names)
    assert drawn == draw_held_out(names)
    counts = {"background": 120, "colour": 80, "motion": 110, "relation": 40}
    assert {kind: len(found) for kind, found in drawn.items()} == counts
