"""Which weights become fp8, and the storage that they get: `--quantize fp8`.

All projections and experts: 99.4 % of the 24B's parameters. Left alone: the router (which experts are chosen), norms,
conv taps, embedding and output head, biases.
"""

import torch
from torch import Tensor

from lfm.kernels.fp8 import FP8, quantise_rows
from lfm.kernels.weights import ExpertScales
from lfm.model.lfm2 import Experts, Lfm2, Weight
from lfm.model.names import is_quantised


def make_room_for_scales(model: Lfm2, parameter: str, *, device: torch.device) -> Tensor:
    """The uninitialised scales, in fp32, of a parameter that is to hold fp8: shaped like it, without its last axis."""
    owner_name, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(owner_name)
    scale = torch.empty(getattr(owner, leaf).shape[:-1], dtype=torch.float32, device=device)
    if isinstance(owner, Experts):
        both = owner.scales or ExpertScales(scale, scale)
        owner.scales = both._replace(**{leaf.removesuffix("_proj"): scale})
    else:
        assert isinstance(owner, Weight)
        owner.scale = scale
    return scale


@torch.no_grad()
def quantise(model: Lfm2) -> Lfm2:
    """Give the projections and experts of a loaded model fp8 weights, in place. Before `pack`. Returns the model."""
    for name, parameter in list(model.named_parameters()):
        if not is_quantised(name):
            continue
        scale = make_room_for_scales(model, name, device=parameter.device)
        owner_name, _, leaf = name.rpartition(".")
        weight = torch.empty_like(parameter, dtype=FP8)
        for part, target, scale_part in zip(*_by_matrix(parameter, weight, scale), strict=True):
            write_rows(part, target, scale_part)
        setattr(model.get_submodule(owner_name), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return model


def write_rows(values: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Store rows [..., in] of any float dtype as fp8 and scales."""
    quantised, scales = quantise_rows(values)
    weight.copy_(quantised)
    scale.copy_(scales)


def _by_matrix(values: Tensor, weight: Tensor, scale: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Expert by expert where there are experts: small fp32 drafts."""
    together = (values, weight, scale)
    return tuple(tensor.unbind(0) for tensor in together) if values.dim() == 3 else tuple((t,) for t in together)
