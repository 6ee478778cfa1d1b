"""Executables kept on disk, so that a second start of a process compiles nothing."""

from pathlib import Path

import jax


def keep_executables(folder: Path) -> None:
    """Keep every compiled executable in `folder` and look there first; the small ones too, since there are many of them."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
