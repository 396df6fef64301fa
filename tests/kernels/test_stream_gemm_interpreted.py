"""The kernels of projections on a CPU, in fp32 and fp16, against the reference in fp64."""

import pytest
import torch
from torch import Tensor

from lfm.kernels import norm as ops
from lfm.kernels import stream_gemm
from lfm.kernels.fp8 import quantise_rows
from lfm.kernels.stream_gemm import stream_gate_up, stream_project
from lfm.kernels.tuned import StreamTile as Tile
from lfm.kernels.weights import Linear, Norm
from tests.kernels.interpreted import IS_INTERPRETED, run_interpreted

# Relative errors: fp32 sums of K rounded products; fp16 rounds x * gain and the result, 2^-11 each.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}

if not IS_INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:

    @pytest.fixture(autouse=True)
    def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
        """The public ops take the kernels, on a CPU and in any dtype too."""
        for module in (ops, stream_gemm):
            monkeypatch.setattr(module, "runs_triton", lambda _: True)

    def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)

    def assert_near(got: Tensor, exact: Tensor) -> None:
        error = float((got.double() - exact).norm() / exact.norm())
        assert error <= TOLERANCE[got.dtype], error

    def wide(value: Norm | Linear) -> Norm | Linear:
        return type(value)(*(item.double() if isinstance(item, Tensor) else item for item in value))

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(
        ("tokens", "inputs", "outputs", "tile"),
        [
            (1, 64, 16, Tile(8, 2, 1, 1, 128)),  # sizes that the tile divides
            (3, 200, 40, Tile(16, 2, 1, 2, 128)),  # neither rows nor inputs
            (8, 128, 24, Tile(8, 1, 2, 4, 128)),  # more tiles ahead than there are
            (9, 8, 5, Tile(8, 4, 1, 1, 128)),  # more warps than inputs
            (17, 96, 33, Tile(16, 2, 1, 1, 128)),
        ],
    )
    def test_projection_with_everything(tokens: int, inputs: int, outputs: int, tile: Tile, dtype: torch.dtype) -> None:
        x, residual = draw(tokens, inputs, dtype=dtype), draw(tokens, outputs, seed=1, dtype=dtype)
        weight = draw(outputs, inputs, seed=2, dtype=dtype, std=inputs**-0.5)
        projection = Linear(weight, draw(outputs, seed=3, dtype=dtype))
        norm = Norm(1 + draw(inputs, seed=4, dtype=dtype, std=0.1), 1e-5)
        exact = ops.norm_project_ref(x.double(), wide(norm), wide(projection)) + residual.double()
        assert_near(stream_project(x, projection, tile, norm=norm, residual_TN=residual), exact)
        assert_near(stream_project(x, projection, tile), ops.project_ref(x.double(), wide(projection)))

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(
        ("tokens", "inputs", "outputs", "tile"),
        [
            (1, 128, 16, Tile(8, 2, 1, 1, 128)),  # sizes that the tile divides
            (9, 208, 40, Tile(16, 2, 1, 2, 128)),  # neither rows nor inputs
            (3, 16, 5, Tile(8, 2, 2, 4, 128)),  # less than a run of inputs; 16 values a lane
            (9, 256, 16, Tile(16, 2, 4, 1, 128)),
        ],
    )
    def test_weights_in_fp8(tokens: int, inputs: int, outputs: int, tile: Tile, dtype: torch.dtype) -> None:
        """e4m3 becomes the activation dtype exactly, so nothing but the usual rounding is allowed."""
        x, residual = draw(tokens, inputs, dtype=dtype), draw(tokens, outputs, seed=1, dtype=dtype)
        quantised, scale = quantise_rows(draw(outputs, inputs, seed=2, std=inputs**-0.5))
        projection = Linear(quantised, draw(outputs, seed=3, dtype=dtype), scale)
        norm = Norm(1 + draw(inputs, seed=4, dtype=dtype, std=0.1), 1e-5)
        exact = ops.norm_project_ref(x.double(), wide(norm), wide(projection)) + residual.double()
        assert_near(stream_project(x, projection, tile, norm=norm, residual_TN=residual), exact)
        assert_near(stream_project(x, projection, tile), ops.project_ref(x.double(), wide(projection)))
        quantised, scale = quantise_rows(draw(2 * outputs, inputs, seed=5, std=0.1))
        both = Linear(quantised, scale=scale)
        gate, up = ops.norm_project_ref(x.double(), wide(norm), wide(both)).chunk(2, dim=-1)
        assert_near(stream_gate_up(x, norm, both, tile), torch.nn.functional.silu(gate) * up)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(("tokens", "width", "rows"), [(1, 16, 8), (7, 20, 16), (12, 8, 8)])
    def test_gate_and_up(tokens: int, width: int, rows: int, dtype: torch.dtype) -> None:
        x, weight = draw(tokens, 72, dtype=dtype), draw(2 * width, 72, seed=1, dtype=dtype, std=0.1)
        norm = Norm(1 + draw(72, seed=2, dtype=dtype, std=0.1), 1e-5)
        gate, up = ops.norm_project_ref(x.double(), wide(norm), Linear(weight.double())).chunk(2, dim=-1)
        exact = torch.nn.functional.silu(gate) * up
        assert_near(stream_gate_up(x, norm, Linear(weight), Tile(rows, 2, 1, 1, 128)), exact)

    @pytest.mark.parametrize("tokens", [1, 5, 40])
    def test_public_ops_at_any_number_of_tokens(tokens: int) -> None:
        h, x = draw(tokens, 64), draw(tokens, 48, seed=1)
        norm, out = Norm(1 + draw(64, seed=2, std=0.1), 1e-5), Linear(draw(64, 48, seed=3, std=0.1), draw(64, seed=4))
        gate_up, down = draw(2 * 40, 64, seed=5, std=0.1), draw(64, 40, seed=6, std=0.1)
        wide_norm, wide_h = wide(norm), h.double()
        assert_near(ops.rms_norm(h, norm), ops.rms_norm_ref(wide_h, wide_norm))
        assert_near(ops.project(x, out), ops.project_ref(x.double(), wide(out)))
        assert_near(
            ops.norm_project(h, norm, Linear(down.t().contiguous())),
            ops.rms_norm_ref(wide_h, wide_norm) @ down.double(),
        )
        assert_near(ops.project_add(h.clone(), x, out), ops.project_add_ref(wide_h, x.double(), wide(out)))
        exact = ops.dense_ref(wide_h, wide_norm, Linear(gate_up.double()), Linear(down.double()))
        assert_near(ops.dense(h.clone(), norm, Linear(gate_up), Linear(down)), exact)

    def test_strided_rows() -> None:
        """x, the residual and the weight may be slices of wider tensors."""
        x, residual, weight = draw(5, 96)[:, 16:80], draw(5, 40, seed=1)[:, :24], draw(24, 128, seed=2, std=0.1)[:, :64]
        got = stream_project(x, Linear(weight), Tile(8, 2, 1, 1, 128), residual_TN=residual)
        assert_near(got, ops.project_add_ref(residual.double(), x.double(), Linear(weight.double())))

    def test_a_token_does_not_depend_on_its_neighbours() -> None:
        x, weight = draw(8, 64), draw(16, 64, seed=1)
        norm, tile = Norm(1 + draw(64, seed=2, std=0.1), 1e-5), Tile(8, 2, 1, 1, 128)
        alone = stream_project(x[3:4], Linear(weight), tile, norm=norm)
        assert torch.equal(stream_project(x, Linear(weight), tile, norm=norm)[3:4], alone)

    def test_what_a_tile_is_missing_for_goes_to_the_library() -> None:
        weight = draw(16, 64)
        assert stream_gemm.find_tile("project_add", draw(16, 64), weight) is not None
        assert stream_gemm.find_tile("project_add", draw(17, 64), weight) is None
        assert stream_gemm.find_tile("project", draw(8, 64), weight) is not None
        assert stream_gemm.find_tile("project", draw(8, 63), draw(16, 63)) is None  # rows of an odd length
        assert stream_gemm.find_tile("project", draw(64, 8).t(), weight) is None  # not row by row
        assert stream_gemm.find_tile("project", draw(0, 64), weight) is None
