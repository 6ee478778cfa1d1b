"""Pictures of one object or two: what is chosen, said and drawn, and whether the checkers see it on real renders."""

import random
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.training import picture_checkers
from smartdiff_jax.training.checkers import Gallery
from smartdiff_jax.training.data import atlas as atlas_file
from smartdiff_jax.training.data.pictures import ALONE, TOLD, PictureCaptioner, PictureChoice, PictureMix, sentence
from smartdiff_jax.training.data.scenes import pack, render
from smartdiff_jax.training.data.sources import Subject
from smartdiff_jax.training.data.wording import RELATIONS

draw = jax.jit(render, static_argnames=("height", "width"))
SIZE = 96


@pytest.fixture(scope="module")
def captioner(drawn_atlas):
    return PictureCaptioner(drawn_atlas, held_out={})


@pytest.fixture(scope="module")
def gallery(drawn_atlas):
    return Gallery(drawn_atlas)


def photograph(captioner, choice, seed=0):
    """uint8 [n, 1, 96, 96, 3], a little blurred and noisy as a decoder leaves it."""
    rng = np.random.default_rng(seed)
    pictures = np.asarray(draw(pack(captioner.atlas.bank()), captioner.stage(choice, rng), SIZE, SIZE))[:, 0] / 2 + 0.5
    blurred = [Image.fromarray((p * 255).astype(np.uint8)).resize((72, 72)).resize((SIZE, SIZE)) for p in pictures]
    noisy = np.stack(blurred) / 255 + rng.normal(0, 0.02, pictures.shape)
    return (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8)[:, None]


def pair(relation, first=0, second=2, colours=(-1, -1), ground=(9, 9)):
    """One choice of two flat shapes."""
    return PictureChoice(
        np.array([[first, second]]), np.zeros(1, int), np.array([colours]), np.array([ground]), np.array([relation])
    )


def test_shares_of_the_mix_and_what_pairs_share(captioner):
    rng = np.random.default_rng(0)
    choice = captioner.choose(4000, rng)
    paired = choice.relation != ALONE
    assert abs(paired.mean() - 0.35) < 0.03 and ((choice.subject[:, 1] == ALONE) == ~paired).all()
    assert (choice.subject[paired, 0] != choice.subject[paired, 1]).all()
    assert abs((choice.colour[:, 0] >= 0).mean() - 0.3) < 0.03 and (choice.colour[~paired, 1] == -1).all()
    assert abs((choice.ground[:, 0] != choice.ground[:, 1]).mean() - 0.2) < 0.03
    assert np.ptp(np.bincount(choice.relation[paired], minlength=4)) < 120
    assert abs(np.mean([caption == "" for caption in captioner.captions(choice, rng)]) - 0.1) < 0.02


def test_the_same_generator_gives_the_same_captions(captioner):
    def told(seed):
        rng = np.random.default_rng(seed)
        choice = captioner.choose(50, rng)
        return captioner.captions(choice, rng)

    assert told(3) == told(3) and told(3) != told(4)


def test_held_out_pairs_never_come_up_in_training_and_do_in_scoring(drawn_atlas):
    held = {
        "background": {"arrow": "green", "boot": "green"},
        "colour": {name: "pink" for name in drawn_atlas.names},
        "relation": {name: "left" for name in drawn_atlas.names[:8]},
    }
    captioner = PictureCaptioner(drawn_atlas, PictureMix(coloured=1.0, pairs=0.8), held)
    for shown in captioner.attributes(captioner.choose(2000, np.random.default_rng(1))):
        assert all(thing.colour != "pink" for thing in shown.things)
        assert not ({thing.subject for thing in shown.things} & {"arrow", "boot"} and "green" in shown.background)
        assert not (shown.relation == "left" and shown.things[0].subject in held["relation"])
    scored = [shown for _, shown in captioner.prompts_for_scoring(100, 0, held_out=True)]
    lefts = [shown for shown in scored if shown.relation == "left"]
    assert len(lefts) == 10 and all(shown.things[0].subject in held["relation"] for shown in lefts)


def test_scoring_prompts_say_everything_and_go_round(captioner):
    prompts = captioner.prompts_for_scoring(60, 5)
    assert prompts == captioner.prompts_for_scoring(60, 5)
    assert [sum(shown.relation == name for _, shown in prompts) for name in RELATIONS] == [6, 6, 6, 6]
    for prompt, shown in prompts:
        places = [prompt.index(thing.subject) for thing in shown.things]
        assert places == sorted(places) and all(colour in prompt for colour in shown.background)
        assert all(thing.colour is None or f"{thing.colour} {thing.subject}" in prompt for thing in shown.things)
        assert shown.relation is None or any(phrase in prompt for phrase in TOLD[shown.relation])


def test_a_pair_is_told_with_the_first_where_it_is(captioner):
    shown = captioner.attributes(pair(RELATIONS.index("above"), colours=(0, -1)))[0]
    text = sentence(shown, random.Random(0), drop=False)
    assert re.fullmatch(
        r"a red arrow (above|on top of) a flag.* green.*|.*green.* a red arrow (above|on top of) a flag", text
    ) or ("red arrow" in text and "flag" in text)
    assert text.index("arrow") < text.index("flag")


