"""One optimizer step: forward, backward over the micro-batches, clipping, update, balancing of the experts."""

import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lfm.errors import UsageError
from lfm.model.lfm2 import Lfm2
from lfm.model.names import is_fp32
from lfm.train.batches import TrainBatch, tensors_of, to_device, with_tensors
from lfm.train.distill import TopK, chunked_distillation
from lfm.train.fusion import compiler_errors
from lfm.train.graphs import Recording
from lfm.train.loss import TokenLoss, chunked_cross_entropy, select_rows
from lfm.train.masters import MasterWeights
from lfm.train.models import fill_buffers
from lfm.train.ops import train_ops
from lfm.train.optimizer import clip_gradients, gradient_norm, learning_rate_at, make_optimizers
from lfm.train.recipe import TrainRecipe
from lfm.train.routing import RouteRecorder, balance_experts, load_entropy
from lfm.train.sharding import ShardedMasters
from lfm.train.steps import StepData
from lfm.train.teacher import Teacher
from lfm.train.world import World

_log = logging.getLogger(__name__)


class NonFiniteError(UsageError):
    """A loss or gradient became infinite or NaN. The weights are those of before the step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Means over the step's targets (loss, distill_loss) and tokens (router z-loss); `balance` per MoE layer, see
    load_entropy. `loss` is the cross-entropy, whatever else is learnt."""

    loss: float
    router_z_loss: float
    distill_loss: float
    learning_rate: float
    grad_norm: float
    balance: list[float]


