"""Lay a model's weights out for serving: projections that are computed together stand together.

Nothing is kept twice: the merged tensor takes the place of its parts, which become views of it. Names and values stay.
"""

import torch

from lfm.kernels.weights import Linear
from lfm.model.lfm2 import Attention, DenseFeedForward, Lfm2, Weight, merge


@torch.no_grad()
def pack(model: Lfm2) -> Lfm2:
    """Merge q, k and v of every attention and w1 and w3 of every dense feed-forward, in place. Returns the model."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.merged_qkv = _merge(module.q_proj, module.k_proj, module.v_proj)
        elif isinstance(module, DenseFeedForward):
            module.merged_gate_up = _merge(module.w1, module.w3)
    return model


def _merge(*parts: Weight) -> Linear:
    """The parts' rows in one tensor; each part becomes a view of its rows."""
    merged = merge(*parts)
    begin = 0
    for part in parts:
        end = begin + part.weight.shape[0]
        part.weight = torch.nn.Parameter(merged.weight[begin:end], requires_grad=part.weight.requires_grad)
        if merged.scale is not None:
            part.scale = merged.scale[begin:end]
        begin = end
    return merged
