"""Lay a model's weights out for serving: projections that are computed together stand together.

Nothing is kept twice: the merged tensor takes the place of its parts, which become views of it. Names and values stay.
Legend: N outputs, K inputs.
"""

import torch
from torch import Tensor

from lfm.kernels.weights import Linear
from lfm.model.lfm2 import Attention, DenseFeedForward, Experts, Lfm2, ShortConv, Weight, merge


@torch.no_grad()
def pack(model: Lfm2) -> Lfm2:
    """Merge q, k and v of every attention and w1 and w3 of every dense feed-forward, in place. Returns the model."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.merged_qkv = _merge(module.q_proj, module.k_proj, module.v_proj)
        elif isinstance(module, DenseFeedForward):
            module.merged_gate_up = _merge(module.w1, module.w3)
    return model


@torch.no_grad()
def store_by_columns(model: Lfm2) -> Lfm2:
    """Store a packed model's weights [N, K] with N > K, and its experts, column after column, in place. Returns it.

    Shapes and values stay. On a CPU a product of one token then reads memory at up to twice the rate (fp32, weights not
    in the caches: 99 us by rows, 56 by columns, 49 to only read 768 x 256; 1,010 and 370 for a head of 8,192). With
    N <= K rows are as fast or faster (56 and 90 us for 256 x 640), with 2,048 inputs too. A token's embedding is spread
    over memory then, which costs 1 us a token.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.merged_qkv = _split_again(module.merged_qkv, module.q_proj, module.k_proj, module.v_proj)
        elif isinstance(module, DenseFeedForward):
            module.merged_gate_up = _split_again(module.merged_gate_up, module.w1, module.w3)
        elif isinstance(module, Experts):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(module, name)
                setattr(module, name, torch.nn.Parameter(_by_columns(weight), weight.requires_grad))
        elif isinstance(module, ShortConv):
            _store(module.in_proj)
    _store(model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head)
    return model


def _store(module: Weight) -> None:
    module.weight = torch.nn.Parameter(_by_columns(module.weight), requires_grad=module.weight.requires_grad)


def _by_columns(weight: Tensor) -> Tensor:
    return weight.transpose(-1, -2).contiguous().transpose(-1, -2)


def _merge(*parts: Weight) -> Linear:
    """The parts' rows in one tensor; each part becomes a view of its rows."""
    return _share(merge(*parts), *parts)


def _split_again(merged: Linear | None, *parts: Weight) -> Linear:
    assert merged is not None, "the model is not packed"
    return _share(merged._replace(weight=_by_columns(merged.weight)), *parts)


def _share(merged: Linear, *parts: Weight) -> Linear:
    """Let the parts be views of `merged`, in order."""
    begin = 0
    for part in parts:
        end = begin + part.weight.shape[0]
        part.weight = torch.nn.Parameter(merged.weight[begin:end], requires_grad=part.weight.requires_grad)
        if merged.scale is not None:
            part.scale = merged.scale[begin:end]
        begin = end
    return merged
