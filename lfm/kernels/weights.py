"""Small groups of weights that an op takes together."""

from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """An RMSNorm: weight [D] and epsilon.

    `known` [T, D]: what it makes of the tensor that it is applied to next, where another op has made it already.
    """

    weight: Tensor
    eps: float
    known: Tensor | None = None


class Linear(NamedTuple):
    """A projection: weight [out, in] and, where the checkpoint has one, bias [out].

    A weight in fp8 (see fp8.py) stands for weight * scale[:, None], with `scale` [out] in fp32.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The weight in the dtype of activations."""
        return scaled(self.weight, self.scale, dtype)


class ExpertScales(NamedTuple):
    """The scales of a layer's experts in fp8: of gate and up [E, 2 F], and of down [E, D], in fp32."""

    gate_up: Tensor
    down: Tensor


def scaled(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a weight [..., in] with scales [...] of its rows stands for; without scales, the weight itself."""
    if scale is None:
        return weight
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.to(wide) * scale[..., None].to(wide)).to(dtype)


class Router(NamedTuple):
    """A sigmoid router: gate [E, D], selection bias [E] in fp32, and how many experts it chooses with what weights."""

    gate: Tensor
    bias: Tensor | None
    num_chosen: int
    normalise: bool
    scale: float


class Rope(NamedTuple):
    """Rotary tables over positions [P, K], in the activation dtype; the two halves of the last axis are equal."""

    cos: Tensor
    sin: Tensor
