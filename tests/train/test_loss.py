"""Chunked cross-entropy and the distillation loss: values against the plain formula, gradients against fp64."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from lfm.train.batches import NO_TARGET
from lfm.train.distill import decoupled_top_k_loss
from lfm.train.loss import chunked_cross_entropy

torch.set_num_threads(1)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(17, 6, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 17, (11,), generator=generator)
    targets[[0, 4, 10]] = NO_TARGET
    return hidden, head, targets


@pytest.mark.parametrize("chunk_tokens", [1, 3, 11, 100])
def test_chunks_give_the_loss_and_gradients_of_the_whole(chunk_tokens: int) -> None:
    hidden, head, targets = inputs()
    loss = chunked_cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens)
    (loss.objective * 0.3).backward()
    expected_hidden, expected_head = hidden.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
    expected = cross_entropy(expected_hidden @ expected_head.T, targets, ignore_index=NO_TARGET, reduction="sum")
    (expected * 0.3).backward()
    torch.testing.assert_close(loss.objective, expected)
    torch.testing.assert_close(loss.cross_entropy, expected)
    torch.testing.assert_close(hidden.grad, expected_hidden.grad)
    torch.testing.assert_close(head.grad, expected_head.grad)


def test_gradients_with_the_z_loss_equal_finite_differences() -> None:
    hidden, head, targets = inputs()

    def objective(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(hidden, head, targets, z_weight=0.1, chunk_tokens=4).objective

    assert torch.autograd.gradcheck(objective, (hidden, head))


def test_the_z_loss_is_no_part_of_the_cross_entropy() -> None:
    hidden, head, targets = inputs()
    with_z, without = (chunked_cross_entropy(hidden, head, targets, z_weight=z) for z in (0.1, 0.0))
    assert with_z.cross_entropy == without.cross_entropy
    assert with_z.objective > without.objective


def test_bf16_stays_near_fp64() -> None:
    hidden, head, targets = inputs()
    exact = chunked_cross_entropy(hidden, head, targets).objective
    low_hidden = hidden.detach().bfloat16().requires_grad_()
    low_head = head.detach().bfloat16().requires_grad_()
    low = chunked_cross_entropy(low_hidden, low_head, targets)
    low.objective.backward()
    assert low.objective.dtype == torch.float32
    assert low_head.grad is not None
    assert low_head.grad.dtype == torch.bfloat16
    assert abs(low.objective.item() - exact.item()) < 0.02 * exact.item()


def test_a_batch_without_targets_costs_nothing() -> None:
    hidden, head, targets = inputs()
    loss = chunked_cross_entropy(hidden, head, torch.full_like(targets, NO_TARGET), z_weight=0.1)
    loss.objective.backward()
    assert loss.objective == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


def teacher_and_student() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(3 * torch.randn(5, 13, generator=generator, dtype=torch.float64) for _ in range(2))


def stored(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top = teacher.topk(k, dim=-1)
    return top.indices, top.values, teacher.logsumexp(-1)


def test_with_all_logits_the_loss_is_the_divergence() -> None:
    teacher, student = teacher_and_student()
    loss = decoupled_top_k_loss(student, *stored(teacher, 13))
    expected = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_two_terms_are_those_of_the_chain_rule(k: int) -> None:
    """KL(P || S) = KL of the coins + P(T) KL inside T + P(not T) KL outside T; the loss is the first two."""
    teacher, student = teacher_and_student()
    ids, logits, lse = stored(teacher, k)
    p, q = teacher.softmax(-1), student.softmax(-1)
    inside_p, inside_q = p.gather(1, ids), q.gather(1, ids)
    coin_p, coin_q = inside_p.sum(-1), inside_q.sum(-1)
    mask = torch.ones_like(p, dtype=torch.bool).scatter(1, ids, False)
    outside = (p * (p / (1 - coin_p)[:, None] / (q / (1 - coin_q)[:, None])).log() * mask).sum(-1)
    whole = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(decoupled_top_k_loss(student, ids, logits, lse), whole - outside)


def test_the_temperature_softens_only_the_second_term() -> None:
    teacher, student = teacher_and_student()
    ids, logits, lse = stored(teacher, 4)
    p, s = teacher.softmax(-1).gather(1, ids).sum(-1), student.softmax(-1).gather(1, ids).sum(-1)
    coins = p * (p / s).log() + (1 - p) * ((1 - p) / (1 - s)).log()
    soft_p, soft_s = (logits / 2).softmax(-1), (student.gather(1, ids) / 2).softmax(-1)
    expected = coins + p * (soft_p * (soft_p / soft_s).log()).sum(-1)
    torch.testing.assert_close(decoupled_top_k_loss(student, ids, logits, lse, temperature=2.0), expected)


def test_a_student_equal_to_its_teacher_has_loss_and_gradient_zero() -> None:
    teacher, _ = teacher_and_student()
    student = teacher.clone().requires_grad_()
    loss = decoupled_top_k_loss(student, *stored(teacher, 4), temperature=1.5)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-12, rtol=0)


def test_the_gradient_equals_finite_differences() -> None:
    teacher, student = teacher_and_student()
    ids, logits, lse = stored(teacher, 4)
    student = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: decoupled_top_k_loss(s, ids, logits, lse, temperature=1.7), (student,))


def test_a_teacher_that_is_certain_gives_finite_numbers_in_fp32() -> None:
    teacher = torch.tensor([[80.0, 0.0, -5.0, 1.0]])
    student = torch.tensor([[-60.0, 2.0, 1.0, 0.0]], requires_grad=True)
    loss = decoupled_top_k_loss(student, *stored(teacher, 2))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    assert loss.item() > 50
