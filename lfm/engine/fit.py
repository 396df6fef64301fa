"""What fits where: for each device of a machine and each precision, how many sequences of which context."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lfm.config import ModelConfig
from lfm.engine.machine import Machine, Place, cpu_place, gpu_place
from lfm.engine.plan import (
    CPU_MAX_RUNNING,
    CPU_STEP_TOKENS,
    FP8_MIN_CAPABILITY,
    GPU_MAX_RUNNING,
    GPU_STEP_TOKENS,
    default_block_size,
)
from lfm.model.sizes import DtypeName, block_bytes, num_blocks_for, weight_bytes, workspace_bytes

PRECISIONS: tuple[DtypeName, ...] = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One device and precision. `cache_bytes` is what weights and working memory leave: negative if they do not fit.

    `dtype` "fp8": weights and K/V in fp8, all else in bfloat16.
    """

    device: str
    dtype: DtypeName | Literal["fp8"]
    budget_bytes: int
    weight_bytes: int
    cache_bytes: int
    block_size: int
    block_bytes: int
    max_running: int

    def num_sequences(self, context: int) -> int:
        """Sequences of `context` tokens that the cache holds at once, up to the device's limit."""
        blocks_each = num_blocks_for(context, self.block_size) + 1  # the block that each may need next
        return min(self.max_running, max(0, self.cache_bytes // self.block_bytes // blocks_each))


def fits_on(model: ModelConfig, machine: Machine, *, memory_fraction: float) -> Iterator[Fit]:
    """Every device of the machine with every precision, the GPUs first."""
    places = [
        gpu_place(machine, index=index, memory_fraction=memory_fraction) for index in range(len(machine.cuda_devices))
    ]
    for place in [*places, cpu_place(machine, memory_fraction=memory_fraction)]:
        for dtype in PRECISIONS:
            yield _fit(model, place, dtype)
        if place.is_gpu and machine.cuda_devices[place.index].capability >= FP8_MIN_CAPABILITY:
            yield _fit(model, place, "bfloat16", is_fp8=True)


def _fit(model: ModelConfig, place: Place, dtype: DtypeName, *, is_fp8: bool = False) -> Fit:
    step_tokens = GPU_STEP_TOKENS if place.is_gpu else CPU_STEP_TOKENS
    max_running = GPU_MAX_RUNNING if place.is_gpu else CPU_MAX_RUNNING
    weights = weight_bytes(model, dtype, quantize="fp8" if is_fp8 else "none")
    work = workspace_bytes(model, step_tokens=step_tokens, max_running=max_running, dtype=dtype)
    block_size = default_block_size(model, place)
    return Fit(
        device=place.device,
        dtype="fp8" if is_fp8 else dtype,
        budget_bytes=place.budget_bytes,
        weight_bytes=weights,
        cache_bytes=place.budget_bytes - weights - work,
        block_size=block_size,
        block_bytes=block_bytes(model, block_size=block_size, dtype=dtype, kv_dtype="fp8" if is_fp8 else "auto"),
        max_running=max_running,
    )
