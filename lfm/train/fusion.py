"""Chains of small operations as few kernels: torch.compile, on a GPU only.

A small model's step is mostly norms, gates and gathers, each a pass over memory if it is a kernel of its own. On a CPU
the function runs as it is written, and also under `torch.compiler.set_stance("force_eager")`.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(function: Function) -> Function:
    """`function`, compiled where its first argument is on a GPU. It has to be free of side effects."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True)  # at the first use: loading the compiler takes seconds

    @functools.wraps(function)
    def run(first: torch.Tensor, *rest: Any) -> Any:
        return (compiled() if first.is_cuda else function)(first, *rest)

    return cast(Function, run)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What a call of a fused function raises if it cannot be compiled; nothing before the compiler was loaded."""
    dynamo = sys.modules.get("torch._dynamo.exc")
    return () if dynamo is None else (dynamo.TorchDynamoException,)
