"""Recording what a step launches, and replaying it.

A step of a small model is over a thousand launches of a few microseconds each; the host takes longer to ask for them
than the GPU to do them (measured on an H200: 72 ms a step for some 27 ms of kernels). As a CUDA graph they are one
launch. On a CPU the function is simply called.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Recording:
    """A function of tensors that is recorded once for each set of their shapes.

    The first call with new shapes runs as written: it compiles, chooses algorithms and allocates what stays. The second
    is recorded, all later ones replay it. The function must not synchronise, and what it reads beside its arguments
    must keep its memory. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], *, stream: torch.cuda.Stream | None) -> None:
        """`stream`: where calls are made and recorded; None on a CPU."""
        self._function, self._stream = function, stream
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._recorded: dict[
            tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Sequence[Tensor], Sequence[Tensor]]
        ] = {}

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        if self._stream is None:
            return self._function(*arguments)
        shapes = tuple(argument.shape for argument in arguments)
        if shapes not in self._seen:
            outputs = self._function(*arguments)
            self._seen.add(shapes)  # not if it failed
            return outputs
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(arguments)
        graph, inputs, outputs = self._recorded[shapes]
        torch._foreach_copy_(list(inputs), list(arguments))
        graph.replay()
        return outputs

    def _record(self, arguments: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor], Sequence[Tensor]]:
        inputs = [argument.clone() for argument in arguments]
        graph = torch.cuda.CUDAGraph()
        # Recordings never run at the same time, so they share their memory.
        pool = next(iter(self._recorded.values()))[0].pool() if self._recorded else None
        # thread_local: the thread that reads batches may allocate pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = self._function(*inputs)
        return graph, inputs, outputs
