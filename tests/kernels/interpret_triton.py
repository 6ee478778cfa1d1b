"""Runs the Triton kernel in Triton's interpreter, which must be chosen before Triton is imported: a process of its own.

TRITON_INTERPRET=1 python interpret_triton.py KERNEL.py CASES.pickle      writes CASES.pickle.out
"""

import importlib.util
import pickle
import sys

import numpy as np
from triton.runtime.interpreter import GridExecutor


class Pointer:
    """An array as the interpreter takes it: an address and a dtype. PyTorch is not needed for more."""

    def __init__(self, x: np.ndarray, dtype: str):
        self.x, self.dtype = x, f"torch.{dtype}"

    def data_ptr(self) -> int:
        return self.x.ctypes.data


GridExecutor._init_args_hst = lambda self, arguments, named: (arguments, named)
GridExecutor._restore_args_dev = lambda self, *_: None

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("kernel", sys.argv[1])
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    with open(sys.argv[2], "rb") as file:
        cases = pickle.load(file)
    for grid, arrays, constants in cases:
        kernel.forward[grid](*(Pointer(x, dtype) for x, dtype in arrays), **constants)
    with open(sys.argv[2] + ".out", "wb") as file:
        pickle.dump([[x for x, _ in arrays[-2:]] for _, arrays, _ in cases], file)
