"""The processes that train one model together, as `torchrun` starts them; a process alone is a world of one.

Two groups connect them: one for tensors (NCCL on GPUs, gloo on CPUs), one over gloo for what they have to agree on, so
that asking "did anybody fail?" waits for no GPU. Weights are cut into ranges of rows (dimension 0), as FSDP2 cuts them:
`own_rows` and `whole` go from one form to the other. Everything that a checkpoint holds is whole.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lfm.errors import LfmError, MachineError, UsageError

_LONGEST_WAIT = timedelta(hours=12)  # the first process prepares the data while the others wait


class PeerError(LfmError):
    """Another process of the run has failed; its own message says why."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size`. `mesh` and `control` are None where it is alone."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process. All of them have to ask."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags.item())

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What the body raises in one process ends all of them. The body must not wait for other processes.

        The first process's error is told by it alone: the others mostly have the same.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is raised again when the others know
            error = raised
        if not self.any(error is not None):
            return
        has_first_failed = self.any(self.is_first and error is not None)
        if error is not None and (self.is_first or not has_first_failed):
            raise error
        raise PeerError("Another process of this run failed; its message says why.") from error

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def own_rows(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor, in memory of their own; none if there are too few."""
        if self.size == 1:
            return whole
        share = -(-whole.shape[0] // self.size)
        return whole[self.rank * share : (self.rank + 1) * share].clone()

    def num_rows(self, own: Tensor) -> int:
        """How many rows all processes hold together."""
        if self.size == 1:
            return own.shape[0]
        return int(self.add_up(torch.tensor(own.shape[0], device=own.device)).item())

    def whole(self, own: Tensor, num_rows: int) -> Tensor:
        """The tensor of `num_rows` rows of which every process holds its own, on every process."""
        if self.size == 1:
            return own
        share = -(-num_rows // self.size)
        padded = own.new_zeros(share, *own.shape[1:])
        padded[: own.shape[0]] = own
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat(parts)[:num_rows]


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world that the environment speaks of, as torchrun sets it; left when the body ends.

    Raises UsageError if that is incomplete, MachineError if this machine has fewer GPUs than processes or if one of the
    processes disappears while the body runs.
    """
    if _is_alone():
        yield World()
        return
    size = num_processes()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE={size}, but {', '.join(missing)} is not set. Start with torchrun; see docs/training.md."
        )
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    is_cuda = device.type == "cuda"
    if is_cuda:
        if local_rank >= torch.cuda.device_count():
            raise MachineError(
                f"Process {local_rank} on this machine has no GPU: there are {torch.cuda.device_count()}. "
                "Give torchrun a smaller --nproc-per-node."
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if is_cuda else "gloo", rank=rank, world_size=size)
    try:
        control = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        yield World(rank, size, init_device_mesh(device.type, (size,)), control)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise MachineError(
            "The connection to another process of this run is lost: it was killed, or its machine failed. "
            "The same command goes on from the newest checkpoint."
        ) from error
    finally:
        dist.destroy_process_group()


def num_processes() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def _is_alone() -> bool:
    return num_processes() == 1
