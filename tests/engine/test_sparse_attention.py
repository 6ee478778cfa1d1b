"""`attention_sparsity` of a request, from its field to the report, and where it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.system import MeshConfig, SystemConfig
from smartdiff_jax.engine.announced import announce, sparse_kernel
from smartdiff_jax.engine.costs import Work
from smartdiff_jax.engine.pipeline import Pipeline
from smartdiff_jax.errors import InvalidConfig, InvalidRequest

# 32 tokens: two blocks of queries and two of keys.
SMALL = dict(size=(64, 64), num_frames=5, num_inference_steps=3, seed=3, output_type="latent")


@pytest.fixture(scope="module")
def sparse(folder, system):
    fields = system.model_dump() | {"attention": "xla", "sparse_attention": True}
    return Pipeline.from_pretrained(folder, system=SystemConfig.create(**fields))


def test_one_executable_serves_every_share_and_0_is_the_dense_kernel(pipe, sparse, compiles):
    dense, none = pipe("a red fox", **SMALL), sparse("a red fox", **SMALL)
    np.testing.assert_array_equal(none.latents, dense.latents)
    before, seen = compiles.count, []
    for share in (0.5, 0.9, 0.2):
        out = sparse("a red fox", **SMALL, attention_sparsity=share)
        assert out.report.params["attention_sparsity"] == share and np.isfinite(out.latents).all()
        seen.append(float(np.abs(out.latents - dense.latents).max()))
    assert compiles.count == before
    # Of two blocks a fifth is none; nine tenths is one, as a half is.
    assert seen[0] == seen[1] > 1e-3 and seen[2] < 1e-5


def test_a_server_that_leaves_nothing_out_says_so(pipe):
    request = GenerateParams.create(prompt="", attention_sparsity=0.5)
    with pytest.raises(InvalidRequest, match="attention_sparsity=0.5: .*start with sparse_attention: true"):
        pipe.check(request)
    with pytest.raises(InvalidRequest, match="attention_sparsity=1.0: .*less than 1"):
        GenerateParams.create(prompt="", attention_sparsity=1.0)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(attention="xla", mesh=MeshConfig(ring=2, ulysses=2)), "mesh.ring=2: .*use ulysses"),
        (dict(attention="cudnn"), "attention='cudnn': .*one of auto, pallas_flash, pallas_sage, xla"),
        (dict(), "sparse_attention=True: pallas_flash needs .*start without"),
    ],
)
def test_what_cannot_leave_anything_out_is_refused_at_the_start(fields, words):
    with pytest.raises(InvalidConfig, match=words):
        announce("pocket-image", SystemConfig.create(sparse_attention=True, **fields))
    assert sparse_kernel(SystemConfig.create(**fields), jnp.float32) is None
    assert jax.default_backend() == "cpu"


def test_what_is_left_out_costs_apart(pipe):
    params = pipe.check(GenerateParams.create(prompt=""))
    kinds = [
        Work.of("here", params.model_copy(update={"attention_sparsity": share}), 8, True).kind for share in (0.0, 0.52, 0.48)
    ]
    assert kinds[0] != kinds[1] == kinds[2]
