import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fake_model import ARCHITECTURE, Config, checkpoint
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.random_init import random_state
from smartdiff_jax.weights.stream import abstract, check, dotted, load
from smartdiff_jax.weights.tensor_file import ArrayTensor, read_header, write


def on_one_device(path, shape):
    return SingleDeviceSharding(jax.devices()[0])


def in_memory(flat):
    return {key: ArrayTensor(array) for key, array in flat.items()}


def flat_of(state):
    return {dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def expected_of(flat, num_layers=3):
    return {
        "embedding": flat["shared.weight"],
        "blocks.kernel": np.stack([flat[f"blocks.{i}.linear.weight"].T for i in range(num_layers)]),
        "blocks.scale": np.stack([flat[f"blocks.{i}.norm.weight"] for i in range(num_layers)]),
        **{f"stages.{i}.kernel": flat[f"stages.{i}.weight"].T for i in range(2)},
        **{f"stages.{i}.bias": flat[f"stages.{i}.bias"] for i in range(2)},
        "steps": flat["steps"],
    }


def test_every_leaf_is_filled_from_its_tensors(tmp_path):
    flat = checkpoint()
    write(tmp_path / "x.safetensors", flat)
    state = load(ARCHITECTURE, Config(), read_header(tmp_path / "x.safetensors")[0], jnp.float32, on_one_device)
    loaded, expected = flat_of(state), expected_of(flat)
    assert loaded.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(loaded[path], array, err_msg=path)


def test_the_state_goes_back_into_the_module():
    graphdef, _ = abstract(ARCHITECTURE, Config(), jnp.float32, on_one_device)
    flat = checkpoint()
    module = nnx.merge(graphdef, load(ARCHITECTURE, Config(), in_memory(flat), jnp.float32, on_one_device))
    np.testing.assert_array_equal(module.stages[1].kernel[...], flat["stages.1.weight"].T)


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_policy(source, dtype):
    flat = checkpoint(dtype=source)
    loaded = flat_of(load(ARCHITECTURE, Config(), in_memory(flat), dtype, on_one_device))
    kept = {"blocks.scale", "stages.0.bias", "stages.1.bias"}
    for path, array in expected_of(flat).items():
        wanted = jnp.int32 if path == "steps" else jnp.float32 if path in kept else dtype
        assert loaded[path].dtype == wanted, path
        np.testing.assert_array_equal(np.asarray(loaded[path]), array.astype(wanted), err_msg=path)


@pytest.mark.parametrize("spec", [P("layers", None, "model"), P(None, "model"), P(None, ("layers", "model"), None), P()])
def test_each_device_holds_only_its_shard(tmp_path, spec):
    mesh = jax.make_mesh((2, 4), ("layers", "model"), axis_types=(AxisType.Auto,) * 2)
    config = Config(num_layers=4)
    flat = checkpoint(config, ml_dtypes.bfloat16)
    write(tmp_path / "x.safetensors", flat)

    def sharding_for(path, shape):
        return NamedSharding(mesh, spec if path == "blocks.kernel" else P())

    tensors = read_header(tmp_path / "x.safetensors")[0]
    kernel = flat_of(load(ARCHITECTURE, config, tensors, jnp.bfloat16, sharding_for))["blocks.kernel"]
    expected = expected_of(flat, 4)["blocks.kernel"]
    assert kernel.sharding == NamedSharding(mesh, spec) and len(kernel.addressable_shards) == 8
    for shard in kernel.addressable_shards:
        assert shard.data.shape == kernel.sharding.shard_shape(kernel.shape)
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])


def test_a_wide_transpose_is_copied_strip_by_strip():
    config = Config(width=150, hidden=33)
    flat = checkpoint(config)
    loaded = flat_of(load(ARCHITECTURE, config, in_memory(flat), jnp.bfloat16, on_one_device))
    expected = expected_of(flat)["blocks.kernel"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(loaded["blocks.kernel"]), expected)


