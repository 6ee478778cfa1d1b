"""Known models whole, with random weights on the device, for benchmarks of what a user waits for: no file is read.

Their tokenizer knows one word. How long an encoder takes does not depend on which tokens it reads.
"""

import dataclasses
from typing import Any

from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.loading import LoadedModel

KL = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
QWEN = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}  # fmt: skip
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "wan": {
        "transformer": {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 128, "text_dim": 32},
        "text_encoder": T5,
        "vae": {"base_dim": 16, "num_res_blocks": 1},
    },
    "flux1": {
        "transformer": {
            "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
        },
        "text_encoder": {
            "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        },
        "text_encoder_2": T5,
        "vae": KL,
    },
    "flux2-klein": {
        "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 48},
        "text_encoder": QWEN | {"head_dim": 8, "num_hidden_layers": 28},
        "vae": KL,
    },
    "qwen-image": {
        "transformer": {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 256},
        "text_encoder": QWEN | {"hidden_size": 256},  # its heads' 128 features are a number of the peer's code
        "vae": {"base_dim": 16, "num_res_blocks": 1},
    },
    "z-image": {
        "transformer": {"dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16},
        "text_encoder": QWEN | {"head_dim": 8, "num_hidden_layers": 3},
        "vae": KL,
    },
}  # fmt: skip
"""By family, what --tiny changes of a model's numbers."""

TEXT_LENGTHS = {"qwen-image": 128, "z-image": 128}
WORD = "word"


def problem(name: str, tiny: bool, steps: int | None = None) -> dict[str, Any]:
    """What is to be run, as a peer is told it too: the components' numbers, the request, and the lengths of the text."""
    from smartdiff_jax.config.model import known_models
    from smartdiff_jax.models.families import FAMILIES

    spec = known_models()[name]
    small = SMALL[spec.family] if tiny else {}
    sampling = spec.sampling.model_dump(mode="json", exclude={"sizes", "negative_prompt"})
    if tiny:
        sampling |= {"width": 96, "height": 64} | ({"num_frames": 5} if spec.task == "t2v" else {})
    sources = FAMILIES[spec.family].text
    length = 32 if tiny else TEXT_LENGTHS.get(spec.family, 512)
    return {
        "name": name,
        "family": spec.family,
        "task": spec.task,
        "components": {part: dict(numbers) | small.get(part, {}) for part, numbers in spec.components.items()},
        "sampling": sampling | ({"num_inference_steps": steps} if steps else {}),
        "branches": 2 if spec.sampling.guidance == "cfg" else 1,
        "text": {source.encoder: min(length + source.skip, source.max_length) for source in sources},
    }


def random_model(task: dict[str, Any], system: SystemConfig, only: tuple[str, ...] = ()) -> LoadedModel:
    """The model of a `problem` with its weights in place. only: components; the others stay shapes."""
    import jax
    from tokenizers import Tokenizer, models, pre_tokenizers

    from smartdiff_jax.engine.compilation import keep_executables
    from smartdiff_jax.engine.loading import _placement, prepare_denoiser, resolve_dtype
    from smartdiff_jax.engine.planning import _shapes, outline
    from smartdiff_jax.kernels.hopper import import_ahead
    from smartdiff_jax.sharding.mesh import make_mesh
    from smartdiff_jax.sharding.workload import mesh_of_numbers
    from smartdiff_jax.weights.fp8 import require_fp8
    from smartdiff_jax.weights.random_init import random_state

    keep_executables(system.cache_dir / "executables")
    mesh, dtype = make_mesh(system.mesh), resolve_dtype(system.dtype)
    import_ahead()
    if system.precision == "fp8":
        require_fp8(dtype)
    model = outline(task["name"], dtype)
    family, parts, configs = model.family, {}, {}
    # The largest first: it is made while there is most room.
    for name in sorted(model.configs, key=lambda name: not name.startswith("transformer")):
        architecture = family.architectures[name]
        configs[name] = architecture.config.model_validate(task["components"].get(name, {}))
        graphdef, weights = _shapes(architecture, configs[name], dtype, mesh_of_numbers(system.mesh))
        if not only or name in only:
            weights = random_state(architecture, configs[name], dtype, 0, _placement(name, mesh, system.mesh))
            if name.startswith("transformer"):
                graphdef, weights = prepare_denoiser(graphdef, weights, family, system, mesh)
            jax.block_until_ready(weights)
        parts[name] = graphdef, weights
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, WORD: 2}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return dataclasses.replace(
        model,
        mesh=mesh,
        configs=configs,
        tokenizers={source.tokenizer: (tokenizer, 0) for source in family.text},
        text_encoders={source.encoder: parts[source.encoder] for source in family.text},
        vae=parts["vae"],
        denoiser_graph=parts["transformer"][0],
        denoisers=[parts[name][1] for name in ("transformer", "transformer_2") if name in parts],
        weights_id="random",
    )


def prompt_of(model: LoadedModel, task: dict[str, Any]) -> str:
    """A prompt that comes to as many tokens, the template's included, as the task says of the text."""
    source = model.family.text[0]
    tokenizer, _ = model.tokenizers[source.tokenizer]
    words = task["text"][source.encoder] - len(tokenizer.encode(source.prompt(WORD)).ids) + 1
    return " ".join([WORD] * words)
