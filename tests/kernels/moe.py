"""Random layers for the tests of the router and the experts."""

from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """Arguments of `experts`, in its order."""

    h: Tensor
    x: Tensor
    chosen: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor


class Sizes(NamedTuple):
    """Hidden size, experts, their width, experts per token."""

    hidden: int
    experts: int
    width: int
    chosen: int


def make_layer(
    num_tokens: int,
    sizes: Sizes,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    popular: int | None = None,
    padding: int = 0,
) -> Layer:
    """A layer whose tokens choose among the first `popular` experts only; the last `padding` tokens choose none."""
    generator = torch.Generator(device).manual_seed(num_tokens)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

    hidden, num_experts, width, num_chosen = sizes
    scores = torch.rand(num_tokens, popular or num_experts, generator=generator, device=device)
    chosen = scores.topk(num_chosen).indices
    chosen[num_tokens - padding :] = num_experts
    return Layer(
        h=draw(num_tokens, hidden),
        x=draw(num_tokens, hidden),
        chosen=chosen,
        weights=torch.rand(num_tokens, num_chosen, generator=generator, device=device),
        gate_up=draw(num_experts, 2 * width, hidden, scale=hidden**-0.5),
        down=draw(num_experts, hidden, width, scale=width**-0.5),
    )
