"""Random sequences, parameters and logits for the sampler's property tests."""

import math

from hypothesis import strategies as st

from lfm.protocol import SamplingParams
from tests.sampler.batch import Case

# A coarse grid makes ties, which bf16 logits are full of; the normal numbers make everything else.
tied_logits = st.integers(-8, 8).map(lambda n: n / 2)
rare_logits = st.sampled_from([-math.inf, 0.0, 1e30, -1e30])


@st.composite
def sampling_params(draw: st.DrawFn, size: int) -> SamplingParams:
    token = st.integers(0, size - 1)
    return SamplingParams(
        max_tokens=100,
        temperature=draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 3, size])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.15, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.05, 0.3, 10.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 2.0, -1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.3, -2.0])),
        logit_bias=draw(st.dictionaries(token, st.floats(-100, 100), max_size=3)),
        min_tokens=draw(st.integers(0, 4)),
        stop_token_ids=tuple(draw(st.lists(token, max_size=3))),
    )


@st.composite
def cases(draw: st.DrawFn, size: int) -> Case:
    number = draw(st.sampled_from([tied_logits, st.floats(-20, 20), st.one_of(tied_logits, rare_logits)]))
    ids = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=12))
    return Case(
        logits=draw(st.lists(number, min_size=size, max_size=size)),
        params=draw(sampling_params(size)),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        ids=ids,
        num_prompt=draw(st.integers(1, len(ids))),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Case], int]:
    """Sequences over one vocabulary, and how many of its ids have a text."""
    size = draw(st.integers(1, 20))
    return draw(st.lists(cases(size), min_size=1, max_size=6)), draw(st.integers(1, size))
