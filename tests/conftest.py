"""Every test runs on 8 virtual CPU devices, in exact float32."""

import os
import sys
from pathlib import Path

# Before JAX starts. What is tested is which operations XLA is given, not how fast LLVM makes them: optimising machine code
# that runs once takes most of a test's time (2.5 times as much for a picture on a mesh). Processes that tests start inherit it.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
)

import jax  # noqa: E402
import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def key():
    return jax.random.key(0)
