"""Experts under autograd: the same values as the serving op, gradients against fp64 and against the plain loop."""

import pytest
import torch

from lfm.kernels.experts import experts_ref
from lfm.train.experts import experts_train

torch.set_num_threads(1)
TOKENS, EXPERTS, CHOSEN = 7, 5, 2


def arguments(dtype: torch.dtype, *, hidden: int = 6, width: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (TOKENS, hidden),
        (TOKENS, hidden),
        (TOKENS, CHOSEN),
        (EXPERTS, 2 * width, hidden),
        (EXPERTS, hidden, width),
    ]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def chosen() -> torch.Tensor:
    """Expert 3 gets no token, expert 0 most of them."""
    return torch.tensor([[0, 1], [0, 2], [4, 0], [0, 1], [1, 2], [0, 4], [0, 1]])


def test_gradients_equal_finite_differences() -> None:
    def call(*args: torch.Tensor) -> torch.Tensor:
        h, x, weights, gate_up, down = args
        return experts_train(h, x, chosen(), weights, gate_up, down)

    assert torch.autograd.gradcheck(call, arguments(torch.float64))


def test_values_and_gradients_equal_the_serving_op() -> None:
    ours, theirs = arguments(torch.float32), arguments(torch.float32)
    outputs = [
        op(args[0], args[1], chosen(), args[2], args[3], args[4])
        for op, args in ((experts_train, ours), (experts_ref, theirs))
    ]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by the compiler, which asks for it
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_grouped_products_agree_with_fp64_in_bf16() -> None:
    """On a GPU in bf16: the relative error of every gradient is that of bf16, not of a wrong formula."""
    gradients = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        arguments_on_it = [
            a.detach().to(device, dtype).requires_grad_() for a in arguments(torch.float64, hidden=64, width=32)
        ]
        h, x, weights, gate_up, down = arguments_on_it
        experts_train(h, x, chosen().to(device), weights, gate_up, down).sum().backward()
        gradients.append([a.grad for a in arguments_on_it])
    for exact, mine in zip(*gradients, strict=True):
        assert exact is not None
        assert mine is not None
        assert (mine.double().cpu() - exact).norm() < 0.03 * exact.norm()
