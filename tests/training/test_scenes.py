from dataclasses import replace

import jax
import numpy as np
import pytest

from smartdiff_jax.training.data.captions import Choice
from smartdiff_jax.training.data.scenes import Director, Scene, Sprite, pack, render, stage
from smartdiff_jax.training.data.wording import MOTIONS

draw = jax.jit(render, static_argnames=("height", "width"))


def one(ground=np.full((1, 2, 3), 0.5, np.float32), **changes) -> Scene:
    sprite = Sprite(
        image=np.zeros((1, 1), np.int32),
        centre=np.full((1, 1, 2), 0.5, np.float32),
        side=np.ones((1, 1), np.float32),
        angle=np.zeros((1, 1), np.float32),
        tint=np.zeros((1, 4), np.float32),
    )
    return Scene((replace(sprite, **changes),), ground)


def test_a_sprite_at_its_own_size_is_composed_exactly(drawn_atlas):
    sprite = drawn_atlas.sprites[0].astype(np.float64) / 255
    expected = sprite[..., :3] + (1 - sprite[..., 3:]) * 0.5
    video = np.asarray(draw(pack(drawn_atlas.bank()), one(), height=72, width=72))
    np.testing.assert_allclose((video[0, 0] + 1)[1:-1, 1:-1] / 2, expected[1:-1, 1:-1], atol=1e-5)


def test_a_quarter_turn_is_clockwise(drawn_atlas):
    bank = pack(drawn_atlas.bank())
    upright = np.asarray(draw(bank, one(), height=72, width=72))[0, 0]
    turned = np.asarray(draw(bank, one(angle=np.full((1, 1), np.pi / 2, np.float32)), height=72, width=72))[0, 0]
    np.testing.assert_allclose(turned[2:-2, 2:-2], np.rot90(upright, -1)[2:-2, 2:-2], atol=2e-3)


def test_the_background_runs_from_top_to_bottom(drawn_atlas):
    ground = np.array([[[1, 0, 0], [0, 0, 1]]], np.float32)
    video = np.asarray(draw(pack(drawn_atlas.bank()), one(ground=ground, side=np.full((1, 1), 0.1, np.float32))))
    assert video.shape == (1, 1, 96, 96, 3)
    assert video[0, 0, 0, 0, 0] > 0.95 and video[0, 0, -1, 0, 2] > 0.95 and abs(video[0, 0, 48, 0, 0]) < 0.05


def test_a_tint_gives_every_pixel_the_named_hue(drawn_atlas):
    tint = np.array([[0.86, 0.16, 0.16, 1.0]], np.float32)
    frame = np.asarray(draw(pack(drawn_atlas.bank()), one(tint=tint)))[0, 0]
    red, green, blue = frame[48, 48]
    assert red > green and abs(green - blue) < 1e-3


def test_any_size_and_frame_count(drawn_atlas):
    director = Director(drawn_atlas, frames=9)
    scene, captions, shown = director.batch(3, np.random.default_rng(0))
    video = draw(director.bank(), scene, height=64, width=112)
    assert video.shape == (3, 9, 64, 112, 3) and len(captions) == len(shown) == 3
    assert float(abs(video).max()) <= 1


def centres(drawn_atlas, motion, n=20) -> Sprite:
    zero = np.zeros(n, int)
    choice = Choice(np.arange(n) % 16, zero, zero - 1, np.zeros((n, 2), int), zero + MOTIONS.index(motion))
    return stage(drawn_atlas, choice, np.random.default_rng(0)).sprites[0]


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_travel_is_a_third_to_a_half_of_the_frame(drawn_atlas, motion, axis, sign):
    scene = centres(drawn_atlas, motion)
    way = sign * (scene.centre[:, -1, axis] - scene.centre[:, 0, axis])
    assert (way >= 0.3).all() and (way <= 0.5).all()
    assert (np.abs(scene.centre[:, :, 1 - axis] - 0.5) < 1e-6).all()


def test_turns_and_zooms_are_large_and_have_the_right_sign(drawn_atlas):
    turn = centres(drawn_atlas, "clockwise").angle[:, -1]
    assert (turn >= np.pi).all() and (turn <= 2 * np.pi).all()
    assert (centres(drawn_atlas, "counterclockwise").angle[:, -1] <= -np.pi).all()
    grow, shrink = centres(drawn_atlas, "grow").side, centres(drawn_atlas, "shrink").side
    assert (grow[:, -1] / grow[:, 0] > 1.7).all() and (shrink[:, 0] / shrink[:, -1] > 1.7).all()


def test_bouncing_shaking_swinging_come_back_and_still_stays(drawn_atlas):
    assert np.ptp(centres(drawn_atlas, "bounce").centre[..., 1], axis=1).min() > 0.12
    assert np.ptp(centres(drawn_atlas, "shake").centre[..., 0], axis=1).min() > 0.09
    assert np.ptp(centres(drawn_atlas, "swing").angle, axis=1).min() > np.radians(40)
    still = centres(drawn_atlas, "still")
    assert np.ptp(still.centre, axis=1).max() == 0 and np.ptp(still.angle, axis=1).max() == 0


def test_sprites_stay_mostly_inside(drawn_atlas):
    for motion in MOTIONS:
        scene = centres(drawn_atlas, motion)
        over = np.abs(scene.centre - 0.5).max(-1) + 0.5 * scene.side - 0.5
        assert (over <= 0.126 * scene.side + 0.05).all(), motion


def test_an_animated_scene_plays_its_clip(drawn_atlas):
    zero = np.zeros(1, int)
    choice = Choice(zero + 1, zero, zero - 1, np.zeros((1, 2), int), zero + MOTIONS.index("animated"))
    sprite = stage(drawn_atlas, choice, np.random.default_rng(0)).sprites[0]
    np.testing.assert_array_equal(sprite.image[0], len(drawn_atlas.sprites) + np.arange(17))
