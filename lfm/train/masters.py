"""The weights that the optimizer changes, in fp32, beside the weights that the model computes with.

A bf16 weight cannot take steps smaller than 1/256 of itself, so the optimizer works on an fp32 master and rounds it
into the model after each step. Gradients of micro-batches are added up in fp32. A model that computes in fp32 is its
own master.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lfm.model.lfm2 import Lfm2


class MasterWeights:
    """Masters of all trained parameters of one model, by name. `tensors[name].grad` is the summed gradient."""

    def __init__(self, model: Lfm2, values: Mapping[str, Tensor]) -> None:
        """Take over `values` (fp32 or fp64, on the model's device) as masters, and round them into the model."""
        self._parameters = dict(model.named_parameters())
        dtype = next(iter(self._parameters.values())).dtype
        self.is_apart = dtype != next(iter(values.values())).dtype
        self.tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            if not self.is_apart:
                self.tensors[name] = parameter
                with torch.no_grad():
                    parameter.copy_(values[name])
                continue
            master = values[name].detach().clone()
            self.tensors[name] = master
            parameter.register_post_accumulate_grad_hook(_adder(master))
        if self.is_apart:
            self.round_into_model()

    @torch.no_grad()
    def round_into_model(self) -> None:
        """Give the model the masters' values in its own dtype."""
        if self.is_apart:
            names = list(self.tensors)
            torch._foreach_copy_([self._parameters[name] for name in names], [self.tensors[name] for name in names])

    def clear_gradients(self) -> None:
        """Set the gradients to zero where they are: a recorded backward adds to that memory."""
        gradients = [tensor.grad for tensor in self.tensors.values() if tensor.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)


def _adder(master: Tensor):
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.to(master.dtype)
        else:
            master.grad += parameter.grad
        parameter.grad = None  # its memory is free before the next layer's gradient is made

    return add
