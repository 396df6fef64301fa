"""Compiling kernels without launching them, for a GPU that need not be there: ops run on tensors without storage.

Triton brings its own compiler and ptxas, so nothing but its driver and what ops ask of the device has to be answered.
What is compiled lands in Triton's cache on disk, under the key that a launch on such a GPU will look for.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lfm.kernels import triton_guard, tuned


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def compile_only(capability: int) -> Iterator[dict[str, list[Any]]]:
    """Ops take their kernels as on a GPU of this capability (80: 8.0); yields the compiled kernels by name, so far.

    For processes that compute nothing meanwhile: the ops' questions are answered in their modules.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: dict[str, list[Any]] = {}
    run = JITFunction.run

    @functools.wraps(run)
    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(self.__name__, []).append(kernel)
        return kernel

    is_hopper = capability >= 90
    answers = {
        "runs_triton": lambda x: True,
        "has_dependent_launch": lambda device: is_hopper,
        "has_copy_engine": lambda device: is_hopper,
        "has_prefill_kernels": lambda device: capability == 90,
    }
    default = "default_large.json" if capability // 10 in tuned.LARGE_CAPABILITIES else "default_small.json"
    changed = [(JITFunction, "run", run)]
    for name, module in list(sys.modules.items()):
        if name.startswith("lfm.kernels.") and module is not triton_guard:
            changed += [
                (module, question, getattr(module, question)) for question in answers if hasattr(module, question)
            ]
    driver_before = driver._active
    try:
        JITFunction.run = compile_kernel
        for owner, question, _ in changed[1:]:
            setattr(owner, question, answers[question])
        driver.set_active(_Driver(capability))
        with tuned.replaced(tuned.read_tables(tuned.FOLDER / default)):
            yield compiled
    finally:
        driver._active = driver_before
        for owner, question, answer in changed:
            setattr(owner, question, answer)
