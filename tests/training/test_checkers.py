import jax
import numpy as np
import pytest
from PIL import Image

from smartdiff_jax.training import checkers
from smartdiff_jax.training.data.captions import Captioner, Choice
from smartdiff_jax.training.data.scenes import pack, render, stage
from smartdiff_jax.training.data.wording import BACKGROUNDS, COLOURS, MOTIONS

draw = jax.jit(render, static_argnames=("height", "width"))


@pytest.fixture(scope="module")
def gallery(drawn_atlas):
    return checkers.Gallery(drawn_atlas)


def film(atlas, choice, seed=0, noise=0.02):
    """uint8 [n, 17, 96, 96, 3], a little blurred and noisy as a decoder leaves it."""
    rng = np.random.default_rng(seed)
    scene = stage(atlas, choice, rng)
    video = np.asarray(draw(pack(atlas.bank()), scene)) / 2 + 0.5
    frames = [
        np.asarray(Image.fromarray((frame * 255).astype(np.uint8)).resize((72, 72)).resize((96, 96)), np.float32) / 255
        for frame in video.reshape(-1, 96, 96, 3)
    ]
    noisy = np.stack(frames).reshape(video.shape) + rng.normal(0, noise, video.shape)
    return (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8)


def pick(subjects, motion="still", ground=(10, 10), colour=-1, style=0):
    subject = np.atleast_1d(subjects)
    like = np.zeros(len(subject), int)
    return Choice(subject, like + style, like + colour, np.tile(ground, (len(subject), 1)), like + MOTIONS.index(motion))


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_is_recognised(drawn_atlas, motion):
    subjects = np.arange(1, 9, 2) if motion == "animated" else np.array([0, 1, 2, 7])
    for frames in film(drawn_atlas, pick(subjects, motion)):
        seen = checkers.motion(checkers.track(checkers.foreground(frames)))
        assert seen in checkers.OWN_ANIMATION if motion == "animated" else seen == motion


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_every_background_is_named(drawn_atlas, name):
    index = list(BACKGROUNDS).index(name)
    for frames in film(drawn_atlas, pick([3], ground=(index, index))):
        assert checkers.background(checkers.foreground(frames)) == (name,)


@pytest.mark.parametrize("pair", [("red", "blue"), ("blue", "red"), ("white", "gray"), ("pink", "purple")])
def test_a_gradient_is_two_names_from_top_to_bottom(drawn_atlas, pair):
    ground = tuple(list(BACKGROUNDS).index(name) for name in pair)
    for frames in film(drawn_atlas, pick([0, 4], "left", ground=ground)):
        assert checkers.background(checkers.foreground(frames)) == pair


@pytest.mark.parametrize("motion", ["grow", "up", "clockwise"])
def test_every_subject_is_found_first(drawn_atlas, gallery, motion):
    choice = pick([0, 5, 11], motion, ground=(9, 9), style=1)
    for frames, shown in zip(film(drawn_atlas, choice), Captioner(drawn_atlas).attributes(choice), strict=True):
        result = checkers.score(frames, shown, gallery)
        assert result["subject_rank"] == 1 and result["background_ok"] and result["motion_ok"], result


def test_a_wrong_request_is_told_from_a_right_one(drawn_atlas, gallery):
    shown, other = Captioner(drawn_atlas).attributes(pick([2, 5], "left"))
    frames = film(drawn_atlas, pick([2], "right", ground=(5, 5)))[0]
    result = checkers.score(frames, shown, gallery)
    assert result["subject"] == shown.subject
    assert not result["background_ok"] and not result["motion_ok"] and result["motion"] == "right"
    assert checkers.score(frames, other, gallery)["subject_rank"] > 1


@pytest.mark.parametrize("colour", range(len(COLOURS)))
def test_a_painted_subject_keeps_its_name_and_shows_its_colour(drawn_atlas, gallery, colour):
    choice = pick([1], "bounce", ground=(9, 9), colour=colour)
    shown = Captioner(drawn_atlas).attributes(choice)[0]
    result = checkers.score(film(drawn_atlas, choice)[0], shown, gallery)
    assert result["subject_rank"] == 1 and result["colour_ok"], result


def test_an_empty_video_matches_nothing_well(drawn_atlas, gallery):
    frames = np.full((17, 96, 96, 3), 140, np.uint8)
    shown = Captioner(drawn_atlas).attributes(pick([0], "left"))[0]
    result = checkers.score(frames, shown, gallery)
    assert result["motion"] == "none" and not result["motion_ok"]
    assert result["subject_rank"] == len(drawn_atlas.names)