def test_vocabulary_holds_every_word_of_training_and_none_that_only_held_out_captions_have(captioner):
    rng = np.random.default_rng(2)
    words = set(captioner.vocabulary())
    captions = captioner.captions(captioner.choose(1000, rng), rng)
    captions += [prompt for prompt, _ in captioner.prompts_for_scoring(200, 1)]
    assert {word for caption in captions for word in re.findall(r"[^\s,:]+", caption)} <= words
    assert words.isdisjoint({"higher", "just", "lower", "side", "than"})


@pytest.mark.parametrize("relation", RELATIONS)
def test_two_objects_stand_where_they_are_said_and_do_not_touch(captioner, relation):
    n = 50
    one = pair(RELATIONS.index(relation))
    choice = PictureChoice(*(np.repeat(getattr(one, name), n, 0) for name in one.__dataclass_fields__))
    first, second = captioner.stage(choice, np.random.default_rng(0)).sprites
    axis, sign = (0 if relation in ("left", "right") else 1), (-1 if relation in ("left", "above") else 1)
    apart = sign * (first.centre - second.centre)[:, 0, axis]
    assert (apart >= (first.side + second.side)[:, 0] / 2 - 1e-6).all()
    for sprite in (first, second):
        assert (np.abs(sprite.centre - 0.5)[:, 0].max(-1) + sprite.side[:, 0] / 2 <= 0.5).all()


def test_the_second_sprite_of_one_object_is_not_drawn(captioner):
    choice = replace(pair(ALONE), subject=np.array([[3, ALONE]]))
    bank, scene = pack(captioner.atlas.bank()), captioner.stage(choice, np.random.default_rng(0))
    alone = replace(scene, sprites=scene.sprites[:1])
    # One and two sprites are two programs, whose last bits may differ; a pixel of a drawn one would by 1 of 255 or more.
    np.testing.assert_allclose(draw(bank, scene, SIZE, SIZE), draw(bank, alone, SIZE, SIZE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_checker_sees_position_subjects_and_colours(captioner, gallery, relation):
    choice = pair(RELATIONS.index(relation), 3, 5, colours=(0, 5))
    shown, picture = captioner.attributes(choice)[0], photograph(captioner, choice)[0]
    result = picture_checkers.score(picture, shown, gallery)
    # Painted, the two subjects that share a shape in this atlas differ in nothing but shades.
    assert result["position_ok"] and max(result["subject_rank"]) <= 2 and result["background_ok"], result
    assert result["colour_ok"] and result["colour"] == ["red", "blue"], result
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
    turned = {"left": "above", "right": "below", "above": "left", "below": "right"}[relation]
    for other in (opposite, turned):
        wrong = picture_checkers.score(picture, replace(shown, relation=other), gallery)
        assert wrong["position_ok"] is False
    # The asked colours changed places: the objects are found, their colours are wrong.
    things = tuple(replace(a, colour=b.colour) for a, b in zip(shown.things, shown.things[::-1], strict=True))
    assert picture_checkers.score(picture, replace(shown, things=things), gallery)["colour_ok"] is False


def test_the_checker_is_right_on_random_renders(captioner, gallery):
    choice = captioner.choose(40, np.random.default_rng(7))
    rows = [
        picture_checkers.score(picture, shown, gallery)
        for picture, shown in zip(photograph(captioner, choice), captioner.attributes(choice), strict=True)
    ]
    for name in ("background", "position", "colour", "style"):
        found = [row[f"{name}_ok"] for row in rows if row[f"{name}_ok"] is not None]
        assert len(found) > 8 and np.mean(found) >= 0.9, name
    assert np.mean(np.concatenate([row["subject_rank"] for row in rows]) <= 1) >= 0.9


def test_an_empty_picture_matches_nothing(captioner, gallery):
    shown = captioner.attributes(pair(0, colours=(0, 5)))[0]
    result = picture_checkers.score(np.full((1, SIZE, SIZE, 3), 140, np.uint8), shown, gallery)
    assert min(result["subject_rank"]) == len(captioner.atlas.names) and not result["colour_ok"]


def test_an_atlas_of_pictures_has_no_clips(drawn_atlas, tmp_path):
    sprites = [Image.fromarray(image) for image in drawn_atlas.sprites[:3, :36, :36]]
    subject = Subject("", "dog", "Objects", ())
    index = np.array([[0, 1, 2]], np.int32)
    atlas_file.save(
        tmp_path / "a.npz", [subject], [atlas_file.encode(s, 90) for s in sprites], [], index, np.array([-1], np.int32), 36
    )
    loaded = atlas_file.load(tmp_path / "a.npz")
    assert loaded.sprites.shape == (3, 36, 36, 4) and len(loaded.clips) == 0 and not loaded.animated.any()
    assert loaded.bank().shape == (3, 36, 36, 4)
    for side, animated in ((70, False), (108, True)):
        with pytest.raises(InvalidConfig, match="atlas.side"):
            atlas_file.build(tmp_path, tmp_path / "b.npz", side, animated)