class Learner:
    """A model in training, with everything that a checkpoint has to hold beside the position in the data."""

    def __init__(
        self,
        model: Lfm2,
        weights: Mapping[str, Tensor],
        recipe: TrainRecipe,
        *,
        world: World | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """`model` has storage but no values yet; `weights`, in fp32, become its masters.

        In a `world` of several processes the model is sharded, and the weights are this process's `own_part`.
        """
        self.model, self._recipe, self._teacher = model, recipe, teacher
        self._world = world or World()
        self._device = model.model.embed_tokens.weight.device
        weights = {name: tensor.to(self._device) for name, tensor in weights.items()}
        fill_buffers(model, weights)
        is_sharded = self._world.size > 1
        self.masters = ShardedMasters(model, weights) if is_sharded else MasterWeights(model, weights)
        self._optimizers = make_optimizers(self.masters.tensors, recipe.optimizer, world=self._world)
        self._recorder = RouteRecorder(model.config, self._device)
        self._ops = train_ops(self._recorder)
        if recipe.run.checkpoint_activations:
            recompute_layers(model)
        # One stream for all work: what autograd remembers of a stream must hold while a step is recorded.
        # FSDP keeps streams and events of its own, so several processes run their steps as they are written.
        is_recorded = self._device.type == "cuda" and not is_sharded
        self._stream = torch.cuda.Stream(self._device) if is_recorded else None
        self._template: TrainBatch | None = None
        self._recorded_backward = Recording(self._backward, stream=self._stream)
        self._recorded_update = Recording(self._update, stream=self._stream)

    def step(self, data: StepData, step: int) -> StepResult:
        """Do step number `step`. Raises NonFiniteError, with the weights untouched, if no update can be made of it."""
        with self._on_stream():
            return self._step(data, step)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Work in the body runs on the learner's stream, after what was asked for before it and before what comes
        after it: a checkpoint must not read weights while they change."""
        if self._stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def _step(self, data: StepData, step: int) -> StepResult:
        recipe, masters = self._recipe, self.masters.tensors.values()
        try:
            (loss, router_z, distilled), norm, load_ME = self._gradients(data)
        except compiler_errors() as error:
            # Some version of the compiler fails on some shape; the weights are still those of before the step.
            _log.warning("torch.compile failed (%s); training goes on without it, more slowly", error)
            torch.compiler.set_stance("force_eager")
            (loss, router_z, distilled), norm, load_ME = self._gradients(data)
        if not all(map(math.isfinite, (loss, router_z, distilled, norm))):
            raise NonFiniteError(f"Step {step + 1} has loss {loss} and gradient norm {norm}")
        clip_gradients(masters, norm=norm, max_norm=recipe.optimizer.clip_norm)
        learning_rate = learning_rate_at(step, recipe.optimizer.learning_rate, recipe.schedule)
        self._recorded_update(self._tensor(learning_rate))
        return StepResult(loss, router_z, distilled, learning_rate, norm, load_entropy(load_ME))

    def _tensor(self, value: float | list[float]) -> Tensor:
        tensor = torch.tensor(value, dtype=torch.float32)
        return tensor if self._stream is None else tensor.pin_memory().to(self._device, non_blocking=True)

    def _gradients(self, data: StepData) -> tuple[list[float], float, Tensor]:
        """Add up the micro-batches' gradients. Returns the step's losses, as `_backward`, the gradients' norm, and
        the load of the experts on the CPU. All of it comes by one synchronisation."""
        self.masters.clear_gradients()
        self._recorder.reset_load()
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for batch in data.batches:
            self._template = batch = to_device(batch, self._device)
            shares = [1 / data.num_targets, batch.num_tokens / data.num_tokens]
            sums += self._recorded_backward(*tensors_of(batch), self._tensor(shares))[0]
        if isinstance(self.masters, ShardedMasters):
            self.masters.take_gradients()
        norm = gradient_norm(self.masters.tensors.values())
        results = torch.cat((sums, norm.to(sums)[None], self._recorder.load_ME.flatten().to(sums)))
        results = self._over_processes(results).cpu()
        return results[:3].tolist(), results[3].item(), results[4:].view_as(self._recorder.load_ME)

    def _over_processes(self, results: Tensor) -> Tensor:
        """Losses, norm and load of the whole step from those of each process; the load also for the balancing."""
        if self._world.size > 1:
            results[3].square_()
            self._world.add_up(results)
            results[3].sqrt_()
            self._recorder.load_ME.copy_(results[4:].view_as(self._recorder.load_ME))
        return results

    def _backward(self, *tensors: Tensor) -> tuple[Tensor]:
        """Add a micro-batch's gradient; return its part of the step's loss, router z-loss and distillation loss, still
        on the device.

        The last tensor holds one over the step's targets, and the batch's share of its tokens.
        """
        settings = self._recipe.loss
        assert self._template is not None
        batch, shares_2 = with_tensors(self._template, tensors[:-1]), tensors[-1]
        taught = None if self._teacher is None else self._teacher.top_k(batch, chunk_tokens=settings.chunk_tokens)
        self._recorder.begin()
        hidden_RD = self._hidden(batch)
        router_z = self._recorder.end()
        token_loss = self._cross_entropy(hidden_RD, batch)
        objective, distilled = token_loss.objective, torch.zeros_like(token_loss.cross_entropy)
        if taught is not None:
            objective, distilled = self._distilled(objective, hidden_RD, batch, taught)
        if router_z is None:
            router_z = torch.zeros_like(token_loss.cross_entropy)
        router_z = router_z * shares_2[1]
        (objective * shares_2[0] + settings.router_z * router_z).backward()
        losses = (token_loss.cross_entropy * shares_2[0], router_z.detach(), distilled.detach() * shares_2[0])
        return (torch.stack(losses).double(),)

    def _hidden(self, batch: TrainBatch) -> Tensor:
        """The last hidden states of the tokens that predict."""
        return select_rows(self.model(batch.forward, None, self._ops), batch.predicting_R)

    @property
    def _head(self) -> Tensor:
        model = self.model
        weight = (model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head).weight
        assert isinstance(weight, Tensor)
        return weight

    def _cross_entropy(self, hidden_RD: Tensor, batch: TrainBatch) -> TokenLoss:
        settings = self._recipe.loss
        return chunked_cross_entropy(
            hidden_RD,
            self._head,
            batch.targets_R,
            z_weight=settings.output_z,
            chunk_tokens=settings.chunk_tokens,
        )

    def _distilled(
        self, objective: Tensor, hidden_RD: Tensor, batch: TrainBatch, taught: TopK
    ) -> tuple[Tensor, Tensor]:
        """The objective with the teacher's share in it, and the distillation loss alone."""
        settings = self._recipe.distill
        assert settings is not None, "there is a teacher"
        distilled = chunked_distillation(
            hidden_RD,
            self._head,
            batch.targets_R,
            taught,
            temperature=settings.temperature,
            chunk_tokens=self._recipe.loss.chunk_tokens,
        )
        return objective.lerp(distilled, settings.weight), distilled

    def _update(self, learning_rate: Tensor) -> tuple[Tensor, ...]:
        """Change the weights by their gradients, and the selection biases by the load."""
        self._optimizers.step(learning_rate if learning_rate.is_cuda else learning_rate.item())
        self.masters.round_into_model()
        balance_experts(self.model, self._recorder.load_ME, rate=self._recipe.loss.balance_rate)
        return ()

    @torch.no_grad()
    def validation_loss(self, batches: Iterable[TrainBatch]) -> float:
        """The mean cross-entropy over all targets of the batches; every process computes all of it.

        On a GPU without the compiler, which would have to compile everything once more for it.
        """
        with (
            self._on_stream(),
            torch.compiler.set_stance("force_eager") if self._device.type == "cuda" else nullcontext(),
        ):
            sums = torch.zeros(2, dtype=torch.float64, device=self._device)
            for batch in batches:
                batch = to_device(batch, self._device)
                loss = self._cross_entropy(self._hidden(batch), batch).cross_entropy
                sums += torch.stack((loss, loss.new_tensor(batch.num_targets)))
            loss, num_targets = sums.tolist()
            return loss / num_targets

    def state(self) -> dict[str, Tensor]:
        """Masters, selection biases and optimizer state, as one set of named tensors.

        Of a sharded model they are whole, on the CPU, and in the first process only; all processes have to ask.
        """
        tensors = {f"master/{name}": tensor for name, tensor in self.masters.tensors.items()}
        tensors |= {f"buffer/{name}": tensor for name, tensor in self.model.named_buffers()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self._optimizers.state().items()}
        return self._gathered(tensors) if isinstance(self.masters, ShardedMasters) else tensors

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(self.masters, ShardedMasters)
        found = {}
        for name, tensor in tensors.items():
            if is_cut(name, tensor):
                parameter = name.partition("/")[2]
                num_rows = self.masters.num_rows.get(parameter) or self.masters.num_rows[parameter.rpartition("/")[0]]
                tensor = self._world.whole(tensor, num_rows)
            if self._world.is_first:
                found[name] = tensor.detach().cpu()
        return found

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


def is_cut(name: str, tensor: Tensor) -> bool:
    """Whether several processes each hold some rows of this entry of `Learner.state`, rather than all of it."""
    return tensor.dim() > 0 and not is_fp32(name)


def own_part(world: World, name: str, tensor: Tensor) -> Tensor:
    """What one process holds of a whole weight, or of an entry of a whole state."""
    return world.own_rows(tensor) if is_cut(name, tensor) else tensor


def recompute_layers(model: Lfm2) -> None:
    """Keep only each layer's input for the backward and run the layer again there: less memory for a third more work.

    Nothing in a layer is random, so no generator state has to be kept.
    """
    for layer in model.model.layers:
        forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = forward
