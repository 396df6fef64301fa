"""top_k by groups against one stable sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm.kernels.top_k import top_k, top_k_ref


@given(st.integers(1, 6000), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**32), st.sampled_from([2, 30, 0]))
def test_groups_find_what_a_stable_sort_finds(size: int, k: int, num_rows: int, seed: int, num_values: int) -> None:
    random = torch.Generator().manual_seed(seed)
    if num_values:
        x = torch.randint(0, num_values, (num_rows, size), generator=random).float()  # full of ties
        x[x == 0] = -torch.inf
    else:
        x = torch.randn(num_rows, size, generator=random)
    k = min(k, size)
    values, ids = top_k(x, k)
    expected_values, expected_ids = top_k_ref(x, k)
    assert values.equal(expected_values)
    assert ids.equal(expected_ids)


@pytest.mark.parametrize("size", [64_400, 65_536])
@pytest.mark.parametrize("k", [64, 256, 1024])
def test_equal_bf16_logits_of_a_real_vocabulary_come_in_order_of_their_ids(size: int, k: int) -> None:
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(k)).bfloat16().float()
    values, ids = top_k(x, k)
    expected_values, expected_ids = top_k_ref(x, k)
    assert values.equal(expected_values)
    assert ids.equal(expected_ids)
    assert len(values[0].unique()) < k


def test_nan_is_the_largest_value() -> None:
    x = torch.zeros(2, 5000)
    x[1, 4321] = torch.nan
    values, ids = top_k(x, 4)
    assert values.isnan().tolist() == [[False] * 4, [True, False, False, False]]
    assert ids.tolist() == [[0, 1, 2, 3], [4321, 0, 1, 2]]