def test_all_that_is_wrong_is_said_together_and_nothing_is_read():
    class Unread(ArrayTensor):
        def read(self):
            raise AssertionError("read before the check was over")

    flat = checkpoint()
    del flat["stages.0.bias"], flat["blocks.1.linear.weight"]
    flat["surprise.weight"] = flat["stages.0.weight"]
    flat["blocks.3.norm.weight"] = flat["blocks.0.norm.weight"]  # one layer too many
    flat["stages.7.weight"] = flat["stages.0.weight"]  # a rule matches, the module has no such stage
    flat["shared.weight"] = flat["shared.weight"][:5]
    flat["stages.1.weight"] = flat["stages.1.weight"].reshape(-1)[None, None]
    flat["blocks.2.norm.weight"] = np.zeros(8, np.int64)
    with pytest.raises(CheckpointError) as caught:
        load(ARCHITECTURE, Config(), {key: Unread(a) for key, a in flat.items()}, jnp.float32, on_one_device, where="vae")
    message = str(caught.value)
    assert "vae: " in message and "nothing was loaded" in message
    assert "missing (2): blocks.kernel of layer 1, stages.0.bias" in message
    assert "unexpected (3): blocks.3.norm.weight, stages.7.weight, surprise.weight" in message
    assert "mis-shaped (3): " in message
    assert "shared.weight (checkpoint [5, 8], model [16, 8])" in message
    assert "blocks.2.norm.weight (checkpoint int64, the model needs floats)" in message
    assert "stages.1.weight (checkpoint [128, 1, 1], model [16, 8])" not in message  # transposed before it is compared


def test_a_missing_stack_is_one_line_and_long_lists_are_cut():
    flat = {key: array for key, array in checkpoint().items() if "linear" not in key}
    flat |= {f"extra.{i:02d}": np.zeros(1) for i in range(33)}
    with pytest.raises(CheckpointError) as caught:
        check(ARCHITECTURE, Config(), in_memory(flat))
    message = str(caught.value)
    assert "missing (1): blocks.kernel\n" in message
    assert "unexpected (33): extra.00, " in message and "extra.19 and 13 more" in message and "extra.20" not in message


def test_a_transform_for_another_rank_is_mis_shaped_not_a_crash():
    def transpose(tensor):
        return tensor.transpose(2, 1, 0)

    rules = [r if r.path != "embedding" else type(r)(r.pattern, r.path, transpose) for r in ARCHITECTURE.key_rules]
    architecture = type(ARCHITECTURE)(Config, ARCHITECTURE.build, tuple(rules), ARCHITECTURE.ignored_keys)
    with pytest.raises(CheckpointError, match=r"shared.weight \(checkpoint \[16, 8\], the model needs \[16, 8\] after"):
        check(architecture, Config(), in_memory(checkpoint()))


def test_of_tied_weights_the_first_rule_wins():
    flat = checkpoint()
    for order in (("tied.weight", "shared.weight"), ("shared.weight", "tied.weight")):
        both = {"tied.weight": flat["shared.weight"] + 1, "shared.weight": flat["shared.weight"]}
        rest = {key: array for key, array in flat.items() if key != "shared.weight"}
        tensors = in_memory({**{key: both[key] for key in order}, **rest})
        loaded = flat_of(load(ARCHITECTURE, Config(), tensors, jnp.float32, on_one_device))
        np.testing.assert_array_equal(loaded["embedding"], flat["shared.weight"])


def test_random_weights_are_shaped_typed_and_sharded_as_loaded_ones():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))

    def sharding_for(path, shape):
        return NamedSharding(mesh, P(None, "model") if path == "blocks.kernel" else P())

    loaded = flat_of(load(ARCHITECTURE, Config(), in_memory(checkpoint()), jnp.bfloat16, sharding_for))
    random = flat_of(random_state(ARCHITECTURE, Config(), jnp.bfloat16, 0, sharding_for))
    for path, array in loaded.items():
        assert (random[path].shape, random[path].dtype) == (array.shape, array.dtype)
        assert random[path].sharding == array.sharding
    np.testing.assert_array_equal(random["blocks.scale"], 1)
    assert 0.015 < float(jnp.std(random["blocks.kernel"].astype(jnp.float32))) < 0.025
    again = flat_of(random_state(ARCHITECTURE, Config(), jnp.bfloat16, 0, on_one_device))
    np.testing.assert_array_equal(np.asarray(random["blocks.kernel"]), np.asarray(again["blocks.kernel"]))
    other = flat_of(random_state(ARCHITECTURE, Config(), jnp.bfloat16, 1, on_one_device))
    assert not np.array_equal(np.asarray(random["blocks.kernel"]), np.asarray(other["blocks.kernel"]))
    assert not np.array_equal(np.asarray(random["stages.0.kernel"]), np.asarray(random["stages.1.kernel"]))
