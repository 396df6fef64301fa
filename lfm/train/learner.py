"""One optimizer step: forward, backward over the micro-batches, clipping, update, balancing of the experts."""

import functools
import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lfm.errors import UsageError
from lfm.model.lfm2 import Lfm2
from lfm.train.batches import TrainBatch, tensors_of, to_device, with_tensors
from lfm.train.fusion import compiler_errors
from lfm.train.graphs import Recording
from lfm.train.loss import chunked_cross_entropy, select_rows
from lfm.train.masters import MasterWeights
from lfm.train.models import fill_buffers
from lfm.train.ops import train_ops
from lfm.train.optimizer import clip_gradients, gradient_norm, learning_rate_at, make_optimizers
from lfm.train.recipe import TrainRecipe
from lfm.train.routing import RouteRecorder, balance_experts, load_entropy
from lfm.train.steps import StepData

_log = logging.getLogger(__name__)


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
        # One stream for all work: what autograd remembers of a stream must hold while a step is recorded.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._template: TrainBatch | None = None
        self._recorded_backward = Recording(self._backward, stream=self._stream)
        self._recorded_update = Recording(self._update, stream=self._stream)

    def step(self, data: StepData, step: int) -> StepResult:
        """Do step number `step`. Raises NonFiniteError, with the weights untouched, if no update can be made of it."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return self._step(data, step)

    def _step(self, data: StepData, step: int) -> StepResult:
        recipe, masters = self._recipe, self.masters.tensors.values()
        try:
            loss, router_z, norm, load_ME = self._gradients(data)
        except compiler_errors() as error:
            # Some version of the compiler fails on some shape; the weights are still those of before the step.
            _log.warning("torch.compile failed (%s); training goes on without it, more slowly", error)
            torch.compiler.set_stance("force_eager")
            loss, router_z, norm, load_ME = self._gradients(data)
        if not (math.isfinite(loss) and math.isfinite(router_z) and math.isfinite(norm)):
            raise NonFiniteError(f"Step {step + 1} has loss {loss} and gradient norm {norm}")
        clip_gradients(masters, norm=norm, max_norm=recipe.optimizer.clip_norm)
        learning_rate = learning_rate_at(step, recipe.optimizer.learning_rate, recipe.schedule)
        self._recorded_update(self._tensor(learning_rate))
        return StepResult(loss, router_z, learning_rate, norm, load_entropy(load_ME))

    def _tensor(self, value: float | list[float]) -> Tensor:
        tensor = torch.tensor(value, dtype=torch.float32)
        return tensor if self._stream is None else tensor.pin_memory().to(self._device, non_blocking=True)

    def _gradients(self, data: StepData) -> tuple[float, float, float, Tensor]:
        """Add up the micro-batches' gradients. Returns the step's loss, router z-loss and the gradients' norm, and
        the load of the experts on the CPU. All of it comes by one synchronisation."""
        self.masters.clear_gradients()
        self._recorder.reset_load()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for batch in data.batches:
            self._template = batch = to_device(batch, self._device)
            shares = [1 / data.num_targets, batch.num_tokens / data.num_tokens]
            sums += self._recorded_backward(*tensors_of(batch), self._tensor(shares))[0]
        norm = gradient_norm(self.masters.tensors.values())
        load_ME = self._recorder.load_ME
        results = torch.cat((sums, norm.to(sums)[None], load_ME.flatten().to(sums))).cpu()
        loss, router_z, norm = results[:3].tolist()
        return loss, router_z, norm, results[3:].view_as(load_ME)

    def _backward(self, *tensors: Tensor) -> tuple[Tensor]:
        """Add a micro-batch's gradient; return its part of the step's loss and router z-loss, still on the device.

        The last tensor holds one over the step's targets, and the batch's share of its tokens.
        """
        model, settings = self.model, self._recipe.loss
        assert self._template is not None
        batch, shares_2 = with_tensors(self._template, tensors[:-1]), tensors[-1]
        self._recorder.begin()
        hidden_TD = model(batch.forward, None, self._ops)
        router_z = self._recorder.end()
        head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        token_loss = chunked_cross_entropy(
            select_rows(hidden_TD, batch.predicting_R),
            head.weight,
            batch.targets_R,
            z_weight=settings.output_z,
            chunk_tokens=settings.chunk_tokens,
        )
        if router_z is None:
            router_z = torch.zeros_like(token_loss.cross_entropy)
        router_z = router_z * shares_2[1]
        (token_loss.objective * shares_2[0] + settings.router_z * router_z).backward()
        return (torch.stack((token_loss.cross_entropy * shares_2[0], router_z.detach())).double(),)

    def _update(self, learning_rate: Tensor) -> tuple[Tensor, ...]:
        """Change the weights by their gradients, and the selection biases by the load."""
        self._optimizers.step(learning_rate if learning_rate.is_cuda else learning_rate.item())
        self.masters.round_into_model()
        balance_experts(self.model, self._recorder.load_ME, rate=self._recipe.loss.balance_rate)
        return ()

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
