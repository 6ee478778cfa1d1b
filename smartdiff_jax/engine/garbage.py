"""Python's collector of cycles in a long-running process: all threads wait while it looks through what there is.

A full pass takes 0.2 s where one bundled model is warm. What is there by then stays: it is set aside, later passes are short.
"""

import gc


def settle() -> None:
    """Free what hangs in cycles, and set all else aside until the next call."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
