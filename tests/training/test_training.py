"""The whole training at toy size, of every family that can be trained: 16x16 pixels, tiny widths, on drawn shapes."""

import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from smartdiff_jax.config.model import known_models, parse_spec
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.errors import CheckpointError, InvalidConfig, SmartdiffError
from smartdiff_jax.models.families import FAMILIES, WAN
from smartdiff_jax.models.qwen_image import QwenImageConfig
from smartdiff_jax.models.text import prompts
from smartdiff_jax.models.text.qwen import Qwen25VLConfig, _turn_halves
from smartdiff_jax.models.text.umt5 import UMT5Config, relative_position_buckets
from smartdiff_jax.training import autoencoder, flow_matching, loop, recipe, settings
from smartdiff_jax.training.checkpoints import Checkpoints
from smartdiff_jax.training.data.captions import Captioner
from smartdiff_jax.training.data.pictures import PictureCaptioner
from smartdiff_jax.training.devices import Devices, one
from smartdiff_jax.training.export import checkpoint_tensors, restore
from smartdiff_jax.training.pool import Pool, putter, roughened, scene_batches
from smartdiff_jax.training.recipe import Run
from smartdiff_jax.training.state import Budget, Component, Optimizer, count
from smartdiff_jax.training.tokenizer import CHAT, build_tokenizer, encode
from smartdiff_jax.training.trainees import TRAINEES
from smartdiff_jax.training.trainees.qwen_image import neighbour_biases
from smartdiff_jax.training.trainees.wan import POSITIONS

COMMON = """
name: toy
seed: 1
vae: {base_dim: 4, z_dim: 4, dim_mult: [1, 2], num_res_blocks: 1, temperal_downsample: [true]}
autoencoder: {batch_size: 2, steps_per_call: 2, minutes: 1, steps: 20, learning_rate: 5.0e-3}
denoiser:
  {batch_size: 16, steps_per_call: 4, minutes: 1, steps: 32, learning_rate: 5.0e-3, pool_size: 32, part_calls: 4,
   attention: xla, fill_share: 0.01, refresh_share: 0.01}
scoring: {prompts: 5, num_inference_steps: 3}
"""

TOYS = {
    "wan": COMMON
    + """
family: wan
output: {height: 16, width: 16, num_frames: 5, fps: 8}
text: {vocab_size: 300, max_length: 24, captions: 500}
transformer:
  {num_attention_heads: 2, attention_head_dim: 16, num_layers: 2, ffn_dim: 64, text_dim: 16, freq_dim: 32, in_channels: 4,
   out_channels: 4}
text_encoder: {d_model: 16, d_kv: 8, d_ff: 32, num_layers: 1, num_heads: 2}
sampling: {guidance_scale: 2.0}
""",
    "qwen-image": COMMON
    + """
family: qwen-image
output: {height: 16, width: 16}
text: {vocab_size: 400, max_length: 60, captions: 500}
transformer:
  {num_attention_heads: 2, attention_head_dim: 16, num_layers: 1, in_channels: 16, out_channels: 4, joint_attention_dim: 16,
   axes_dims_rope: [4, 6, 6]}
text_encoder:
  {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2,
   rms_norm_eps: 1.0e-6, rope_theta: 100.0}
sampling: {sampler: flow_euler, guidance_scale: 2.0, guidance_norm: per_token, from_one: true}
""",
}

TINY_TEXT = UMT5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)


