"""Optimizers, learning-rate schedule, clipping: what turns summed gradients into the next weights.

AdamW alone, or Muon (Jordan et al., 2024) for the hidden matrices with AdamW for the rest. Muon's update is scaled by
0.2 * sqrt(larger side), which gives it AdamW's typical size (Liu et al., Moonlight, 2025), so that one learning rate
and one weight decay serve both.
Legend: N matrices of one shape, R rows, C columns.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lfm.train.recipe import OptimizerSettings, ScheduleSettings
from lfm.train.world import World

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: steep at zero, so few iterations are enough
_NEWTON_SCHULZ_STEPS = 5
_MUON_RMS = 0.2


def learning_rate_at(step: int, peak: float, schedule: ScheduleSettings) -> float:
    """The rate of step 0, 1, ...: linear warm-up to `peak`, then a cosine down to final_ratio * peak."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * cosine)


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The joint norm of all gradients, still on their device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], *, norm: float, max_norm: float) -> None:
    """Scale all gradients, whose joint norm is `norm`, so that it is at most `max_norm`."""
    if math.isfinite(norm) and norm > max_norm:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, max_norm / norm)


def orthogonalise(update_NRC: Tensor) -> Tensor:
    """Bring all singular values of each matrix near 1 (0.7 to 1.2) by the Newton-Schulz iteration; bf16 on a GPU."""
    is_tall = update_NRC.shape[-2] > update_NRC.shape[-1]
    x = update_NRC.bfloat16() if update_NRC.is_cuda else update_NRC
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(update_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix. Each parameter comes with the matrices [N, R, C] that it stacks.

    Where several processes hold a parameter's rows, each keeps the momentum of its own. Experts are whole matrices; of
    the others every process gathers the rows, orthogonalises the whole, and takes its own part of the result.
    """

    def __init__(
        self,
        params: list[tuple[Tensor, torch.Size]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        world: World | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([parameter for parameter, _ in params], defaults)
        self._world = world or World()
        self._groups: dict[torch.Size, list[tuple[Tensor, torch.Size]]] = {}
        for parameter, shape in params:
            self._groups.setdefault(shape[1:], []).append((parameter, shape))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no second evaluation exists here
        """One update. Matrices of one shape are orthogonalised together, whatever layer they belong to."""
        settings = self.param_groups[0]
        rate, momentum = settings["lr"], settings["momentum"]
        for members in self._groups.values():
            parameters = [parameter for parameter, _ in members]
            averages = self._look_ahead(parameters, momentum)
            updates = torch.cat([self._whole(a, shape) for a, (_, shape) in zip(averages, members, strict=True)])
            updates = orthogonalise(updates) * (rate * _MUON_RMS * math.sqrt(max(updates.shape[1:])))
            parts = updates.split([shape[0] for _, shape in members])
            torch._foreach_mul_(parameters, 1 - rate * settings["weight_decay"])
            torch._foreach_sub_(parameters, [self._own(part, p) for part, p in zip(parts, parameters, strict=True)])

    def _whole(self, average: Tensor, shape: torch.Size) -> Tensor:
        if average.dim() == 2:
            average = self._world.whole(average, shape[0] * shape[1])
        return average.view(shape)

    def _own(self, part_NRC: Tensor, parameter: Tensor) -> Tensor:
        if parameter.dim() == 2:
            part_NRC = self._world.own_rows(part_NRC.flatten(0, 1))
        return part_NRC.reshape(parameter.shape)

    def _look_ahead(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """Nesterov's look-ahead of the averaged gradients."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        averages = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, averages, momentum))


@dataclass(frozen=True, slots=True)
class Optimizers:
    """The optimizers of one training; every trained parameter belongs to exactly one of them."""

    all: tuple[torch.optim.Optimizer, ...]
    names: Mapping[Tensor, str]

    def step(self, learning_rate: float | Tensor) -> None:
        """One update. On a GPU the rate may be a tensor there, so that a recording can be told another one."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """All state tensors by "<parameter>/<name>", sorted; none before the first step."""
        tensors = {
            f"{self.names[parameter]}/{name}": value
            for optimizer in self.all
            for parameter, values in optimizer.state.items()
            for name, value in values.items()
        }
        return dict(sorted(tensors.items()))

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned. The tensors are kept, not copied."""
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            parameter, _, name = key.rpartition("/")
            by_parameter.setdefault(parameter, {})[name] = tensor
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if (values := by_parameter.get(self.names[parameter])) is not None:
                        optimizer.state[parameter] = values


def make_optimizers(
    parameters: Mapping[str, Tensor], settings: OptimizerSettings, *, world: World | None = None
) -> Optimizers:
    """Sort the parameters by what their names and shapes say about them. In a `world`, they are each process's rows."""
    world = world or World()
    matrices, decayed, plain = [], [], []
    for name, parameter in parameters.items():
        is_hidden_matrix = name.endswith("_proj.weight") or ".feed_forward.w" in name or ".experts." in name
        if is_hidden_matrix and settings.name == "muon":
            matrices.append((parameter, _matrices(name, parameter, world)))
        elif is_hidden_matrix or name.endswith(".gate.weight"):
            decayed.append(parameter)
        else:  # norms, biases, conv taps; the embedding: its rows are as rare as their tokens, decay would eat them
            plain.append(parameter)
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((decayed, settings.weight_decay), (plain, 0.0))
        if members
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
            capturable=next(iter(parameters.values())).is_cuda,
        )
    ]
    if matrices:
        optimizers.append(
            Muon(
                matrices,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                world=world,
            )
        )
    return Optimizers(tuple(optimizers), {parameter: name for name, parameter in parameters.items()})


def _matrices(name: str, parameter: Tensor, world: World) -> torch.Size:
    """The matrices [N, R, C] of a parameter that have nothing to do with each other: this process's experts, or all."""
    if parameter.dim() == 3:
        num, rows, columns = parameter.shape
        return torch.Size((2 * num, rows // 2, columns) if name.endswith("gate_up_proj") else (num, rows, columns))
    num = 3 if name.endswith("conv.in_proj.weight") else 1
    rows = world.num_rows(parameter)
    return torch.Size((num, rows // num, parameter.shape[1]))
