"""Carries out a training recipe: prepare, autoencoder, denoiser, export, evaluate.

    RUN/tokenizer.json                     built once from the captions
    RUN/autoencoder/, RUN/denoiser/        Orbax checkpoints; a stage goes on from its newest
    RUN/latents.json                       mean and deviation of the latents: the autoencoder is done
    RUN/sheets/*.png, log.txt, scores.json, cache/ (compiled code)
    RUN/bundle/, RUN/snapshot/             the model in the recipe's bits, and in bfloat16 to start a run from (`init_from`)
    RUN/NAME.yaml                          what `config/models` says of it, once it is bundled

A run may be cut into several calls (`call_minutes`): each goes on where the last one stopped. With `finish`, a call ends the
schedule of the denoiser when its own time ends. Every report of the denoiser writes the bundle as it then is: a run that is cut
short leaves a model.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from tokenizers import Tokenizer

from smartdiff_jax.errors import InvalidConfig
from smartdiff_jax.models.patches import Patches
from smartdiff_jax.training import autoencoder, flow_matching
from smartdiff_jax.training.autoencoder import Codec, Statistics, psnr
from smartdiff_jax.training.card import model_card
from smartdiff_jax.training.checkpoints import Checkpoints
from smartdiff_jax.training.data import atlas as atlas_file
from smartdiff_jax.training.data import prepare
from smartdiff_jax.training.data.captions import Captioner
from smartdiff_jax.training.data.pictures import PictureCaptioner
from smartdiff_jax.training.data.scenes import Scene, pack
from smartdiff_jax.training.devices import Devices
from smartdiff_jax.training.evaluate import Prompts, Scorer, evaluate, scoring_prompts
from smartdiff_jax.training.export import BFLOAT16, export, restore
from smartdiff_jax.training.loop import Log, Prefetch, StageSettings, run
from smartdiff_jax.training.pool import Filler, Pool, part_maker, scene_batches
from smartdiff_jax.training.sampling import Generator, sheet
from smartdiff_jax.training.settings import Recipe, load_recipe
from smartdiff_jax.training.state import Budget, Component, Optimizer, Params, TrainState, count
from smartdiff_jax.training.tokenizer import build_tokenizer, encode
from smartdiff_jax.training.trainees.base import EMBEDDING, TEXT_ENCODER, TRANSFORMER
from smartdiff_jax.training.worlds import World, captioner_of

STAGES = ("prepare", "autoencoder", "denoiser", "export", "evaluate", "all")
AFTERWARDS_SECONDS = 75.0  # of a call's time, kept for export and evaluation
SHEET_CLIPS = 24


class Run:
    """One training: a recipe, its data, its run directory. Every method carries out a stage, as far as the call's time allows.

    deadline: time.monotonic() when the process must be done. finish: end the denoiser's schedule there.
    """

    def __init__(
        self,
        recipe: Recipe,
        atlas: Path,
        run_dir: Path,
        out: Path | None = None,
        init_from: Path | None = None,
        deadline: float = float("inf"),
        finish: bool = False,
    ):
        self.recipe, self.folder, self.out = recipe, run_dir, out or run_dir / "bundle"
        self._atlas_file, self._init_from = atlas, init_from
        self._deadline, self._finish = deadline, finish
        self.log = Log(run_dir / "log.txt")
        on_gpu = jax.default_backend() == "gpu"
        self.dtype = jnp.dtype(("bfloat16" if on_gpu else "float32") if recipe.dtype == "auto" else recipe.dtype)
        device, seen = jax.devices()[0], len(jax.devices())
        self.devices = Devices.of(recipe.autoencoder.batch_size, recipe.denoiser.batch_size)
        self.log(
            f"{recipe.name}: {device.platform} {device.device_kind}, {self.devices.count} of {seen}, {self.dtype.name}, "
            f"run directory {run_dir}"
        )

    # What the stages share, made when first asked for.

    @cached_property
    def captioner(self) -> Captioner | PictureCaptioner:
        if not self._atlas_file.is_file():
            raise InvalidConfig("atlas", str(self._atlas_file), "no such file; `--stage prepare` makes it")
        return captioner_of(self.recipe.served_by.task, atlas_file.load(self._atlas_file))

    @cached_property
    def world(self) -> World:
        return World.of(self.recipe.served_by.task, self.captioner, self.recipe.output.num_frames)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        file, text = self.folder / "tokenizer.json", self.recipe.text
        if not file.is_file():
            rng = np.random.default_rng(self.recipe.seed)
            choice: Any = self.captioner.choose(text.captions, rng)
            captions = map(self.recipe.trainee.text, self.captioner.captions(choice, rng))
            words = [*captions, *self.captioner.vocabulary()]
            tokenizer = build_tokenizer(words, text.vocab_size, text.max_length, self.recipe.trainee.tokenizer)
            tokenizer.save(str(file))
        return Tokenizer.from_file(str(file))

    def tokenize(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids int32 [n, l] of captions in the family's template."""
        return encode(self.tokenizer, list(map(self.recipe.trainee.text, captions)))

    @cached_property
    def bank(self) -> jax.Array:
        return self.devices.replicate(pack(self.captioner.atlas.bank()))

    def _component(self, name: str, numbers: dict[str, Any]) -> Component:
        architecture = self.recipe.served_by.architectures[name]
        return Component.create(architecture, architecture.config.model_validate(numbers), self.dtype)

    @cached_property
    def vae(self) -> Component:
        return autoencoder.component(self.recipe.served_by.architectures["vae"], self.recipe.vae, self.dtype)

    @cached_property
    def transformer(self) -> Component:
        return self._component("transformer", self.recipe.transformer)

    @cached_property
    def text_encoder(self) -> Component:
        numbers = self.recipe.text_encoder | {"vocab_size": self.tokenizer.get_vocab_size()}
        return self._component("text_encoder", numbers)

    @cached_property
    def codec(self) -> Codec:
        return Codec(self.vae, self._size, self.recipe.autoencoder.batch_size, self.devices)

    @cached_property
    def generator(self) -> Generator:
        recipe = self.recipe
        return Generator(
            recipe.served_by, self.transformer, self.text_encoder, self.latent_shape, recipe.text.max_length,
            recipe.served_as, recipe.denoiser.attention,
        )  # fmt: skip

    @property
    def _size(self) -> tuple[int, int]:
        return self.recipe.output.height, self.recipe.output.width

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(c, f, h, w)."""
        output, vae = self.recipe.output, self.vae.config
        frames = 1 + (output.num_frames - 1) // max(1, vae.temporal_stride)
        return vae.z_dim, frames, output.height // vae.spatial_stride, output.width // vae.spatial_stride

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (frames, rows, columns)."""
        return self._patches.grid((1, *self.latent_shape))

    @property
    def _patches(self) -> Patches:
        return self.recipe.served_by.patches(self.transformer.config)

    # Stages.

    def prepare(self) -> None:
        """The atlas, if it is not there yet, and the tokenizer."""
        if not self._atlas_file.is_file():
            self.log(f"fetching the pinned packages and building {self._atlas_file}")
            settings = self.recipe.atlas
            prepare(self._atlas_file.parent / "packages", self._atlas_file, settings.side, settings.animated)
        atlas = self.captioner.atlas
        self.log(f"atlas: {len(atlas.names)} subjects, {len(atlas.sprites)} sprites, {len(atlas.clips)} animated")
        self.log(f"tokenizer: {self.tokenizer.get_vocab_size()} tokens")

    def autoencoder(self) -> bool:
        """Train the autoencoder and measure its latents; whether it is done."""
        if (self.folder / "latents.json").is_file():
            return True
        settings, seed = self.recipe.autoencoder, self.recipe.seed
        optimizer = Optimizer(settings.weight_decay, settings.gamma)
        if self._init_from is not None:
            config, params = restore(self._init_from, "vae", self.vae.architecture)
            with self._checkpoints("autoencoder") as checkpoints:
                checkpoints.save(optimizer.init(params), {"spent": 0.0})
            self._write_statistics(Statistics(config.latents_mean, config.latents_std))
            return True
        compiled = autoencoder.make_call(self.vae, settings, optimizer, self._size, seed, self.devices)

        def scenes(index: int) -> Scene:
            rng = np.random.default_rng([seed, 1, index])
            return scene_batches(self.world, settings.steps_per_call, settings.batch_size, rng)[1]

        with self._checkpoints("autoencoder") as checkpoints:
            state, budget = self._start(checkpoints, settings, optimizer, self._first_vae)
            self.log(f"autoencoder: {count(state.params) / 1e6:.2f} M parameters")
            with Prefetch(scenes, int(state.step) // settings.steps_per_call) as batches:
                state, over = run(
                    "autoencoder",
                    lambda state, rate: compiled(state, np.float32(rate), self.bank, batches.take()),
                    state, settings, budget, checkpoints, self.log, self._report_autoencoder,
                )  # fmt: skip
        if over:
            self._write_statistics(Statistics.of(self._encoded(state.average)))
        return over

    def _report_autoencoder(self, state: TrainState) -> None:
        neutral, count = Statistics.neutral(self.vae.config.z_dim), self.recipe.scoring.prompts
        choice, scenes = self._unseen()
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], scenes)
        true = np.asarray(self.codec.render(self.bank, flat))
        latents = jnp.asarray(self._encoded(state.average)[: len(true)])
        restored = np.asarray(self.codec.decode(state.average, latents, neutral))
        quality = psnr(true, restored)
        self.log(f"autoencoder: step {int(state.step)}, PSNR {quality:.2f} dB on {len(true)} unseen scenes")
        pairs = np.stack([true, restored], 1)[:8].reshape(-1, *true.shape[1:])
        labels = ["original", "restored"] * (len(pairs) // 2)
        sheet(pairs, labels, self.folder / "sheets" / f"autoencoder-{int(state.step):06d}.png")
        self._note_scores({"autoencoder_psnr": round(quality, 2)})
        asked = [("", shown) for shown in self.captioner.attributes(choice)[: len(true)]]
        with Scorer(self.world) as scorer:
            # What the denoiser could reach at best: the checkers on real scenes that only went through the autoencoder.
            scorer.submit(restored, asked, lambda scores: self.log(f"autoencoder: restored scenes {scores}"))

    def _unseen(self) -> tuple[Any, Scene]:
        """One part of scenes and what they show, the same in every run, from numbers that training does not draw."""
        settings = self.recipe.denoiser.part_calls, self.recipe.autoencoder.batch_size
        rng = np.random.default_rng([self.recipe.seed, 0])
        return scene_batches(self.world, *settings, rng)

    def _encoded(self, params: Params) -> np.ndarray:
        """Latents float32 [n, c, f, h, w] of the unseen scenes, as they are."""
        neutral = Statistics.neutral(self.vae.config.z_dim)
        latents = self.codec.encode(self.devices.replicate(params), self.bank, self._unseen()[1], neutral)
        return np.asarray(latents, np.float32).reshape(-1, *latents.shape[2:])

    def denoiser(self) -> bool:
        """Train transformer and text encoder; whether they are done."""
        recipe, settings, family = self.recipe, self.recipe.denoiser, self.recipe.served_by
        statistics, vae_params = self._statistics(), self._average("autoencoder")
        source = family.text[0]
        ropes = family.rope(self.transformer.config, self.grid, recipe.text.max_length - source.skip, 0)
        optimizer = flow_matching.make_optimizer(settings, recipe.trainee.rates(self.text_encoder.config))
        compiled = flow_matching.make_call(
            self.transformer, self.text_encoder, source, settings, optimizer, ropes, recipe.seed, self.devices
        )  # fmt: skip
        packed, encoder = jax.jit(jax.vmap(self._patches.pack)), self.devices.replicate(vae_params)
        batch = recipe.autoencoder.batch_size
        prompts = scoring_prompts(self.world, recipe.scoring.prompts)

        def encode_scenes(scenes: Scene) -> jax.Array:
            return packed(self.codec.encode(encoder, self.bank, scenes, statistics))

        with self._checkpoints("denoiser") as checkpoints, Scorer(self.world) as scorer:
            state, budget = self._start(checkpoints, settings, optimizer, self._first_weights, self._finish)
            if budget.fraction(int(state.step)) >= 1:
                return True
            self.log(f"denoiser: {count(state.params) / 1e6:.2f} M parameters, {self._numbers_of_work()}")
            make = part_maker(
                self.world, self.tokenize, settings.part_calls, batch, settings.variants,
                seed=(recipe.seed, 2, int(state.step)),
            )  # fmt: skip
            tokens = int(np.prod(self.grid)), self.latent_shape[0] * int(np.prod(self._patches.size))
            pool = Pool.empty(settings.pool_size, tokens, settings.variants, recipe.text.max_length, self.devices)
            with Prefetch(make) as parts:
                filler = Filler(
                    pool, encode_scenes, parts, settings.fill_share, settings.refresh_share, self.devices
                )  # fmt: skip
                filler.prefill(settings.pool_size // 8)
                pace = settings.part_calls * batch / filler.part_seconds
                self.log(f"denoiser: {filler.filled} scenes encoded, {pace:.0f} scenes/s")

                def call(state: TrainState, rate: float) -> tuple[TrainState, jax.Array]:
                    filler.keep_up()
                    return compiled(state, np.float32(rate), filler.pool, np.int32(filler.filled_each))

                def report(state: TrainState) -> None:
                    step = int(state.step)
                    clips = self.generate(state.average, vae_params, statistics, [text for text, _ in prompts])
                    self._sheet(f"denoiser-{step:06d}", clips, prompts, 8)
                    scorer.submit(clips, prompts, lambda scores: self.log(f"denoiser: step {step}, {scores}"))
                    self._write(self.out, state.average, vae_params, recipe.bits)

                _, over = run("denoiser", call, state, settings, budget, checkpoints, self.log, report)
                self.log(f"denoiser: {filler.filled} scenes in the pool, {filler.encoded} encoded in all")
        return over

    def export(self) -> None:
        """Write the bundle (in the recipe's bits) and the snapshot (bfloat16) from the newest averages."""
        recipe, params, vae_params = self.recipe, self._average("denoiser"), self._average("autoencoder")
        for folder, bits in ((self.out, recipe.bits), (self.folder / "snapshot", BFLOAT16)):
            numbers = self._write(folder, params, vae_params, bits)
        self.log(f"export: parameters {numbers}")
        spec = recipe.spec(sum(numbers.values())).model_dump(mode="json", exclude_defaults=True)
        file = self.folder / f"{recipe.name}.yaml"
        file.write_text(yaml.safe_dump(spec, sort_keys=False, width=128, default_flow_style=False))
        self.log(f"export: {file}")

    def _write(self, folder: Path, params: Params, vae_params: Params, bits: int) -> dict[str, int]:
        """Write one folder of the model; returns how many parameters its components have."""
        recipe, statistics = self.recipe, self._statistics()
        numbers = recipe.vae | {"latents_mean": statistics.mean, "latents_std": statistics.std}
        trained = {
            "vae": (self._component("vae", numbers), vae_params),
            "transformer": (self.transformer, flow_matching.part_of(params, TRANSFORMER)),
            "text_encoder": (self.text_encoder, flow_matching.part_of(params, TEXT_ENCODER)),
        }
        parameters = {name: count(part) for name, (_, part) in trained.items()}
        self._note_scores({"parameters": parameters, "subjects": len(self.captioner.atlas.names)})
        size = export(
            folder, recipe.served_by, trained, self.tokenizer, recipe.text.max_length,
            recipe.denoiser.shift, self._card(), bits,
        )  # fmt: skip
        self.log(f"export: {folder}, {size / 1e6:.2f} MB of weights in {bits} bits")
        return parameters

    def evaluate(self) -> None:
        """Score the exported bundle, as it will be loaded, and write the scores into its card."""
        architectures = self.recipe.served_by.architectures
        config, vae_params = restore(self.out, "vae", architectures["vae"])
        params: Params = {}
        for name, prefix in (("transformer", TRANSFORMER), ("text_encoder", TEXT_ENCODER)):
            part = restore(self.out, name, architectures[name])[1]
            params |= {prefix + path: value for path, value in part.items()}
        statistics = Statistics(config.latents_mean, config.latents_std)

        def generate(texts: Sequence[str]) -> np.ndarray:
            clips = self.generate(params, vae_params, statistics, texts)
            made.append(clips)
            return clips

        made: list[np.ndarray] = []
        with Scorer(self.world) as scorer:
            scores = evaluate(generate, self.world, scorer, self.recipe.scoring.prompts)
        for name, held_out, clips in zip(("trained", "held_out"), (False, True), made, strict=True):
            prompts = scoring_prompts(self.world, self.recipe.scoring.prompts, held_out)
            self._sheet(f"final-{name}", clips, prompts, SHEET_CLIPS)
            self.log(f"evaluate: {name} {scores[name]}")
        self._note_scores(scores)
        (self.out / "README.md").write_text(self._card())

    def generate(self, params: Params, vae_params: Params, statistics: Statistics, texts: Sequence[str]) -> np.ndarray:
        """Frames uint8 [n, f, h, w, 3] of the prompts."""
        latents = self.generator(
            params, self.tokenize(texts), self.tokenize([""]), self.recipe.seed, self.recipe.scoring.num_inference_steps
        )  # fmt: skip
        return np.asarray(self.codec.decode(vae_params, latents, statistics))

    # Small change.

    def _checkpoints(self, stage: str) -> Checkpoints:
        return Checkpoints(self.folder / stage)

    def _start(
        self,
        checkpoints: Checkpoints,
        settings: StageSettings,
        optimizer: Optimizer,
        init: Callable[[], Params],
        finish: bool = False,
    ) -> tuple[TrainState, Budget]:
        """A stage's state, new or from its newest checkpoint, and what is left of its budget."""
        meta = checkpoints.meta()
        if meta is None:
            state, spent = optimizer.init(init()), 0.0
        else:
            state, spent = checkpoints.restore(jax.eval_shape(lambda: optimizer.init(init()))), meta["spent"]
            self.log(f"going on from step {int(state.step)}, {spent:.0f} s")
        state = self.devices.replicate(state)
        deadline = self._deadline - AFTERWARDS_SECONDS
        return state, Budget(settings.minutes, settings.steps, spent, deadline, finish)

    def _first_vae(self) -> Params:
        return autoencoder.init(self.vae, self.recipe.output.num_frames, self.recipe.seed)

    def _first_weights(self) -> Params:
        if self._init_from is None:
            return flow_matching.init(self.transformer, self.text_encoder, self.recipe.trainee, self.recipe.seed)
        params: Params = {}
        for component, prefix, name in (
            (self.transformer, TRANSFORMER, "transformer"), (self.text_encoder, TEXT_ENCODER, "text_encoder")
        ):  # fmt: skip
            config, part = restore(self._init_from, name, component.architecture)
            # As it would be read back: fields that are of no effect are written as upstream has them.
            ours = type(config).model_validate(self.recipe.trainee.config_fields(name, component.config))
            if config.model_copy(update=_vocabulary(ours)) != ours:
                raise InvalidConfig("init_from", str(self._init_from), f"its {name} is not the recipe's: {config}")
            params |= {prefix + path: value for path, value in part.items()}
        fresh = self.text_encoder.init(self.recipe.seed + 1)[EMBEDDING.removeprefix(TEXT_ENCODER)]
        known = Tokenizer.from_file(str(self._init_from / "tokenizer" / "tokenizer.json"))
        params[EMBEDDING] = kept_words(params[EMBEDDING], known, fresh, self.tokenizer)
        return params

    def _average(self, stage: str) -> Params:
        """The averaged weights of a stage's newest checkpoint."""
        with self._checkpoints(stage) as checkpoints:
            return checkpoints.average()

    def _statistics(self) -> Statistics:
        file = self.folder / "latents.json"
        if not file.is_file():
            raise InvalidConfig("stage", "denoiser", f"{file} is missing: finish `--stage autoencoder` first")
        numbers = json.loads(file.read_text())
        return Statistics(tuple(numbers["mean"]), tuple(numbers["std"]))

    def _write_statistics(self, statistics: Statistics) -> None:
        numbers = {"mean": statistics.mean, "std": statistics.std}
        (self.folder / "latents.json").write_text(json.dumps(numbers) + "\n")
        self.log(f"latents: {numbers}")

    def _sheet(self, name: str, clips: np.ndarray, prompts: Prompts, n: int) -> None:
        sheet(clips[:n], [text for text, _ in prompts[:n]], self.folder / "sheets" / f"{name}.png")

    def _scores(self) -> dict[str, Any]:
        file = self.folder / "scores.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _note_scores(self, scores: dict[str, Any]) -> None:
        (self.folder / "scores.json").write_text(json.dumps(self._scores() | scores, indent=1) + "\n")

    def _card(self) -> str:
        return model_card(self.recipe, self._scores())

    def _numbers_of_work(self) -> str:
        tokens, text = int(np.prod(self.grid)), self.recipe.text.max_length - self.recipe.served_by.text[0].skip
        forward = self.recipe.trainee.forward_flops(self.transformer.config, tokens, text)
        return f"{tokens} tokens a sample, {3 * self.recipe.denoiser.batch_size * forward / 1e12:.2f} TFLOP a step"


def _vocabulary(config: Any) -> dict[str, Any]:
    return {"vocab_size": config.vocab_size} if hasattr(config, "vocab_size") else {}


def kept_words(vectors: jax.Array, theirs: Tokenizer, fresh: jax.Array, ours: Tokenizer) -> jax.Array:
    """The vectors of our tokens: theirs where both tokenizers know it, fresh ones else."""
    table, old, known = np.array(fresh), np.asarray(vectors), theirs.get_vocab()
    for token, row in ours.get_vocab().items():
        if token in known:
            table[row] = old[known[token]]
    return jnp.asarray(table)


def main_train(
    recipe: str | Path = "pocket-video",
    stage: str = "all",
    atlas: Path | None = None,
    run_dir: Path | None = None,
    out: Path | None = None,
    init_from: Path | None = None,
    call_minutes: float | None = None,
    finish: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Carry out one stage of a recipe, or all of them, as far as `call_minutes` allow.

    recipe: a name in `training/recipes`, or a YAML file. atlas: data/FILE, as the recipe names it, if not given.
    overrides: "section.field=value". Other arguments: see `Run`.
    Raises SmartdiffError for a wrong recipe, a missing stage or a run that diverged.
    """
    began = time.monotonic()
    if stage not in STAGES:
        raise InvalidConfig("stage", stage, f"choose one of {', '.join(STAGES)}")
    if finish and call_minutes is None:
        raise InvalidConfig("finish", True, "goes with call_minutes")
    settings = load_recipe(recipe, overrides)
    folder = run_dir or Path("runs") / settings.name
    if jax.default_backend() == "gpu":  # where compiling takes minutes, and a run is cut into several calls
        jax.config.update("jax_compilation_cache_dir", str((folder / "cache").absolute()))
    deadline = float("inf") if call_minutes is None else began + 60 * call_minutes
    training = Run(settings, atlas or Path("data") / settings.atlas.file, folder, out, init_from, deadline, finish)
    if stage != "all":
        getattr(training, stage)()
        return
    training.prepare()
    if training.autoencoder() and training.denoiser():
        training.export()
        training.evaluate()