@pytest.fixture(scope="module", params=TOYS)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def toy_recipe(family, tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "toy.yaml"
    file.write_text(TOYS[family.name])
    return file


@pytest.fixture(scope="module")
def captioner(family, drawn_atlas):
    kind = PictureCaptioner if family.task == "t2i" else Captioner
    return kind(drawn_atlas, held_out={})


# What does not depend on the family is tested once. Stills are trained faster than clips.
once = pytest.mark.parametrize("family", ["wan"], indirect=True, scope="module")
once_on_stills = pytest.mark.parametrize("family", ["qwen-image"], indirect=True, scope="module")


def make_run(file, captioner, folder, overrides=(), **arguments):
    training = Run(settings.load_recipe(file, overrides), folder / "no-atlas.npz", folder, **arguments)
    training.captioner = captioner
    return training


def once_for_equal(make):
    """`make`, but what it made before where the numbers are equal: components by the numbers of their configs."""

    def number(part):
        return (part.architecture.build, part.config) if isinstance(part, Component) else part

    def remembering(*arguments):
        key = repr([number(part) for part in arguments])
        if key not in made:
            made[key] = make(*arguments)
        return made[key]

    made = {}
    return remembering


class Plain(Optimizer):
    """Gradient descent, whose steps are as exact as the gradients are."""

    def _transform(self):
        return optax.identity()


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Several runs are made of the same functions: those after the first take them as they are compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Component, "init", once_for_equal(Component.init))
        patch.setattr(autoencoder, "make_call", once_for_equal(autoencoder.make_call))
        patch.setattr(recipe, "Codec", once_for_equal(recipe.Codec))
        patch.setattr(recipe, "Generator", once_for_equal(recipe.Generator))
        yield


@pytest.fixture(scope="module")
def finished(toy_recipe, captioner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    training = make_run(toy_recipe, captioner, folder)
    assert training.autoencoder()
    assert training.denoiser()
    training.export()
    training.evaluate()
    return training


def losses(folder, stage):
    """First and last loss that the log tells."""
    text = (folder / "log.txt").read_text()
    return [float(number) for number in re.findall(rf"{stage}: (?:first call|done|stopped).*?loss ([\d.]+)", text)]


def test_all_stages_leave_their_results(finished):
    folder = finished.folder
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["trained"]["prompts"] == scores["held_out"]["prompts"] == 5
    assert 0 <= scores["trained"]["subject_top1"] <= scores["trained"]["subject_top5"] <= 1
    sheets = {file.name for file in (folder / "sheets").iterdir()}
    assert {"autoencoder-000020.png", "denoiser-000032.png", "final-trained.png", "final-held_out.png"} <= sheets
    assert "| 5, held out |" in (folder / "bundle" / "README.md").read_text()
    assert "denoiser: step 32, {'prompts': 5" in (folder / "log.txt").read_text()
    assert finished.autoencoder() and finished.denoiser()  # done already: both return at once


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_the_loss_falls(finished, stage):
    first, last = losses(finished.folder, stage)
    assert last < 0.95 * first


@once_on_stills
def test_a_stopped_run_goes_on_to_the_same_weights(finished, toy_recipe, captioner, tmp_path, monkeypatch):
    class Short(Budget):
        calls = 0

        def stop(self):
            self.calls += 1
            return self.calls > 3

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "Budget", Short)
        assert not make_run(toy_recipe, captioner, tmp_path).autoencoder()
    assert not (tmp_path / "latents.json").exists()
    with pytest.raises(InvalidConfig, match="finish `--stage autoencoder` first"):
        make_run(toy_recipe, captioner, tmp_path).denoiser()
    assert make_run(toy_recipe, captioner, tmp_path).autoencoder()
    assert "going on from step 6" in (tmp_path / "log.txt").read_text()
    for stage_folder in (tmp_path, finished.folder):
        assert json.loads((stage_folder / "latents.json").read_text())
    ours, theirs = (Checkpoints(folder / "autoencoder").average() for folder in (tmp_path, finished.folder))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@once
