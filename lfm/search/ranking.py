"""Scores a handful of texts against a question, in memory, with the same terms and formula as the index; and fuses
rankings that cannot be compared by score."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

from lfm.search.analyser import index_terms, query_terms

_K = TypeVar("_K", bound=Hashable)

_K1, _B = 1.2, 0.75  # BM25's, as in tantivy and FTS5
_RANK_OFFSET = 60  # of reciprocal rank fusion, from the paper that proposed it (Cormack et al., 2009)


def bm25_scores(question: str, texts: Sequence[str]) -> list[float]:
    """How well each text matches the question among these texts; 0 for one that shares no term with it."""
    wanted = query_terms(question)
    counts = [Counter(index_terms(text)) for text in texts]
    lengths = [count.total() for count in counts]
    mean_length = sum(lengths) / len(lengths) if any(lengths) else 1.0
    scores = [0.0] * len(texts)
    for term in wanted:
        num_with = sum(term in count for count in counts)
        rarity = math.log(1 + (len(texts) - num_with + 0.5) / (num_with + 0.5))
        for index, count in enumerate(counts):
            if frequency := count[term]:
                damping = _K1 * (1 - _B + _B * lengths[index] / mean_length)
                scores[index] += rarity * frequency * (_K1 + 1) / (frequency + damping)
    return scores


def fuse(rankings: Sequence[Sequence[_K]]) -> list[tuple[_K, float]]:
    """One ranking from several, best first, each item with the sum of 1 / (60 + its rank) over the rankings."""
    scores: dict[_K, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (_RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda item: -item[1])
