"""K and V in fp8: how exact they are, where a block keeps them, and that garbage beside them changes nothing."""

import pytest
import torch

from lfm.config import ModelConfig
from lfm.kernels.attention import attend_ref, write_kv_ref
from lfm.kernels.forward_batch import CacheTensors
from lfm.kernels.fp8 import FP8
from lfm.kernels.kv_fp8 import block_size_of, dequantise_kv, quantise_kv, read_blocks
from lfm.kernels.kv_layout import num_rows, num_tokens
from lfm.model.presets import PRESETS
from lfm.model.sizes import block_bytes, kv_bytes_per_token
from tests.kernels.paged import batch_of, garbage


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 447.0, 448.0, 449.0, 1e6])
def test_a_value_is_off_by_a_sixteenth_at_most(size: float) -> None:
    k = draw(50, 3, 64) * size
    k[0, 0, 0] = k[0].abs().max() * 1.5
    values, exponent = quantise_kv(k)
    got = dequantise_kv(values, exponent, torch.float64)
    largest = k.double().abs().amax(-1, keepdim=True)
    allowed = torch.maximum(k.double().abs() * 2**-4, largest * 2**-18)
    assert ((got - k.double()).abs() <= allowed).all()


def test_zeros_and_the_border_of_the_range_are_exact() -> None:
    k = torch.zeros(2, 4)
    k[1] = torch.tensor([448.0, -448.0, 1.0, 0.015625])
    assert torch.equal(dequantise_kv(*quantise_kv(k), torch.float32), k)


@pytest.mark.parametrize("head_dim", [8, 32, 64, 128])
@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 63, 64, 65, 128, 1024])
def test_the_tokens_of_a_block_follow_from_its_rows(block_size: int, head_dim: int) -> None:
    rows = num_rows(block_size, head_dim, is_fp8=True)
    assert (rows - block_size) * head_dim >= block_size
    assert num_tokens(rows, head_dim, is_fp8=True) == block_size
    assert num_rows(block_size, head_dim, is_fp8=False) == block_size


@pytest.mark.parametrize("block_size", [5, 16])
def test_what_is_written_is_read_and_nothing_else_changes(block_size: int) -> None:
    rows = num_rows(block_size, 8, is_fp8=True)
    k, v = garbage(6, 2, rows, 8, dtype=FP8), garbage(6, 2, rows, 8, dtype=FP8)
    batch = batch_of([(3, 11, [4, 2, 5]), (0, 2, [1])], block_size)
    k_new, v_new = draw(10, 2, 8), draw(10, 2, 8, seed=1)
    write_kv_ref(k_new, v_new, batch, k, v)
    assert block_size_of(k) == block_size
    for pool, new in ((k, k_new), (v, v_new)):
        blocks = read_blocks(pool, torch.arange(6), torch.float32)
        tokens = blocks.transpose(1, 2).flatten(0, 1)
        assert torch.equal(tokens[batch.slots_T], dequantise_kv(*quantise_kv(new), torch.float32))
        others = torch.ones(len(tokens), dtype=torch.bool)
        others[batch.slots_T] = False
        assert tokens[others].isnan().all()


def test_attention_over_fp8_is_attention_over_the_rounded_values() -> None:
    chunks = [(8, 9, [3, 1]), (0, 7, [2, 4])]
    rows = num_rows(5, 8, is_fp8=True)
    quantised = [garbage(6, 2, rows, 8, dtype=FP8) for _ in range(2)]
    plain = [garbage(6, 2, 5, 8) for _ in range(2)]
    whole = batch_of([(0, end, table) for _, end, table in chunks], 5)
    k, v = draw(16, 2, 8), draw(16, 2, 8, seed=1)
    write_kv_ref(k, v, whole, *quantised)
    write_kv_ref(*(dequantise_kv(*quantise_kv(x), torch.float64) for x in (k, v)), whole, *plain)
    batch = batch_of(chunks, 5)
    q = draw(8, 4, 8, seed=2).double()
    torch.testing.assert_close(attend_ref(q, q, q, batch, *quantised), attend_ref(q, q, q, batch, *plain))


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize(("preset", "block_size"), [("lfm2-24b-a2b", 128), ("tiny", 16), ("tiny", 5)])
def test_a_block_takes_the_bytes_that_were_counted(preset: str, block_size: int, kv_dtype: str) -> None:
    config: ModelConfig = PRESETS[preset]
    cache = CacheTensors.allocate(
        config,
        3,
        block_size=block_size,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
        kv_dtype=FP8 if kv_dtype == "fp8" else None,
    )
    taken = sum(tensor.nbytes for tensor in (*cache.k, *cache.v, *cache.tails))
    assert taken == 3 * block_bytes(config, block_size=block_size, dtype="bfloat16", kv_dtype=kv_dtype)  # type: ignore[arg-type]


def test_a_token_of_the_24b_takes_ten_kibibytes_and_its_scales() -> None:
    config = PRESETS["lfm2-24b-a2b"]
    assert kv_bytes_per_token(config, "bfloat16", kv_dtype="fp8") == 10_240 + 160
    assert block_bytes(config, block_size=128, dtype="bfloat16", kv_dtype="fp8") == 128 * 10_400 + 245_760
