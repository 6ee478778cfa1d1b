"""A model that is announced takes, refuses and prices what it will when its weights are there."""

import pytest

from smartdiff_jax.config.request import GenerateParams
from smartdiff_jax.config.system import SystemConfig
from smartdiff_jax.engine.announced import announce
from smartdiff_jax.engine.run import work_of
from smartdiff_jax.errors import InvalidConfig, InvalidRequest

TAKEN = [
    dict(size="32x32", num_frames=5),
    dict(size="48x32", num_frames=1, num_inference_steps=7, cache="auto", cache_ratio=0.3),
    dict(size="32x32", num_frames=9, guidance_scale=1.0, sampler="flow_euler", num_outputs=3),
]
REFUSED = [
    dict(size="33x32"),
    dict(num_frames=4),
    dict(cache="teacache"),
    dict(cache="blockdance", cache_params={"block": 99}),
    dict(guidance_scale_2=3.0),
    dict(size="large"),
]


@pytest.mark.parametrize("which", ["one", "two experts"])
def test_it_answers_as_the_pipeline_does(which, request, system):
    folder, pipe = (request.getfixturevalue(name if which == "one" else f"experts_{name}") for name in ("folder", "pipe"))
    known = announce(folder, system)
    for fields in TAKEN:
        asked = GenerateParams.create(prompt="a", seed=3, **fields)
        resolved = known.check(asked)
        assert resolved == pipe.check(asked) and work_of(known, resolved) == work_of(pipe, resolved)
    refused = 0
    for fields in REFUSED:
        told = []
        for model in (known, pipe):
            try:
                model.check(GenerateParams.create(prompt="a", seed=3, **fields))
            except InvalidRequest as error:
                told.append(str(error))
        assert len(told) in (0, 2) and len(set(told)) <= 1, told
        refused += bool(told)
    assert refused == len(REFUSED) - (which == "two experts")  # which take a guidance_scale_2
    assert (known.spec, known.frame_multiple) == (pipe.spec, pipe.frame_multiple)


def test_a_known_name_needs_nothing_on_this_machine(tmp_path):
    known = announce("wan2.1-t2v-1.3b", SystemConfig.create(cache_dir=tmp_path))
    resolved = known.check(GenerateParams.create(prompt="a", cache="magcache"))  # whose ratios are published
    assert (resolved.width, resolved.height, resolved.num_frames) == (832, 480, 81) and known.count_tokens(resolved) == 32760
    with pytest.raises(InvalidRequest, match="the nearest is 832x480"):
        known.check(GenerateParams.create(prompt="a", size="833x480"))
    with pytest.raises(InvalidConfig, match="model='no-such-model'"):
        announce("no-such-model", SystemConfig.create(cache_dir=tmp_path))
