"""A step's answer on its way to the host, and as plain Python once it is there."""

import torch
from torch import Tensor

from lfm.engine.sampler import Logprobs
from lfm.protocol import TokenLogprob


def to_host(tensor: Tensor) -> Tensor:
    """Copy to pinned host memory without waiting; the same tensor where it is on the host already."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def logprobs_to_host(logprobs: Logprobs) -> Logprobs:
    return Logprobs(*(to_host(column) for column in logprobs))


def entries(ids: list[int], logprobs: Logprobs, num_top: int) -> list[TokenLogprob]:
    """Plain objects of a column of log-probabilities, each with its first `num_top` alternatives."""
    columns = zip(ids, logprobs.chosen_R.tolist(), logprobs.top_ids_RK.tolist(), logprobs.top_RK.tolist(), strict=True)
    return [
        TokenLogprob(token_id, value, [pair for pair in zip(top_ids, top, strict=True) if pair[0] >= 0][:num_top])
        for token_id, value, top_ids, top in columns
    ]
