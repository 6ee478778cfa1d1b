"""Writes a trained model as a folder in diffusers layout, under the key names of diffusers and transformers.

The key rules of an architecture lead from checkpoint to parameter; here they are walked backwards. A key follows from its
rule's pattern; the layout is undone by the family's `Trainee`, and every tensor is put through its own rule again before it is
written: what the loader would make of it must be the parameter, to the bit.

The bundled model is stored in few bits (`weights.quantized`), a snapshot to train on from in bfloat16.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from tokenizers import Tokenizer

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.models.families import Family
from smartdiff_jax.models.family import Architecture, KeyRule
from smartdiff_jax.training.state import Component, Params, flatten
from smartdiff_jax.training.tokenizer import tokenizer_config
from smartdiff_jax.training.trainees import TRAINEES
from smartdiff_jax.training.trainees.base import Trainee
from smartdiff_jax.weights import quantized
from smartdiff_jax.weights.folder import open_folder
from smartdiff_jax.weights.stream import load
from smartdiff_jax.weights.tensor_file import write

BFLOAT16 = 16
"""Bits of a snapshot."""
DIFFUSERS_VERSION = "0.35.0"  # the first with everything the configs name


def checkpoint_tensors(name: str, component: Component, params: Params, trainee: Trainee) -> dict[str, np.ndarray]:
    """The parameters of a component by checkpoint key, in the checkpoint's layout, float32; stacked ones layer by layer.

    Raises CheckpointError for a parameter that no key rule leads to, or whose layout this module does not know.
    """
    layout = trainee.layouts[name](component.config)
    tensors = {}
    for path, value in params.items():
        parameter = np.asarray(value, np.float32)
        rule, template = rule_for(component.architecture, path)
        layers = range(len(parameter)) if "{layer}" in template else [None]
        for layer in layers:
            ours = parameter if layer is None else parameter[layer]
            theirs = np.ascontiguousarray(layout(path, ours))
            if not np.array_equal(rule.transform(theirs), ours):
                raise CheckpointError(f"{name}: the layout of {path} is not known backwards; extend the layouts of its trainee")
            tensors[template.format(layer=layer)] = theirs
    return tensors


def rule_for(architecture: Architecture, path: str) -> tuple[KeyRule, str]:
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
    """A key that a pattern of key rules matches: named groups as given, of others the first alternative, even if optional."""
    key = ""
    while pattern:
        if pattern.startswith("("):
            end = _closing(pattern)
            named = re.match(r"\(\?P<(\w+)>", pattern)
            key += groups[named[1]] if named else pattern[1:end].removeprefix("?:").split("|")[0]
            pattern = pattern[end + 1 :].removeprefix("?")
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


def export(
    folder: Path,
    family: Family,
    trained: Mapping[str, tuple[Component, Params]],
    tokenizer: Tokenizer,
    text_length: int,
    shift: float,
    card: str,
    bits: int,
) -> int:
    """Write the whole folder; returns the bytes of its weights. Files of the same names are replaced.

    trained: "transformer", "text_encoder" and "vae". shift: the default of sampling. card: text of README.md. bits: a number.
    """
    trainee = TRAINEES[family.name]
    for name, (component, params) in trained.items():
        library, class_name, stem = trainee.classes[name]
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        about = {"architectures": [class_name]} if library == "transformers" else _about(class_name)
        _write_json(target / "config.json", about | trainee.config_fields(name, component.config))
        tensors = checkpoint_tensors(name, component, params, trainee)
        file = target / f"{stem}.safetensors"
        if bits < BFLOAT16:
            quantized.save(file, tensors, bits)
        else:
            write(file, {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in tensors.items()})
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    _write_json(folder / "tokenizer" / "tokenizer_config.json", tokenizer_config(text_length, trainee.tokenizer))
    scheduler = trainee.scheduler(shift)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", _about(scheduler["_class_name"]) | scheduler)
    index = {name: list(trainee.classes[name][:2]) for name in trained}
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(folder / "model_index.json", _about(family.pipeline_class) | dict(sorted(index.items())))
    (folder / "README.md").write_text(card)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def restore(folder: Path, name: str, architecture: Architecture) -> tuple[Any, Params]:
    """The config and the float32 parameters of one component of such a folder, in any number of bits."""
    component = open_folder(folder).require(name)
    config = architecture.config.model_validate(component.config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = load(architecture, config, component.tensors(), np.float32, lambda path, shape: device)
    return config, flatten(state)


def _about(class_name: str) -> dict[str, Any]:
    return {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
