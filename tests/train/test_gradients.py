"""Gradients of the whole model: packed against one row at a time, and against transformers, in fp32."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

from lfm.kernels.norm import rms_norm_ref
from lfm.kernels.weights import Norm, Router
from lfm.model.full_forward import packed_batch
from lfm.model.lfm2 import Lfm2
from lfm.model.ops import PACKED, Ops
from lfm.train.batches import BatchSize, TrainBatch, collate, to_device
from lfm.train.dataset import Row
from lfm.train.learner import recompute_layers
from lfm.train.loss import chunked_cross_entropy, select_rows
from lfm.train.ops import train_ops
from lfm.train.routing import RouteRecorder
from tests.train.models import ATTENTION, CONV, lively_model, random_rows, tiny_config

torch.set_num_threads(1)
CASES = {
    "conv then attention": {"layer_types": (CONV, ATTENTION)},
    "24B-like mix": {"layer_types": (CONV, CONV, ATTENTION, CONV, CONV, CONV, ATTENTION, CONV), "num_dense_layers": 2},
    "window 5 with bias": {"layer_types": (CONV, ATTENTION, CONV), "conv_L_cache": 5, "conv_bias": True},
    "untied head": {"layer_types": (CONV, ATTENTION), "tie_word_embeddings": False},
    "raw router weights": {"layer_types": (CONV, ATTENTION), "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "all dense": {"layer_types": (CONV, ATTENTION), "num_dense_layers": 2},
}
LENGTHS = [2, 9, 3, 33, 5]


def loss_of(model: Lfm2, batch: TrainBatch, ops: Ops) -> torch.Tensor:
    head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    return chunked_cross_entropy(
        select_rows(model(batch.forward, None, ops), batch.predicting_R), head.weight, batch.targets_R, chunk_tokens=7
    ).objective


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, grad in mine.items():
        scale = max(theirs[name].abs().max().item(), 1e-6)
        assert (grad - theirs[name]).abs().max() <= tolerance * scale, name


def recording_ops(model: Lfm2) -> tuple[Ops, RouteRecorder]:
    recorder = RouteRecorder(model.config, torch.device("cpu"))
    recorder.begin()
    return train_ops(recorder), recorder


def test_a_packed_batch_is_the_one_of_full_recompute() -> None:
    rows = random_rows(LENGTHS)
    batch = collate(rows).forward
    expected = packed_batch([row.ids[:-1].tolist() for row in rows], torch.device("cpu"))
    for name in ("ids_T", "positions_T", "rows_T", "starts_S", "row_starts_S1"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    assert (batch.row_starts, batch.starts, batch.num_positions) == (
        expected.row_starts,
        expected.starts,
        expected.num_positions,
    )


def test_targets_are_the_next_ids_that_are_to_be_predicted() -> None:
    row = Row(torch.arange(10, 15).numpy(), torch.tensor([True, False, True, False, True]).numpy())
    batch = collate([row, row])
    assert batch.forward.ids_T.tolist() == [10, 11, 12, 13] * 2
    assert batch.predicting_R.tolist() == [1, 3, 5, 7]
    assert batch.targets_R.tolist() == [12, 14] * 2
    assert batch.num_targets == 4


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(case: str) -> None:
    """In fp64: neither the convolution nor attention looks across a boundary, forwards or backwards."""
    model = lively_model(tiny_config(**CASES[case]), dtype=torch.float64).requires_grad_()
    rows = random_rows(LENGTHS)
    ops, _ = recording_ops(model)
    packed = loss_of(model, collate(rows), ops)
    packed.backward()
    together = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    losses = []
    for row in rows:  # the plain ops, one row at a time
        losses.append(loss_of(model, collate([row]), PACKED))
        losses[-1].backward()
    torch.testing.assert_close(packed, torch.stack(losses).sum())
    assert_same_gradients(together, gradients(model), 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_transformers(case: str) -> None:
    config = tiny_config(**CASES[case])
    ours = lively_model(config).requires_grad_()
    settings = {name: getattr(config, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_dense_layers", "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok",
        "conv_L_cache", "conv_bias", "norm_eps", "norm_topk_prob", "routed_scaling_factor", "tie_word_embeddings",
    )}  # fmt: skip
    theirs_config = Lfm2MoeConfig(**settings, layer_types=list(config.layer_types), rope_theta=config.rope_theta)
    theirs_config._attn_implementation = "eager"
    theirs = Lfm2MoeForCausalLM(theirs_config).eval()
    state = ours.state_dict()
    theirs.load_state_dict(
        state if "lm_head.weight" in state else state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    )
    rows = random_rows(LENGTHS)
    ops, _ = recording_ops(ours)
    loss = loss_of(ours, collate(rows), ops)
    loss.backward()
    total = torch.zeros(())
    for row in rows:
        batch = collate([row])
        logits = theirs(batch.forward.ids_T[None], use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[batch.predicting_R], batch.targets_R, reduction="sum")
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(ours), gradients(theirs), 1e-3)


def test_recomputing_layers_changes_no_gradient_and_counts_no_token_twice() -> None:
    config = tiny_config((CONV, ATTENTION, CONV))
    results = []
    for recomputes in (False, True):
        model = lively_model(config).requires_grad_()
        if recomputes:
            recompute_layers(model)
        ops, recorder = recording_ops(model)
        loss = loss_of(model, collate(random_rows(LENGTHS)), ops)
        z_loss = recorder.end()
        assert z_loss is not None
        (loss + z_loss).backward()
        results.append((gradients(model), recorder.load_ME.clone()))
    (plain, plain_load), (recomputed, recomputed_load) = results
    assert torch.equal(plain_load, recomputed_load)
    assert all(torch.equal(grad, recomputed[name]) for name, grad in plain.items())


def test_padding_to_a_size_changes_no_gradient() -> None:
    """Batches of one size, as a GPU gets them: rows and predictions that were added cost nothing."""
    size = BatchSize(tokens=96, rows=12, positions=40, predictions=32)
    rows = random_rows(LENGTHS)
    found = []
    for batch in (collate(rows), collate(rows, size=size)):
        model = lively_model(tiny_config(), dtype=torch.float64).requires_grad_()
        loss_of(model, batch, PACKED).backward()
        found.append(gradients(model))
    assert batch.forward.ids_T.shape == (96,)
    assert batch.forward.row_starts_S1.shape == (13,)
    assert batch.predicting_R.shape == batch.targets_R.shape == (64,)
    assert batch.num_tokens == sum(LENGTHS) - len(LENGTHS)
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-9, atol=1e-12)


def with_routes(ops: Ops, chosen: Sequence[torch.Tensor]) -> Ops:
    """The same ops, but each MoE layer in turn sends its tokens where `chosen` says; gradients are as ever."""
    remaining = iter(chosen)

    def route(
        h_TD: torch.Tensor, norm: Norm, router: Router, is_real_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_TD, chosen_TA = rms_norm_ref(h_TD, norm), next(remaining)
        weights_TA = torch.nn.functional.linear(x_TD, router.gate).sigmoid().gather(1, chosen_TA)
        return x_TD, chosen_TA, weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-6) * router.scale

    return replace(ops, route=route)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by the compiler, which asks for it
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_bf16_gradients_are_near_those_in_fp64(device: str) -> None:
    """On a GPU: grouped products and variable-length attention instead of the plain loops, at head sizes they take.

    A token whose experts nearly tie goes elsewhere in bf16, and everything before that layer then has another
    gradient, so the run in fp64 takes the routes of the one in bf16.
    """
    config = tiny_config(
        (CONV, ATTENTION, CONV, ATTENTION),
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        moe_intermediate_size=64,
    )
    chosen: list[torch.Tensor] = []
    model = lively_model(config, dtype=torch.bfloat16).to(device).requires_grad_()
    recorder = RouteRecorder(config, torch.device(device))
    recorder.begin()
    ops = train_ops(recorder)

    def noted(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        routed = recorder.route(*arguments)
        chosen.append(routed[1].cpu())
        return routed

    batch = collate(random_rows(LENGTHS))
    loss = loss_of(model, to_device(batch, torch.device(device)), replace(ops, route=noted))
    loss.backward()
    exact_model = lively_model(config, dtype=torch.bfloat16).double().requires_grad_()  # the rounded weights
    exact_loss = loss_of(exact_model, batch, with_routes(PACKED, chosen))
    exact_loss.backward()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.02)
    exact = gradients(exact_model)
    for name, grad in gradients(model).items():
        error = (grad.double().cpu() - exact[name]).norm() / exact[name].norm()
        assert error < 0.15, name
