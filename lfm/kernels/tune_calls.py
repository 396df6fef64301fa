"""What `lfm.kernels.tune` measures: public ops at the shapes of LFM2-24B-A2B, on weights larger than L2 together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfm.kernels import norm as projections
from lfm.kernels import short_conv
from lfm.kernels.experts import experts
from lfm.kernels.forward_batch import ForwardBatch
from lfm.kernels.fp8 import FP8
from lfm.kernels.moe_grouped import experts_grouped
from lfm.kernels.moe_grouped_fp8 import experts_grouped_fp8
from lfm.kernels.moe_small import experts_small
from lfm.kernels.tuned import WeightKind, grouped_tiles
from lfm.kernels.weights import ExpertScales, Linear, Norm

HIDDEN, DENSE, QKV, EXPERTS, WIDTH, CHOSEN = 2048, 11_776, 3072, 64, 1536, 4  # LFM2-24B-A2B
L2_BYTES = 100e6  # weights of one measurement are at least this large, twice the L2 of an H200


class Case(NamedTuple):
    """One entry of the tables: which part, which weights, which kernel and how many tokens."""

    part: str
    kind: WeightKind
    what: str
    tokens: int


class Tensors:
    """Weights and inputs of one case on a device (meta: for compiling), `copies` of the weights."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case = case
        self._device = device
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self._device).normal_(generator=self._generator)

    def linear(self, num_outputs: int, num_inputs: int) -> Linear:
        if self._case.kind == "bf16":
            return Linear(self.draw(num_outputs, num_inputs))
        scale = torch.full((num_outputs,), 1e-3, device=self._device)
        return Linear(self.draw(num_outputs, num_inputs).to(FP8), scale=scale)

    def norm(self) -> Norm:
        return Norm(self.draw(HIDDEN), 1e-5)

    def integers(self, values: Tensor) -> Tensor:
        return values.to(self._device)

    def routing(self, *, is_skewed: bool) -> Tensor:
        """Chosen experts [T, A], no expert twice."""
        generator = torch.Generator().manual_seed(1)
        popularity = 1 / torch.arange(1, EXPERTS + 1) if is_skewed else torch.ones(EXPERTS)
        weights = popularity.expand(self._case.tokens, EXPERTS)
        return self.integers(torch.multinomial(weights, CHOSEN, generator=generator))


def calls_of(case: Case, device: torch.device) -> list[list[Callable[[], Any]]]:
    """Launches to be timed together, one list per routing: each call has weights of its own."""
    tensors = Tensors(case, device)
    if case.part == "stream":
        return [_stream_calls(case, tensors)]
    item = 2 if case.kind == "bf16" else 1
    touched = min(EXPERTS, case.tokens * CHOSEN) * 3 * HIDDEN * WIDTH * item
    copies = _num_copies(touched, device)
    layers = [_expert_weights(case, tensors) for _ in range(copies)]
    h, x = tensors.draw(case.tokens, HIDDEN), tensors.draw(case.tokens, HIDDEN)
    shares = torch.full((case.tokens, CHOSEN), 0.25, device=device)
    run: Callable[..., Tensor] = {"pairs": experts_small, "grouped": _grouped, "prefill": experts}[case.part]
    return [
        [_bound(run, h, x, chosen, shares, *layer) for layer in layers]
        for chosen in (tensors.routing(is_skewed=False), tensors.routing(is_skewed=True))
    ]


def _grouped(*args: Any) -> Tensor:
    """The grouped products that the tables in force ask for, whatever they say of larger steps."""
    tokens, scales = len(args[0]), args[-1]
    kind: WeightKind = "bf16" if scales is None else "fp8"
    run = experts_grouped_fp8 if grouped_tiles(args[0].device, kind, tokens).is_all_fp8 else experts_grouped
    return run(*args)


def _bound(run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: run(*args)


def _num_copies(touched_bytes: float, device: torch.device) -> int:
    return 1 if device.type == "meta" else max(1, round(0.5 + L2_BYTES / touched_bytes))


def _expert_weights(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor, ExpertScales | None]:
    if case.kind == "bf16":
        return tensors.draw(EXPERTS, 2 * WIDTH, HIDDEN), tensors.draw(EXPERTS, HIDDEN, WIDTH), None
    gate_up = tensors.draw(EXPERTS, 2 * WIDTH, HIDDEN).to(FP8)
    down = tensors.draw(EXPERTS, HIDDEN, WIDTH).to(FP8)
    device = gate_up.device
    scales = ExpertScales(
        torch.full((EXPERTS, 2 * WIDTH), 1e-3, device=device), torch.full((EXPERTS, HIDDEN), 1e-3, device=device)
    )
    return gate_up, down, scales


def _stream_calls(case: Case, tensors: Tensors) -> list[Callable[[], Any]]:
    shapes = {
        "project": (HIDDEN, HIDDEN), "norm_project": (QKV, HIDDEN), "project_add": (HIDDEN, HIDDEN),
        "down": (HIDDEN, DENSE), "gate_up": (2 * DENSE, HIDDEN), "conv_in": (3 * HIDDEN, HIDDEN),
    }  # fmt: skip
    outputs, inputs = shapes[case.what]
    h, x, a_norm = tensors.draw(case.tokens, HIDDEN), tensors.draw(case.tokens, inputs), tensors.norm()
    item = 2 if case.kind == "bf16" else 1
    calls: list[Callable[[], Any]] = []
    for _ in range(_num_copies(outputs * inputs * item, h.device)):
        weight = tensors.linear(outputs, inputs)
        if case.what == "project":
            calls.append(_bound(projections.project, x, weight))
        elif case.what == "norm_project":
            calls.append(_bound(projections.norm_project, h, a_norm, weight))
        elif case.what in ("project_add", "down"):
            calls.append(_bound(projections.project_add, h, x, weight))
        elif case.what == "gate_up":
            calls.append(_bound(projections.gated, h, a_norm, weight))
        else:
            taps, tails = Linear(tensors.draw(HIDDEN, 3)), tensors.draw(case.tokens + 1, 2, HIDDEN)
            calls.append(_bound(short_conv.conv_in, h, a_norm, weight, taps, _decode_batch(case, tensors), tails))
    return calls


def _decode_batch(case: Case, tensors: Tensors) -> ForwardBatch:
    """Rows of one token each, as the short convolution sees them."""
    count = case.tokens
    rows = tensors.integers(torch.arange(count))
    ones = tensors.integers(torch.arange(1, count + 1))
    return ForwardBatch(
        ids_T=rows, positions_T=ones, rows_T=rows, slots_T=rows, starts_S=ones,
        row_starts_S1=tensors.integers(torch.arange(count + 1)), block_tables_SN=rows[:, None],
        tail_read_S=ones, tail_write_W=ones, tail_token_W=rows, sample_T=rows,
        row_starts=tuple(range(count + 1)), starts=(1,) * count, num_positions=count + 2,
    )  # fmt: skip
