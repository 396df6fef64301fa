"""What this machine has: its GPUs, its memory, its cores. The only place that asks.

Asking torch about GPUs creates a CUDA context, so only processes that will use the device (and `lfm info`) call it.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from lfm.model.sizes import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One CUDA device as torch sees it."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The devices that an engine can choose from. `cuda_note` says why there is no usable GPU, when there is none."""

    cuda_devices: tuple[Gpu, ...]
    cpu_total_bytes: int
    cpu_available_bytes: int
    cpu_count: int
    cuda_note: str = "torch sees no CUDA device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device, and how many bytes of it an engine may take; `had` says that in words, for messages."""

    device: str
    budget_bytes: int
    had: str

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def index(self) -> int:
        """Which of the machine's GPUs; of a GPU only."""
        return int(self.device.removeprefix("cuda:"))


def cpu_place(machine: Machine, *, memory_fraction: float) -> Place:
    """`memory_fraction` of the memory that is available now."""
    available = machine.cpu_available_bytes
    budget = round(memory_fraction * available)
    had = f"the CPU can give {format_bytes(budget)} ({memory_fraction:.0%} of {format_bytes(available)} available)"
    return Place(device="cpu", budget_bytes=budget, had=had)


def gpu_place(machine: Machine, *, index: int, memory_fraction: float) -> Place:
    """What is free of a GPU, but for the share that `memory_fraction` of the whole leaves to others."""
    gpu = machine.cuda_devices[index]
    budget = max(0, gpu.free_bytes - round((1 - memory_fraction) * gpu.total_bytes))
    free, total = format_bytes(gpu.free_bytes), format_bytes(gpu.total_bytes)
    stays = f"{1 - memory_fraction:.0%} stay free"
    had = f"cuda:{index} can give {format_bytes(budget)} (of {total}, {free} are free, {stays})"
    return Place(device=f"cuda:{index}", budget_bytes=budget, had=had)


def probe_machine() -> Machine:
    """Look at this machine. Imports torch, and creates a CUDA context where there is a GPU."""
    gpus, note = _probe_cuda()
    total, available = _probe_memory()
    return Machine(
        cuda_devices=gpus,
        cpu_total_bytes=total,
        cpu_available_bytes=available,
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cuda_note=note,
    )


def _probe_cuda() -> tuple[tuple[Gpu, ...], str]:
    import torch

    if torch.version.cuda is None:
        return (), f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver is warned of at length; the reason is asked for below
        is_available = torch.cuda.is_available()
    if not is_available:
        return (), _why_no_cuda()
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor)
        gpus.append(Gpu(name=properties.name, total_bytes=total, free_bytes=free, capability=capability))
    return tuple(gpus), ""


def _why_no_cuda() -> str:
    """Why torch sees no device, in its own first sentence: no driver, one that is too old, or none is visible."""
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        sentence = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        return f"torch {torch.__version__} sees no CUDA device ({sentence[:200]})"
    return f"torch {torch.__version__} sees no CUDA device"


def _probe_memory() -> tuple[int, int]:
    """Total and available bytes of host memory, under the container's limit where there is one."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
        kilobytes = {fields[0].rstrip(":"): int(fields[1]) for fields in lines if len(fields) >= 2}
        total, available = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    else:  # not Linux: what is free now is unknown, so count half of the memory
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = total // 2
    limit, used = _read_group_memory()
    if limit is not None:
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _read_group_memory() -> tuple[int | None, int]:
    """The container's memory limit (None: no limit) and what it uses, without file pages that the kernel can drop."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no control group of version 2 here: the machine's own numbers hold
        return None, 0
    return (int(limit) if limit.isdigit() else None), used - int(stat.get("inactive_file", 0))
