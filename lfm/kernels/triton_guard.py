"""Triton where it is installed; elsewhere stand-ins that let kernel files be imported but not launched.

A kernel file takes `triton`, `tl` from here. Its public op asks `runs_triton` before it launches anything.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton: Any = SimpleNamespace(jit=lambda function: function)  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=object)  # type: ignore[no-redef]
    HAS_TRITON = False


def runs_triton(x: Tensor) -> bool:
    """Whether the kernels can take this tensor: bf16 on a GPU that Triton has a backend for."""
    return HAS_TRITON and x.is_cuda and x.dtype == torch.bfloat16