def test_a_snapshot_starts_another_run(finished, toy_recipe, captioner, tmp_path):
    overrides = ["denoiser.steps=4", "denoiser.learning_rate=1.0e-9", "denoiser.recompute=true"]
    snapshot = finished.folder / "snapshot"
    training = make_run(toy_recipe, captioner, tmp_path, overrides, init_from=snapshot)
    assert training.autoencoder() and training.denoiser()
    trained = Checkpoints(finished.folder / "denoiser").average()
    started = Checkpoints(tmp_path / "denoiser").average()
    for name, value in trained.items():
        assert np.max(np.abs(started[name] - value)) <= 2**-8 * np.max(np.abs(value)) + 1e-6, name
    assert losses(tmp_path, "denoiser")[0] < losses(finished.folder, "denoiser")[0]

    narrow = make_run(toy_recipe, captioner, tmp_path / "narrow", ["transformer.num_layers=1"], init_from=snapshot)
    with pytest.raises(InvalidConfig, match="init_from"):
        narrow._first_weights()


def test_the_bundle_holds_the_averages_to_its_bits(finished, family):
    averages = {"vae": Checkpoints(finished.folder / "autoencoder").average()}
    both = Checkpoints(finished.folder / "denoiser").average()
    for name in ("transformer", "text_encoder"):
        averages[name] = flow_matching.part_of(both, f"{name}.")
    for name, average in averages.items():
        config, loaded = restore(finished.folder / "bundle", name, family.architectures[name])
        assert loaded.keys() == average.keys()
        for path, value in average.items():
            assert np.max(np.abs(loaded[path] - value)) <= np.max(np.abs(value)) / 254 + 1e-6, path
    vae_config, _ = restore(finished.folder / "bundle", "vae", family.architectures["vae"])
    statistics = json.loads((finished.folder / "latents.json").read_text())
    assert list(vae_config.latents_std) == statistics["std"] and vae_config.clip_output


def test_the_pipeline_runs_the_bundle_as_training_does(finished, family, tmp_path):
    """Equal latents from the same noise, through the tokenizer, template and defaults that the folder tells."""
    system = SystemConfig.create(cache_dir=tmp_path, dtype="float32")
    pipe = Pipeline.from_pretrained(finished.folder / "bundle", system=system)
    output, spec = finished.recipe.output, parse_spec(yaml.safe_load((finished.folder / "toy.yaml").read_text()), "toy.yaml")
    assert pipe.spec.sampling.shift == spec.sampling.shift == finished.recipe.denoiser.shift
    assert (spec.sampling.width, spec.sampling.num_frames, spec.bundled) == (16, output.num_frames, True)
    assert (pipe.spec.sampling.sampler, pipe.spec.sampling.from_one) == (spec.sampling.sampler, spec.sampling.from_one)
    text = "a boot moving left, red background"
    params = {
        f"{name}.{path}": value
        for name in ("transformer", "text_encoder")
        for path, value in restore(finished.folder / "bundle", name, family.architectures[name])[1].items()
    }
    # As many as are scored, which is compiled already; each has noise of its own.
    ids, empty = finished.tokenize([text] * finished.recipe.scoring.prompts), finished.tokenize([""])
    several = finished.generator(params, ids, empty, 3, 2)
    theirs = np.asarray(several, np.float32)[:1]
    noise = np.asarray(jax.random.normal(jax.random.key(3), several.shape))[:1]
    out = pipe(
        text, negative_prompt="", size="16x16", num_frames=output.num_frames, num_inference_steps=2, guidance_scale=2.0,
        latents=noise if family.task == "t2v" else noise[:, :, 0],
    )  # fmt: skip
    assert out.frames.shape == (1, output.num_frames, 16, 16, 3)
    np.testing.assert_allclose(out.latents.reshape(theirs.shape), theirs, atol=1e-4)


