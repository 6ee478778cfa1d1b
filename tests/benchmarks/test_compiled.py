"""What a module's text says of its kernels; to compile one needs what CUDA's packages bring, and no GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled import kernels_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compiled.py"
MODULE = """HloModule jit_run, is_scheduled=true

%fused_add (p.0: bf16[4,8], p.1: bf16[8]) -> bf16[4,8] {
  %p.0 = bf16[4,8]{1,0} parameter(0)
  %p.1 = bf16[8]{0} parameter(1)
  ROOT %add.1 = bf16[4,8]{1,0} add(%p.0, %p.1)
}

%body.3 (s.0: (bf16[4,16], bf16[16,8], bf16[8])) -> (bf16[4,16], bf16[16,8], bf16[8]) {
  %s.0 = (bf16[4,16]{1,0}, bf16[16,8]{1,0}, bf16[8]{0}) parameter(0)
  %x.1 = bf16[4,16]{1,0} get-tuple-element(%s.0), index=0
  %w.1 = bf16[16,8]{1,0} get-tuple-element(%s.0), index=1
  %b.1 = bf16[8]{0} get-tuple-element(%s.0), index=2
  %product.2 = (bf16[4,8]{1,0}, s8[32]{0}) custom-call(%x.1, %w.1, %b.1), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(run)/mlp/dot_general"}, backend_config={"gemm_backend_config":{"epilogue":"BIAS_GELU"}}
  %y.1 = bf16[4,8]{1,0} get-tuple-element(%product.2), index=0
  %loop_add_fusion.1 = bf16[4,8]{1,0} fusion(%y.1, %b.1), kind=kLoop, metadata={op_name="jit(run)/add"}
  %loop_add_fusion.2 = bf16[4,8]{1,0} fusion(%loop_add_fusion.1, %b.1), kind=kLoop, metadata={op_name="jit(run)/add"}
  ROOT %t.1 = (bf16[4,16]{1,0}, bf16[16,8]{1,0}, bf16[8]{0}) tuple(%x.1, %w.1, %b.1)
}

ENTRY %main (a: bf16[4,16]) -> bf16[4,16] {
  %a = bf16[4,16]{1,0} parameter(0)
  ROOT %copy.1 = bf16[4,16]{1,0} copy(%a)
}
"""


def test_a_loop_s_kernels_are_counted_with_what_they_read_and_write():
    rows, epilogues = kernels_of(MODULE)
    assert epilogues == {"BIAS_GELU": 1}
    found = [(row.name, row.source, row.shape, row.count, row.bytes) for row in rows]
    assert found == [
        ("__cublas$lt$matmul", "dot_general", "(bf16[4,8], s8[32])", 1, 2 * 4 * 8 + 32 + 2 * (4 * 16 + 16 * 8 + 8)),
        ("loop_add_fusion", "add", "bf16[4,8]", 2, 2 * 2 * (4 * 8 + 4 * 8 + 8)),
    ]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax[cuda13]")
def test_a_step_compiles_for_a_gpu_that_is_not_there():
    command = [sys.executable, SCRIPT, "--model", "pocket-image", "--rows", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "arguments" in done.stdout and " kernels;" in done.stdout, done.stderr
