"""Compiling kernels without launching them, for a GPU that need not be there: ops run on tensors without storage.

Triton brings its own compiler and ptxas, so nothing but its driver and what ops ask of the device has to be answered.
What is compiled lands in Triton's cache on disk, under the key that a launch on such a GPU will look for: the key is
made by Triton itself, from arguments whose shapes, strides and offsets from an aligned address are the real ones.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lfm.kernels import triton_guard, tuned
from lfm.kernels.tuned import Tuned

COLLECTING = -1  # the "device" of kernels that are only collected: nothing of theirs may be taken for compiled


@dataclass(frozen=True, slots=True)
class Wanted:
    """A kernel that ops asked for, specialised for its arguments. `key` names its folder in Triton's cache."""

    name: str
    key: str
    source: Any
    target: Any
    options: Any

    @property
    def is_cached(self) -> bool:
        return is_cached(self.source.name, self.key)

    def compile(self) -> Any:
        """Compile it into the cache. Raises whatever Triton raises."""
        import triton

        return triton.compile(self.source, target=self.target, options=self.options)


def is_cached(name: str, key: str) -> bool:
    """Whether the kernel of this name and key is in Triton's cache, whole."""
    from triton.runtime.cache import get_cache_manager

    file = f"{name[:150]}.json"  # written last; Triton cuts long names
    return file in (get_cache_manager(key).get_group(file) or {})


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int, device: int) -> None:
        self._capability = capability
        self._device = device

    def get_current_device(self) -> int:
        return self._device  # kernels are kept by device

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
    from triton.runtime.jit import JITFunction

    compiled: dict[str, list[Any]] = {}
    run = JITFunction.run

    @functools.wraps(run)
    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(self.__name__, []).append(kernel)
        return kernel

    default = "default_large.json" if capability // 10 in tuned.LARGE_CAPABILITIES else "default_small.json"
    with _as_on(capability, capability, tuned.read_tables(tuned.FOLDER / default), {"run": compile_kernel}):
        yield compiled


@contextmanager
def collect_only(
    capability: int, tables: Tuned, *, on_wanted: Callable[[Wanted], None] = lambda wanted: None
) -> Iterator[dict[str, Wanted]]:
    """As `compile_only`, with these tables of tiles, and nothing is compiled: yields what was asked for, by key.

    `on_wanted` gets each when it is first asked for; it may compile it.
    """
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime.cache import get_cache_key
    from triton.runtime.jit import JITFunction

    wanted: dict[str, Wanted] = {}
    functions: list[Any] = []
    run, variables = JITFunction.run, get_cache_invalidating_env_vars()

    @functools.wraps(run)
    def run_nothing(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def collect(
        self: Any, key: str, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> Any:
        known, _, target, backend, _ = self.device_caches[device]
        source = self.ASTSource(self, signature, constants, attributes)
        options = backend.parse_options(dict(options.__dict__, **source.parse_options()))  # as triton.compile does
        text = get_cache_key(source, backend, options, env_vars=variables)
        digest = hashlib.sha256(text.encode()).hexdigest()
        wanted[digest] = Wanted(self.__name__, digest, source, target, options.__dict__)
        functions.append(self)
        known[key] = wanted[digest]  # asked for once
        on_wanted(wanted[digest])
        return known[key]

    try:
        with _as_on(capability, COLLECTING, tables, {"run": run_nothing, "_do_compile": collect}):
            yield wanted
    finally:
        for function in functions:
            function.device_caches.pop(COLLECTING, None)


def answers_of(capability: int) -> dict[str, Callable[[Any], Any]]:
    """What functions in `lfm.kernels` that ask the device say on a GPU of this capability, by their names."""
    is_hopper = capability >= 90
    return {
        "runs_triton": lambda x: True,
        "has_dependent_launch": lambda device: is_hopper,
        "has_copy_engine": lambda device: is_hopper,
        "has_prefill_kernels": lambda device: is_hopper and capability // 10 in tuned.LARGE_CAPABILITIES,
        "has_warp_group_products": lambda device: capability // 10 == 9,
        "num_multiprocessors": lambda device: 132,  # a grid's size, which is compiled into nothing
    }


@contextmanager
def _as_on(capability: int, device: int, tables: Tuned, methods: dict[str, Any]) -> Iterator[None]:
    """Ops' questions and Triton's are answered as on a GPU of this capability, and JITFunction has these methods."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    answers = answers_of(capability)
    changed = [(JITFunction, name, getattr(JITFunction, name), method) for name, method in methods.items()]
    for name, module in list(sys.modules.items()):
        if name.startswith("lfm.kernels.") and module is not triton_guard:
            questions = [question for question in answers if hasattr(module, question)]
            changed += [(module, question, getattr(module, question), answers[question]) for question in questions]
    driver_before = driver._active
    try:
        for owner, name, _, replacement in changed:
            setattr(owner, name, replacement)
        driver.set_active(_Driver(capability, device))
        with tuned.replaced(tables):
            yield
    finally:
        driver._active = driver_before
        for owner, name, before, _ in changed:
            setattr(owner, name, before)


def compile_launch_tools() -> None:
    """Compile what Triton needs before its first launch of anything, into its cache.

    Raises whatever the compiler for C or Triton raises, where there is no driver, for example.
    """
    from triton.backends.nvidia.driver import CudaUtils

    CudaUtils()


def compile_launcher(kernel: Any) -> None:
    """Compile the library that launches a kernel, where Triton makes one for each (3.6). Raises as the one above."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(kernel.src, kernel.metadata)