@once_on_stills
def test_two_devices_take_the_steps_of_one(toy_recipe, captioner, tmp_path):
    """Both stages, from the same weights and scenes: what differs is the order in which numbers are added."""
    # Of steps by momentum alone, in which a gradient near nothing weighs nothing; each device's part of the pool is the same.
    training = make_run(toy_recipe, captioner, tmp_path, ["autoencoder.batch_size=4"])
    settings, denoising = training.recipe.autoencoder, training.recipe.denoiser
    scenes = scene_batches(training.world, 2, 4, np.random.default_rng(3))[1]
    source = training.recipe.served_by.text[0]
    ropes = training.recipe.served_by.rope(training.transformer.config, training.grid, 60 - source.skip, 0)
    rng = np.random.default_rng(4)
    latents = rng.normal(size=(1, 2, 16, 16)).astype(jnp.bfloat16)
    text = np.stack([training.tokenize(["a red boot", "a kite on a blue background"]) for _ in range(2)], 1)[None]

    def steps(count):
        devices = Devices(jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",)))
        encode = autoencoder.make_call(training.vae, settings, Plain(), (16, 16), 1, devices)
        state = devices.replicate(Plain().init(training._first_vae()))
        state, first = encode(state, np.float32(0.1), devices.replicate(training.bank), scenes)
        make = flow_matching.make_call
        denoise = make(training.transformer, training.text_encoder, source, denoising, Plain(), ropes, 1, devices)
        pool = Pool.empty(2 * count, (16, 16), 2, 60, devices)
        parts = (np.concatenate([whole] * count, 1) for whole in (latents, text))
        pool = putter(devices)(pool, *parts, np.int32(0))
        both = devices.replicate(Plain().init(training._first_weights()))
        both, second = denoise(both, np.float32(0.1), pool, np.int32(2))
        return one((state.params, both.params)), float(first), float(second)

    alone, together = steps(1), steps(2)
    assert together[1:] == pytest.approx(alone[1:], rel=1e-5)
    for mine, theirs, start in zip(together[0], alone[0], (training._first_vae(), training._first_weights()), strict=True):
        for name, value in theirs.items():
            moved = np.max(np.abs(value - start[name]))
            np.testing.assert_allclose(mine[name], value, rtol=0, atol=1e-3 * moved + 1e-7, err_msg=name)


@once
def test_the_text_encoder_starts_by_looking_at_its_neighbours(finished):
    """The word before and the word behind weigh more than all others: "red heart" is not "heart, red somewhere"."""
    bias = flow_matching.init(finished.transformer, finished.text_encoder, TRAINEES["wan"], finished.recipe.seed)[POSITIONS]
    by_offset = bias[0][relative_position_buckets(6, 32, 128)]  # offsets -5 to 5
    assert np.argmax(by_offset[:, 0]) == 4 and np.argmax(by_offset[:, 1]) == 6
    assert np.min(np.max(by_offset, axis=0)) > 3


@once
def test_queries_without_a_scale_learn_as_much_more_slowly(finished):
    """An eighth of the rate for heads of 64, as if the logits were divided by 8: or they outgrow the positions."""
    rates = TRAINEES["wan"].rates(finished.text_encoder.config)
    optimizer = flow_matching.make_optimizer(finished.recipe.denoiser, rates)
    ((name, rate),) = rates.items()
    assert rate == finished.text_encoder.config.d_kv**-0.5
    assert optimizer.lr_scale[name] == rate and name in finished._average("denoiser")


def test_the_causal_text_encoder_starts_by_looking_back():
    """The logit that the biases alone make is highest one word back for the first head, two for the second."""
    config = Qwen25VLConfig(
        vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=100.0,
    )  # fmt: skip
    params = {f"text_encoder.blocks.attention.{name}.bias": jnp.zeros((2, 32)) for name in ("q", "k")}
    biases = neighbour_biases(params, config)
    q, k = (biases[f"text_encoder.blocks.attention.{name}.bias"].reshape(2, 1, 2, 16) for name in ("q", "k"))
    angles = np.outer(np.arange(8), 100.0 ** (-np.arange(8) / 8))
    for back in (1, 2):
        q_turned, k_turned = (
            _turn_halves(jnp.broadcast_to(x[1:, :, back - 1, None], (1, 8, 1, 16)), (jnp.cos(angles), jnp.sin(angles)))
            for x in (q, k)
        )
        logits = np.asarray(jnp.einsum("bshd,bthd->st", q_turned, k_turned))[7] / 4
        assert np.argmax(logits) == 7 - back
        assert logits[7 - back] - np.max(np.delete(logits, 7 - back)) > 1.5


def test_unknown_layouts_are_refused():
    component = Component.create(WAN.architectures["text_encoder"], TINY_TEXT, jnp.float32)
    with pytest.raises(CheckpointError, match="no key rule"):
        checkpoint_tensors("text_encoder", component, {"blocks.surprise": jnp.ones((1, 2))}, TRAINEES["wan"])


def test_a_template_has_the_tokens_that_the_model_skips():
    captions = ["a red apple left of a cat", "a cat, flat style, on a blue background"]
    tokenizer = build_tokenizer(map(prompts.qwen_image, captions), 400, 60, CHAT)
    ids = encode(tokenizer, [prompts.qwen_image(text) for text in ("", " ", "A cat")])
    tokens = [tokenizer.id_to_token(index) for index in ids[2]]
    assert tokens[prompts.QWEN_IMAGE_SKIP :][:7] == ["a", "cat", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert tokens[:3] == ["<|im_start|>", "system", "\n"] and np.array_equal(ids[0], ids[1])
    assert (ids[0] != 0).sum() == prompts.QWEN_IMAGE_SKIP + 5


def test_tokenizer_knows_words_and_spells_the_rest():
    captions = ["a dog moving left, red background", "a dog's x-ray", "a Café"]
    tokenizer = build_tokenizer(captions, 300, 12)
    assert tokenizer.encode("A dog's CAFE, x-ray").tokens[:6] == ["a", "dog's", "cafe", ",", "x-ray", "</s>"]
    assert tokenizer.encode("doggy").tokens[:4] == ["dog", "##g", "##y", "</s>"]
    assert tokenizer.encode("\u72d7").tokens[:2] == ["<unk>", "</s>"]
    ids = encode(tokenizer, ["", "a " * 40])
    assert ids.shape == (2, 12) and ids[0].tolist() == [1] + [0] * 11 and ids[1, -1] == 1
    assert build_tokenizer(reversed(captions), 300, 12).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(InvalidConfig, match="vocab_size"):
        build_tokenizer(captions, 20, 12)


def test_roughened_captions_keep_what_they_say():
    captions = ["a red dog moving left on a blue background", ""] * 400
    rough = roughened(captions, random.Random(0))
    changed = [new for old, new in zip(captions, rough, strict=True) if new != old]
    assert 50 <= len(changed) <= 120
    said = ["red", "dog", "moving", "left", "blue"]
    assert all([word for word in new.split() if word in said] == said for new in changed)
    assert any("background" not in new.split() for new in changed) and any(len(new.split()) > 9 for new in changed)


def test_noise_levels_cover_their_distribution():
    sigmas = np.sort(flow_matching.draw_sigmas(jax.random.key(0), 1000, 0.0, 1.0, 3.0))
    assert 0 < sigmas[0] and sigmas[-1] < 1
    np.testing.assert_allclose(sigmas[500], 0.75, atol=0.01)  # shift 3 takes 1/2 to 3/4
    np.testing.assert_allclose(sigmas[159], 0.527, atol=0.01)  # one deviation below


def test_words_that_both_tokenizers_know_keep_their_vectors():
    theirs, ours = (build_tokenizer(words, 300, 8) for words in (["dog cat sun"], ["a cat on the sun"]))
    old = jnp.arange(theirs.get_vocab_size(), dtype=jnp.float32)[:, None]
    fresh = jnp.full((ours.get_vocab_size(), 1), -1.0)
    kept = recipe.kept_words(old, theirs, fresh, ours)
    for word in ("cat", "sun", "a", "</s>"):
        assert kept[ours.token_to_id(word), 0] == theirs.token_to_id(word)
    assert kept[ours.token_to_id("the"), 0] == -1


def test_a_checkpoint_of_other_numbers_is_refused(tmp_path):
    optimizer = Optimizer()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint"):
            checkpoints.average()
        checkpoints.save(optimizer.init({"x.kernel": jnp.ones((2, 3))}), {"spent": 1.5})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.meta() == {"spent": 1.5} and checkpoints.latest == 0
        with pytest.raises(CheckpointError, match="does not fit this recipe"):
            checkpoints.restore(optimizer.init({"x.kernel": jnp.ones((2, 4))}))


def test_a_diverging_run_ends_with_one_error(tmp_path):
    optimizer = Optimizer()
    state = optimizer.init({"x.kernel": jnp.ones((1, 1))})
    stage = loop.StageSettings(batch_size=1, steps_per_call=1, minutes=1, steps=3, learning_rate=1.0)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(SmartdiffError, match="loss=nan at step"):
        loop.run(
            "toy",
            lambda state, rate: (state, jnp.float32(np.nan)),
            state,
            stage,
            Budget(1.0, 3, 0.0, float("inf")),
            checkpoints,
            loop.Log(tmp_path / "log.txt"),
            lambda state: None,
        )


def test_prefetch_hands_over_errors_and_stops():
    def make(index):
        if index == 3:
            raise InvalidConfig("index", index, "too far")
        return index

    with loop.Prefetch(make, start=1) as made:
        assert [made.take(), made.take()] == [1, 2]
        with pytest.raises(InvalidConfig, match="too far"):
            made.take()
    with loop.Prefetch(lambda index: index) as endless:
        assert endless.take() == 0
    assert not endless._thread.is_alive()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("wan", ["denoiser.batch=3"], "batch"),
        ("wan", ["denoiser.minutes"], "section.field=value"),
        ("wan", ["nothing.minutes=3"], "section.field=value"),
        ("wan", ["transformer.text_dim=24"], "text_dim"),
        ("wan", ["denoiser.pool_size=33"], "pool_size"),
        ("wan", ["text_encoder.vocab_size=33"], "vocab_size"),
        ("wan", ["sampling.shift=2.0"], "sampling.shift"),
        ("wan", ["family=flux1"], "qwen-image"),
        ("qwen-image", ["transformer.joint_attention_dim=24"], "joint_attention_dim"),
        ("qwen-image", ["output.num_frames=5"], "num_frames"),
        ("qwen-image", ["text.max_length=34"], "template"),
    ],
)
def test_wrong_recipes_are_one_error(name, overrides, message, tmp_path):
    (tmp_path / "toy.yaml").write_text(TOYS[name])
    with pytest.raises(InvalidConfig, match=message):
        settings.load_recipe(tmp_path / "toy.yaml", overrides)


