"""Compiling kernels for a GPU that is not there: ops run on tensors without storage, and no launch goes further than
the assembler. Works because Triton brings its own compiler and ptxas.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

META = torch.device("meta")


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def compile_only(capability: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """Ops take their kernels as on a GPU of this capability (80: 8.0); yields the kernels compiled so far, by name."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from lfm.kernels import triton_guard, tuned

    compiled: dict[str, list[Any]] = {}
    run = JITFunction.run

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(self.__name__, []).append(kernel)
        return kernel

    tables = tuned.read_tables(tuned.FOLDER / ("default_small.json" if capability < 90 else "default_large.json"))
    answers = {
        "runs_triton": lambda x: True,
        "has_dependent_launch": lambda device: capability >= 90,
        "has_copy_engine": lambda device: capability >= 90,
        "has_prefill_kernels": lambda device: capability == 90,
        "tuned_for": lambda device: tables,
    }
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_kernel)
        for name, module in list(sys.modules.items()):
            if name.startswith("lfm.kernels.") and module is not triton_guard:
                for attribute, answer in answers.items():
                    if hasattr(module, attribute):
                        patch.setattr(module, attribute, answer)
        before = driver._active
        driver.set_active(_Driver(capability))
        try:
            yield compiled
        finally:
            driver._active = before
