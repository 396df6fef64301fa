"""A model of which every process holds a part, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

The parts are the fp32 masters. Each layer's weights are gathered in the dtype that the model computes in when the layer
runs, and again in its backward; its gradients are added up over the processes in fp32, and each gets those of its part.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lfm.config import ModelConfig
from lfm.model.lfm2 import Lfm2
from lfm.train.models import build_model
from lfm.train.world import World


def build_sharded_model(config: ModelConfig, *, device: torch.device, dtype: torch.dtype, world: World) -> Lfm2:
    """A model with uninitialised masters in fp32, of which this process has its rows; it computes in `dtype`."""
    model = build_model(config, device=torch.device("meta"), dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=world.mesh, reshard_after_forward=True, mp_policy=policy)
    # Of the embedding, the loss reads the whole after the forward.
    fully_shard(model, mesh=world.mesh, reshard_after_forward=False, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are shares of the whole step's already: gradients are added, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model.to_empty(device=device)


class ShardedMasters:
    """As `MasterWeights`, of this process's rows. `tensors` are plain tensors over the memory of FSDP's parts."""

    is_apart = False

    def __init__(self, model: Lfm2, values: Mapping[str, Tensor]) -> None:
        """Copy `values`, this process's rows on any device, into the model."""
        self.num_rows = {name: parameter.shape[0] for name, parameter in model.named_parameters()}
        self._parameters: dict[str, DTensor] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            parameter.requires_grad_(True)
            self._parameters[name] = parameter
            with torch.no_grad():
                self.tensors[name] = parameter.to_local()
                self.tensors[name].copy_(values[name])

    def round_into_model(self) -> None:
        """Nothing to do: weights are rounded where they are gathered."""

    def clear_gradients(self) -> None:
        for parameter, tensor in zip(self._parameters.values(), self.tensors.values(), strict=True):
            parameter.grad = tensor.grad = None

    def take_gradients(self) -> None:
        """Give `tensors` the gradients that the backward left in FSDP's parts."""
        for name, tensor in self.tensors.items():
            parameter = self._parameters[name]
            assert isinstance(parameter.grad, DTensor), f"{name} has no gradient"
            assert parameter.to_local().data_ptr() == tensor.data_ptr(), f"FSDP has moved {name}"
            tensor.grad = parameter.grad.to_local()


def whole_model(config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> Lfm2:
    """A model on the CPU with the weights of a whole `Learner.state`, rounded to `dtype`: what a checkpoint holds."""
    model = build_model(config, device=torch.device("cpu"), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"master/{name}"])
        for name, buffer in model.named_buffers():
            buffer.copy_(state[f"buffer/{name}"])
    return model