def test_the_bundled_recipes_are_sound_and_small():
    pocket = settings.load_recipe("pocket-video", ["denoiser.minutes=3"])
    assert pocket.denoiser.minutes == 3 and pocket.output.height >= 96 and pocket.output.num_frames >= 17
    assert pocket.spec(15_400_000).sampling == known_models()["pocket-video"].sampling
    picture = settings.load_recipe("pocket-image")
    assert picture.output.height >= 128 and picture.output.num_frames == 1 and picture.served_as.guidance == "cfg"
    sizes = [
        count(jax.eval_shape(lambda a=architecture, c=config: Component.create(a, c, jnp.float32).init(0)))
        for architecture, config in (
            (picture.served_by.architectures["transformer"], QwenImageConfig(**picture.transformer)),
            (picture.served_by.architectures["text_encoder"], Qwen25VLConfig(**picture.text_encoder, vocab_size=2600)),
        )
    ]
    vae = autoencoder.component(picture.served_by.architectures["vae"], picture.vae, jnp.float32)
    assert sum(sizes) + count(jax.eval_shape(lambda: vae.init(0))) < 15_600_000  # a byte each, and the scales
    with pytest.raises(InvalidConfig, match="recipe"):
        settings.load_recipe("pocket-vidio")
    with pytest.raises(InvalidConfig, match="goes with call_minutes"):
        recipe.main_train(finish=True)
    with pytest.raises(InvalidConfig, match="stage"):
        recipe.main_train(stage="denoise")
