"""One optimizer step: forward, backward over the micro-batches, clipping, update, balancing of the experts."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lfm.errors import UsageError
from lfm.model.lfm2 import Lfm2
from lfm.train.batches import TrainBatch, to_device
from lfm.train.loss import chunked_cross_entropy
from lfm.train.masters import MasterWeights
from lfm.train.models import fill_buffers
from lfm.train.ops import train_ops
from lfm.train.optimizer import clip_gradients, learning_rate_at, make_optimizers
from lfm.train.recipe import TrainRecipe
from lfm.train.routing import RouteRecorder, balance_experts, load_entropy
from lfm.train.steps import StepData


class NonFiniteError(UsageError):
    """A loss or gradient became infinite or NaN. The weights are those of before the step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Means over the step's targets (loss) and tokens (router z-loss); `balance` per MoE layer, see load_entropy."""

    loss: float
    router_z_loss: float
    learning_rate: float
    grad_norm: float
    balance: list[float]


class Learner:
    """A model in training, with everything that a checkpoint has to hold beside the position in the data."""

    def __init__(self, model: Lfm2, weights: Mapping[str, Tensor], recipe: TrainRecipe) -> None:
        """`model` has storage but no values yet; `weights`, in fp32, become its masters."""
        self.model, self._recipe = model, recipe
        self._device = model.model.embed_tokens.weight.device
        weights = {name: tensor.to(self._device) for name, tensor in weights.items()}
        fill_buffers(model, weights)
        self.masters = MasterWeights(model, weights)
        self._optimizers = make_optimizers(self.masters.tensors, recipe.optimizer)
        self._recorder = RouteRecorder(model.config, self._device)
        self._ops = train_ops(self._recorder)
        if recipe.run.checkpoint_activations:
            recompute_layers(model)

    def step(self, data: StepData, step: int) -> StepResult:
        """Do step number `step`. Raises NonFiniteError, with the weights untouched, if no update can be made of it."""
        recipe = self._recipe
        self.masters.clear_gradients()
        self._recorder.reset_load()
        sums = [self._backward(to_device(batch, self._device), data) for batch in data.batches]
        norm = clip_gradients(self.masters.tensors.values(), max_norm=recipe.optimizer.clip_norm)
        loss, router_z = torch.stack([torch.stack(pair) for pair in sums]).sum(0).tolist()
        if not (math.isfinite(loss) and math.isfinite(router_z) and math.isfinite(norm)):
            raise NonFiniteError(f"Step {step + 1} has loss {loss} and gradient norm {norm}")
        learning_rate = learning_rate_at(step, recipe.optimizer.learning_rate, recipe.schedule)
        self._optimizers.step(learning_rate)
        self.masters.round_into_model()
        balance_experts(self.model, self._recorder.load_ME, rate=recipe.loss.balance_rate)
        return StepResult(loss, router_z, learning_rate, norm, load_entropy(self._recorder.load_ME))

    def _backward(self, batch: TrainBatch, data: StepData) -> tuple[Tensor, Tensor]:
        """Add a micro-batch's gradient; return its part of the step's loss and router z-loss, still on the device."""
        model, settings = self.model, self._recipe.loss
        self._recorder.begin()
        hidden_TD = model(batch.forward, None, self._ops)
        router_z = self._recorder.end()
        head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        token_loss = chunked_cross_entropy(
            hidden_TD, head.weight, batch.targets_T, z_weight=settings.output_z, chunk_tokens=settings.chunk_tokens
        )
        objective = token_loss.objective / data.num_targets
        if router_z is None:
            router_z = torch.zeros_like(token_loss.cross_entropy)
        router_z = router_z * (batch.num_tokens / data.num_tokens)
        (objective + settings.router_z * router_z).backward()
        return token_loss.cross_entropy / data.num_targets, router_z.detach().to(token_loss.cross_entropy.dtype)

    def state(self) -> dict[str, Tensor]:
        """Masters, selection biases and optimizer state, as one set of named tensors."""
        tensors = {f"master/{name}": tensor for name, tensor in self.masters.tensors.items()}
        tensors |= {f"buffer/{name}": tensor for name, tensor in self.model.named_buffers()}
        return tensors | {f"optimizer/{name}": tensor for name, tensor in self._optimizers.state().items()}

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the optimizer's part of `state`; the weights were given to the constructor."""
        self._optimizers.load_state(
            {name.removeprefix("optimizer/"): t for name, t in tensors.items() if name.startswith("optimizer/")}
        )


def weights_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a saved `Learner.state`, as the constructor takes them."""
    return {
        name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(("master/", "buffer/"))
    }


def recompute_layers(model: Lfm2) -> None:
    """Keep only each layer's input for the backward and run the layer again there: less memory for a third more work.

    Nothing in a layer is random, so no generator state has to be kept.
    """
    for layer in model.model.layers:
        forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = forward
