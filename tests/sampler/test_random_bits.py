"""The generator: equal to its published form, and good enough in every direction that sampling uses it."""

import math

import pytest
import torch
from torch import Tensor

from lfm.kernels.random_bits import random_bits, stream_at, uniform
from tests.sampler.naive import bits
from tests.sampler.statistics import chi_square_limit

SEEDS = [0, 1, 2, -1, 12345, 2**63 - 1, -(2**63)]


def test_the_stream_is_splitmix64_as_published() -> None:
    """The first outputs of Vigna's splitmix64.c from 1234567."""
    found = stream_at(torch.tensor(1234567), torch.arange(5))
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [n % 2**64 for n in found.tolist()] == published


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_equal_those_of_python_integers(seed: int) -> None:
    positions = [0, 1, 31, 128_000, 2**31]
    ids = [0, 1, 2, 255, 65_535, 2**17]
    found = random_bits(torch.tensor([seed] * 5), torch.tensor(positions), torch.tensor(ids))
    assert found.tolist() == [[bits(seed, position, i) for i in ids] for position in positions]


def grid(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Bits [seeds x positions, ids]."""
    pairs = torch.cartesian_prod(seeds, positions)
    return random_bits(pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), ids)


def assert_uniform(cells: Tensor, num_cells: int) -> None:
    counts = torch.bincount(cells.flatten(), minlength=num_cells).double()
    expected = cells.numel() / num_cells
    assert expected >= 50
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(num_cells - 1)


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
@pytest.mark.parametrize(
    ("num_seeds", "num_positions", "num_ids"), [(1, 1, 65_536), (1, 65_536, 1), (65_536, 1, 1), (8, 64, 512)]
)
def test_every_byte_is_uniform_over_seeds_positions_and_ids(
    num_seeds: int, num_positions: int, num_ids: int, shift: int
) -> None:
    found = grid(torch.arange(num_seeds), torch.arange(num_positions), torch.arange(num_ids))
    assert_uniform((found >> shift) & 255, 256)


@pytest.mark.parametrize("shift", [0, 28])
@pytest.mark.parametrize("direction", ["seed", "position", "id"])
def test_neighbours_are_independent(direction: str, shift: int) -> None:
    """Pairs (seed, seed + 1), (position, position + 1) and (id, id + 1) fill a 16 x 16 table evenly."""
    seeds, positions, ids = torch.arange(64), torch.arange(64), torch.arange(64)
    first = grid(seeds, positions, ids)
    step = {name: int(name == direction) for name in ("seed", "position", "id")}
    second = grid(seeds + step["seed"], positions + step["position"], ids + step["id"])
    assert_uniform(((first >> shift) & 15) * 16 + ((second >> shift) & 15), 256)


def test_a_changed_bit_of_any_input_changes_half_of_the_output() -> None:
    base = torch.randint(-(2**62), 2**62, (500,), generator=torch.Generator().manual_seed(0))
    for flipped in range(0, 63, 3):
        other = base ^ (1 << flipped)
        zero = torch.zeros_like(base)
        ids = torch.zeros(1, dtype=torch.int64)
        by_seed = random_bits(base, zero, ids) ^ random_bits(other, zero, ids)
        by_position = random_bits(zero, base, ids) ^ random_bits(zero, other, ids)
        for changed in (by_seed, by_position):
            ones = sum(((changed >> bit) & 1).sum().item() for bit in range(32))
            assert abs(ones / (500 * 32) - 0.5) < 5 * 0.5 / math.sqrt(500 * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_uniform_lies_strictly_between_0_and_1(dtype: torch.dtype) -> None:
    numbers = uniform(torch.tensor([0, 1, 2**31, 2**32 - 1]), dtype)
    assert numbers.dtype == dtype
    assert (numbers > 0).all()
    assert (numbers < 1).all()
    assert numbers[0] == 2.0**-33
    assert (-torch.log1p(-numbers)).isfinite().all()
