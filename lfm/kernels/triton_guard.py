"""Triton where it is installed; elsewhere stand-ins that let kernel files be imported but not launched.

A kernel file takes `triton`, `tl` and the rest from here. Its public op asks `runs_triton` before it launches anything.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    _jit = lambda function=None, **_: function or (lambda inner: inner)  # noqa: E731
    triton: Any = SimpleNamespace(jit=_jit)  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[no-redef]
    libdevice: Any = None  # type: ignore[no-redef]
    TensorDescriptor: Any = None  # type: ignore[no-redef]
    HAS_TRITON = False

__all__ = [
    "HAS_TRITON",
    "TensorDescriptor",
    "has_dependent_launch",
    "has_warp_group_products",
    "libdevice",
    "num_multiprocessors",
    "runs_triton",
    "tl",
    "triton",
]


def runs_triton(x: Tensor) -> bool:
    """Whether the kernels can take this tensor: bf16 on a GPU that Triton has a backend for."""
    return HAS_TRITON and x.is_cuda and x.dtype == torch.bfloat16


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended (`launch_pdl`): capability 9.0 or later.

    Such a kernel calls `tl.extra.cuda.gdc_wait()` before it reads or writes what others may still write or read.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def has_warp_group_products(device: torch.device) -> bool:
    """Whether four warps can multiply together from shared memory (wgmma): Hopper alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs of the largest size run at a time."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
