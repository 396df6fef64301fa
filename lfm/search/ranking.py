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
    return Bm25(texts).scores(question)


class Bm25:
    """Some texts that several questions are asked about: their terms are counted once."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._counts = [Counter(index_terms(text)) for text in texts]
        self._lengths = [count.total() for count in self._counts]
        self._mean_length = sum(self._lengths) / len(texts) if any(self._lengths) else 1.0

    def scores(self, question: str) -> list[float]:
        """How well each text matches the question among these texts; 0 for one that shares no term with it."""
        scores = [0.0] * len(self._counts)
        for term in query_terms(question):
            num_with = sum(term in count for count in self._counts)
            rarity = math.log(1 + (len(scores) - num_with + 0.5) / (num_with + 0.5))
            for index, count in enumerate(self._counts):
                if frequency := count[term]:
                    damping = _K1 * (1 - _B + _B * self._lengths[index] / self._mean_length)
                    scores[index] += rarity * frequency * (_K1 + 1) / (frequency + damping)
        return scores


def fuse(rankings: Sequence[Sequence[_K]]) -> list[tuple[_K, float]]:
    """One ranking from several, best first, each item with the sum of 1 / (60 + its rank) over the rankings."""
    scores: dict[_K, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (_RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda item: -item[1])
