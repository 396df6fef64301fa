"""Small groups of weights that an op takes together."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """An RMSNorm: weight [D] and epsilon."""

    weight: Tensor
    eps: float


class Linear(NamedTuple):
    """A projection: weight [out, in] and, where the checkpoint has one, bias [out]."""

    weight: Tensor
    bias: Tensor | None = None


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
