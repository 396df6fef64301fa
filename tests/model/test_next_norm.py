"""What an MoE op knows of the next layer's norm reaches that layer, and no other."""

from dataclasses import replace

import torch
from torch import Tensor

from lfm.kernels.experts import experts_ref
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.norm import rms_norm_ref
from lfm.kernels.router import route_ref
from lfm.kernels.short_conv import conv_in_packed
from lfm.kernels.weights import ExpertScales, Linear, Norm, Router
from lfm.model.full_forward import packed_batch
from lfm.model.ops import PACKED
from lfm.model.presets import PRESETS
from tests.engine.models import random_model


def test_each_norm_behind_an_moe_layer_is_computed_there_and_used() -> None:
    model = random_model(PRESETS["tiny"])
    batch = packed_batch([[5, 9, 3, 17], [4, 4]], torch.device("cpu"))
    made: list[Tensor] = []
    taken: list[Tensor] = []

    def moe(
        h_TD: Tensor,
        norm: Norm,
        router: Router,
        is_real_T: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        scales: ExpertScales | None,
        next_norm: Norm,
    ) -> tuple[Tensor, Tensor]:
        out_TD = experts_ref(h_TD, *route_ref(h_TD, norm, router, is_real_T), gate_up, down, scales)
        made.append(rms_norm_ref(out_TD, next_norm))
        return out_TD, made[-1]

    def note(h_TD: Tensor, norm: Norm) -> None:
        if norm.known is not None:
            assert torch.equal(norm.known, rms_norm_ref(h_TD, norm)), "it is of another tensor or norm"
            taken.append(norm.known)

    def conv_in(
        h_TD: Tensor, norm: Norm, in_proj: Linear, conv: Linear, batch: ForwardBatch, tails_NLD: Tensor
    ) -> Tensor:
        note(h_TD, norm)
        return conv_in_packed(h_TD, norm, in_proj, conv, batch, tails_NLD)

    def last(h_TD: Tensor, norm: Norm) -> Tensor:
        note(h_TD, norm)
        return rms_norm_ref(h_TD, norm)

    with torch.inference_mode():
        plain = model(batch, None, PACKED)
        assert torch.equal(model(batch, None, replace(PACKED, moe=moe, conv_in=conv_in, norm=last)), plain)
    has_experts = [hasattr(layer.feed_forward, "experts") for layer in model.model.layers]
    notes = [*(hasattr(layer, "conv") for layer in model.model.layers[1:]), True]  # what stands behind each layer
    assert len(made) == sum(has_experts) > 1
    assert len(taken) == sum(experts and conv for experts, conv in zip(has_experts, notes, strict=True)) > 1
