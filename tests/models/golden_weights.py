"""Goldens into modules, by the architecture's own key rules; plain on purpose, apart from the weights package."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

GOLDEN = Path(__file__).parents[1] / "golden"


def relative_error(out, reference) -> float:
    out, reference = np.asarray(out, np.float64), np.asarray(reference, np.float64)
    assert out.shape == reference.shape
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


def match_keys(architecture, keys) -> dict:
    """{checkpoint key: [(rule, layer or None), ...]}, every rule that matches."""
    found = {}
    for key in keys:
        matches = [(rule, re.fullmatch(rule.pattern, key)) for rule in architecture.key_rules]
        found[key] = [(rule, match.groupdict().get("layer")) for rule, match in matches if match]
    return found


def golden_tensor(name, key, shape) -> np.ndarray:
    """The number that tiny.fill gave the reference's parameter."""
    numbers = tiny.tensor(name, key, tuple(shape))
    return np.abs(numbers) if key.endswith("running_var") else numbers


def load_golden(name, architecture):
    """The golden's arrays, its config, and the module holding its weights in float32."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    config = architecture.config.model_validate(json.loads(str(arrays["config"])))
    if "keys" in arrays:
        shapes = json.loads(str(arrays["keys"]))
        weights = {key: golden_tensor(name, key, shape) for key, shape in shapes.items()}
        weights = {key: value for key, value in weights.items() if not re.fullmatch(architecture.ignored_keys, key)}
    else:
        weights = {key.removeprefix("weight/"): value for key, value in arrays.items() if key.startswith("weight/")}
    slices = {}
    for key, [(rule, layer)] in match_keys(architecture, weights).items():
        slices.setdefault(rule.path, {})[int(layer or 0)] = (rule.transform(weights[key].astype(np.float32)), layer)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: architecture.build(config, nnx.Rngs(0))))
    parameters = dict(nnx.to_flat_state(state))
    assert {".".join(map(str, path)) for path in parameters} == set(slices)
    for path, parameter in parameters.items():
        layers = slices[".".join(map(str, path))]
        stacked = layers[0][1] is not None
        tensor = np.stack([layers[i][0] for i in range(len(layers))]) if stacked else layers[0][0]
        assert tensor.shape == parameter.shape, path
        parameters[path] = parameter.replace(jnp.asarray(tensor))
    return arrays, config, nnx.merge(graphdef, nnx.from_flat_state(parameters))


def cast(module, architecture, dtype):
    """The module as a run in `dtype` holds it: all but the parameters that a rule keeps in float32."""
    kept = {rule.path for rule in architecture.key_rules if rule.keep_float32}
    graphdef, state = nnx.split(module)
    parameters = dict(nnx.to_flat_state(state))
    for path, parameter in parameters.items():
        if ".".join(map(str, path)) not in kept:
            parameters[path] = parameter.replace(parameter[...].astype(dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(parameters))
