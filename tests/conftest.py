"""Every test runs on 8 virtual CPU devices, in exact float32."""

import gc
import os
import platform
import sys
from pathlib import Path

# Before JAX starts. What is tested is which operations XLA is given, not how fast LLVM makes them: optimising machine code
# that runs once takes most of a test's time (2.5 times as much for a picture on a mesh). Processes that tests start inherit it.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
# To cut a program into parts, which threads compile beside each other, costs a fifth as much again; workers fill the cores.
FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
if platform.machine() in ("x86_64", "AMD64"):
    # XLA's older way from a fusion to LLVM, which passes MLIR by, compiles in 0.6 of the time again. It would put products and
    # sums together, in one program and not in another, where tests compare two programs to the bit: AVX alone has no such
    # instruction.
    FLAGS += ["--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters", "--xla_cpu_max_isa=AVX"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# An operation is told to XLA without the up to 100 Python frames that made it: they were a third of what is lowered and parsed.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

# Where Python is told to write no bytecode, each process that tests start would parse all of JAX again, 4 s long: it is written
# beside pytest's own cache, for the workers, for those processes and for the next session.
if sys.dont_write_bytecode and sys.pycache_prefix is None:
    bytecode = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    sys.pycache_prefix, sys.dont_write_bytecode = bytecode, False
    os.environ["PYTHONPYCACHEPREFIX"] = bytecode
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax  # noqa: E402
import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def key():
    return jax.random.key(0)


def pytest_collection_finish():
    """What was imported stays to the end: the collector need not look through it after every few hundred allocations."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


# Files that share what is dear to make, a server or pipelines, run one after another in one worker.
TOGETHER = {
    "tests/serve/": "serve",
    "tests/engine/test_mesh.py": "mesh",
    "tests/engine/test_image_pipelines.py": "pictures",
    "tests/engine/": "engine",
    "tests/sharding/test_plan.py": "plans",
    "tests/test_cli_mesh.py": "plans",
}
# What takes longest begins first, so that no worker has a long rest to itself at the end.
FIRST = ["mesh", "engine", "tests/training/test_training.py", "serve", "pictures"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """xdist's own by file, but for these two tables."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return next((name for start, name in TOGETHER.items() if file.startswith(start)), file)

        def _assign_work_unit(self, node):
            for name in reversed(FIRST):
                if name in self.workqueue:
                    self.workqueue.move_to_end(name, last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None
