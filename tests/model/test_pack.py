"""Merging projections, and storing weights by columns, changes no value, no name and no result."""

from dataclasses import replace

import pytest
import torch

from lfm.model.full_forward import full_logits
from lfm.model.pack import pack, store_by_columns
from tests.engine.models import random_model, tiny_config


def test_packing_changes_no_name_value_or_logit() -> None:
    model = random_model(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = full_logits(model, [[1, 9, 10, 11]])[0]
    pack(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(full_logits(model, [[1, 9, 10, 11]])[0], logits, rtol=0, atol=1e-12)


def test_packed_parts_are_views_of_the_merged_weight() -> None:
    model = pack(random_model(tiny_config()))
    attention = model.model.layers[1].self_attn
    attention.merged_qkv.weight.zero_()
    assert not attention.q_proj.weight.any()
    assert not attention.v_proj.weight.any()
    dense = model.model.layers[0].feed_forward
    dense.merged_gate_up.weight.fill_(2.0)
    assert (dense.w3.weight == 2.0).all()


@pytest.mark.parametrize("is_tied", [True, False])
def test_storing_by_columns_changes_no_name_value_or_logit(is_tied: bool) -> None:
    model = pack(random_model(replace(tiny_config(), tie_word_embeddings=is_tied)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = full_logits(model, [[1, 9, 10, 11]])[0]
    store_by_columns(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(full_logits(model, [[1, 9, 10, 11]])[0], logits, rtol=0, atol=1e-12)
    attention = model.model.layers[1].self_attn
    head = model.model.embed_tokens if is_tied else model.lm_head
    assert all(weight.t().is_contiguous() for weight in (attention.merged_qkv.weight, head.weight))
    assert attention.out_proj.weight.is_contiguous()
    attention.merged_qkv.weight.zero_()
    assert not attention.k_proj.weight.any(), "parts are still views"
