"""Python's collector of cycles in a long-running process: all threads wait while it looks through what there is.

A full pass over what JAX, compiled programs and a service keep takes hundreds of milliseconds, and under load there is one
every few hundred requests. What is there once models are warm stays: it is set aside, and later passes are short.
"""

import gc


def settle() -> None:
    """Free what hangs in cycles, and set all else aside until the next call."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
