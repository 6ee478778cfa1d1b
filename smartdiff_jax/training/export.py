"""Writes a trained model as a folder in diffusers layout, under the key names of diffusers and transformers.

The key rules of an architecture lead from checkpoint to parameter; here they are walked backwards. A key follows from its
rule's pattern; the layout is undone by a small table, and every tensor is put through its own rule again before it is
written: what the loader would make of it must be the parameter, to the bit.

The bundled model is stored in 8 bits (`weights.quantized`), a snapshot to train on from in bfloat16.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from tokenizers import Tokenizer

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.models.families import Family
from smartdiff_jax.models.family import Architecture, KeyRule
from smartdiff_jax.training.state import Component, Params, flatten
from smartdiff_jax.training.tokenizer import tokenizer_config
from smartdiff_jax.weights import quantized
from smartdiff_jax.weights.folder import open_folder
from smartdiff_jax.weights.stream import load
from smartdiff_jax.weights.tensor_file import write

Storage = Literal["int8", "bfloat16"]
DIFFUSERS_VERSION = "0.35.0"  # the first with everything the configs name
CLASSES = {
    "transformer": ("diffusers", "WanTransformer3DModel", "diffusion_pytorch_model"),
    "vae": ("diffusers", "AutoencoderKLWan", "diffusion_pytorch_model"),
    "text_encoder": ("transformers", "UMT5EncoderModel", "model"),
}


def checkpoint_tensors(name: str, component: Component, params: Params) -> dict[str, np.ndarray]:
    """The parameters of a component by checkpoint key, in the checkpoint's layout, float32; stacked ones layer by layer.

    Raises CheckpointError for a parameter that no key rule leads to, or whose layout this module does not know.
    """
    layout = LAYOUTS[name](component.config)
    tensors = {}
    for path, value in params.items():
        parameter = np.asarray(value, np.float32)
        rule, template = _rule_for(component.architecture, path)
        layers = range(len(parameter)) if "{layer}" in template else [None]
        for layer in layers:
            ours = parameter if layer is None else parameter[layer]
            theirs = np.ascontiguousarray(layout(path, ours))
            if not np.array_equal(rule.transform(theirs), ours):
                raise CheckpointError(f"{name}: the layout of {path} is not known backwards; extend LAYOUTS in export.py")
            tensors[template.format(layer=layer)] = theirs
    return tensors


def _rule_for(architecture: Architecture, path: str) -> tuple[KeyRule, str]:
    """The rule that fills a parameter, and the checkpoint's key for it, with {layer} where the layer's number goes."""
    for rule in architecture.key_rules:
        parts = re.split(r"\\g<(\w+)>", rule.path)  # text, name of a group, text, ...
        pattern = "".join(f"(?P<{part}>.+)" if n % 2 else re.escape(part) for n, part in enumerate(parts))
        caught = re.fullmatch(pattern, path)
        if caught is None:
            continue
        key = _key_of(rule.pattern, caught.groupdict() | {"layer": "{layer}"})
        probe = key.format(layer=0)
        matches = ((r, re.fullmatch(r.pattern, probe)) for r in architecture.key_rules)
        first, match = next(((r, m) for r, m in matches if m), (None, None))
        if first is rule and match and match.expand(rule.path) == path:
            return rule, key
    raise CheckpointError(f"no key rule leads to the parameter {path}")


def _key_of(pattern: str, groups: Mapping[str, str]) -> str:
    """A key that a pattern of key rules matches: named groups as given, of other alternatives the first."""
    key = ""
    while pattern:
        if pattern.startswith("("):
            end = _closing(pattern)
            named = re.match(r"\(\?P<(\w+)>", pattern)
            key += groups[named[1]] if named else pattern[1:end].removeprefix("?:").split("|")[0]
            pattern = pattern[end + 1 :]
        else:
            key, pattern = key + pattern[0], pattern[1:]
    return key.replace("\\.", ".")


def _closing(text: str) -> int:
    depth = 0
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced pattern {text!r}")


def _transformer_layout(config: Any) -> Callable[[str, np.ndarray], np.ndarray]:
    def layout(path: str, x: np.ndarray) -> np.ndarray:
        if path == "patch_embedding.kernel":
            return x.reshape(*config.patch_size, config.in_channels, -1).transpose(4, 3, 0, 1, 2)
        if path.endswith("scale_shift_table"):
            return x[None]
        return x.T if path.endswith(".kernel") else x

    return layout


def _vae_layout(config: Any) -> Callable[[str, np.ndarray], np.ndarray]:
    def layout(path: str, x: np.ndarray) -> np.ndarray:
        if path.endswith(".gamma"):
            return x.reshape(-1, 1, 1) if ".attentions." in path else x.reshape(-1, 1, 1, 1)
        if path.endswith(".kernel"):
            # 5: [h w t i o] to [o i t h w]; 4: [h w i o] to [o i h w]; 2: a 1x1 convolution
            orders = {5: (4, 3, 2, 0, 1), 4: (3, 2, 0, 1), 2: (1, 0)}
            turned = x.transpose(orders[x.ndim])
            return turned[:, :, None, None] if x.ndim == 2 else turned
        return x

    return layout


def _text_encoder_layout(config: Any) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda path, x: x.T if path.endswith(".kernel") else x


LAYOUTS: dict[str, Callable[[Any], Callable[[str, np.ndarray], np.ndarray]]] = {
    "transformer": _transformer_layout,
    "vae": _vae_layout,
    "text_encoder": _text_encoder_layout,
}


def export(
    folder: Path,
    family: Family,
    trained: Mapping[str, tuple[Component, Params]],
    tokenizer: Tokenizer,
    text_length: int,
    shift: float,
    card: str,
    storage: Storage = "int8",
) -> int:
    """Write the whole folder; returns the bytes of its weights. Files of the same names are replaced.

    trained: "transformer", "text_encoder" and "vae". shift: the default of sampling. card: text of README.md.
    """
    for name, (component, params) in trained.items():
        library, class_name, stem = CLASSES[name]
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        _write_json(target / "config.json", _config(name, class_name, component.config))
        tensors = checkpoint_tensors(name, component, params)
        file = target / f"{stem}.safetensors"
        if storage == "int8":
            quantized.save(file, tensors)
        else:
            write(file, {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in tensors.items()})
    _write_tokenizer(folder / "tokenizer", tokenizer, text_length)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(shift))
    index = {name: list(CLASSES[name][:2]) for name in trained}
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    about = {"_class_name": family.pipeline_class, "_diffusers_version": DIFFUSERS_VERSION}
    _write_json(folder / "model_index.json", about | dict(sorted(index.items())))
    (folder / "README.md").write_text(card)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def restore(folder: Path, name: str, architecture: Architecture) -> tuple[Any, Params]:
    """The config and the float32 parameters of one component of such a folder (8-bit or not)."""
    component = open_folder(folder).require(name)
    config = architecture.config.model_validate(component.config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = load(architecture, config, component.tensors(), np.float32, lambda path, shape: device)
    return config, flatten(state)


def _config(name: str, class_name: str, config: Any) -> dict[str, Any]:
    fields = config.model_dump(mode="json")
    if name == "text_encoder":
        special = {"pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0, "tie_word_embeddings": True}
        return {"architectures": [class_name], **fields, **special}
    if name == "vae":
        del fields["clip_output"]  # ours alone; the default is the exported model's
        fields |= {"scale_factor_temporal": config.temporal_stride, "scale_factor_spatial": config.spatial_stride}
    return {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION, **fields}


def _scheduler(shift: float) -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "solver_order": 2,
        "solver_type": "bh2",
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, text_length: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(text_length))


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
