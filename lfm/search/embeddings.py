"""Vectors of texts from any server that speaks OpenAI's POST /v1/embeddings."""

import json
import math
import ssl
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import httpx2
import msgspec
import numpy as np
import numpy.typing as npt

from lfm.search.errors import EmbeddingError
from lfm.search.urls import server_root

Vectors = npt.NDArray[np.float32]  # [texts, dimensions], each row of length 1

BATCH_TEXTS = 64
_MAX_BYTES = 64 * 1024 * 1024
_MAX_DIMENSIONS = 16_384
_TIMEOUT_S = 60.0


class _Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class _Answer(msgspec.Struct):
    data: list[_Embedding]


class EmbeddingClient:
    """One model on one server. Close it, or use `with`."""

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None) -> None:
        """`base_url` with or without /v1. Raises UsageError if it is no address."""
        self.model = model
        root = server_root(base_url, of="the embeddings server").removesuffix("/v1")
        self._url = f"{root}/v1/embeddings"
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=_TIMEOUT_S,
            verify=True if root.startswith("https") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            trust_env=False,
            limits=httpx2.Limits(max_keepalive_connections=0),  # a kept one may be closed just as it is used
        )

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One unit vector for each text, in order. Raises EmbeddingError."""
        batches = [self._embed(texts[first : first + BATCH_TEXTS]) for first in range(0, len(texts), BATCH_TEXTS)]
        if len({batch.shape[1] for batch in batches}) > 1:
            raise EmbeddingError(f"The embeddings of {self.model} differ in length.")
        return np.concatenate(batches)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _embed(self, texts: Sequence[str]) -> Vectors:
        body = {"model": self.model, "input": list(texts), "encoding_format": "float"}
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                if response.status_code != 200:
                    raise EmbeddingError(f"The embeddings server answers with status {response.status_code}.")
                data = b"".join(_bounded(response.iter_bytes(65_536)))
            answer = msgspec.convert(json.loads(data), type=_Answer)
        except httpx2.HTTPError as error:
            raise EmbeddingError(f"The embeddings server cannot be reached ({type(error).__name__}).") from error
        except (ValueError, RecursionError) as error:
            raise EmbeddingError("The embeddings server's answer is not what OpenAI's would be.") from error
        return _unit_rows(answer, len(texts))


def _bounded(chunks: Iterator[bytes]) -> Iterator[bytes]:
    num_bytes = 0
    for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes > _MAX_BYTES:
            raise EmbeddingError(f"The embeddings server's answer is larger than {_MAX_BYTES:,} bytes.")
        yield chunk


def _unit_rows(answer: _Answer, num_texts: int) -> Vectors:
    ordered = sorted(answer.data, key=lambda item: item.index)
    lengths = {len(item.embedding) for item in ordered}
    if [item.index for item in ordered] != list(range(num_texts)) or len(lengths) != 1:
        raise EmbeddingError(f"The embeddings server gave {len(ordered)} vectors for {num_texts} texts.")
    if not 0 < max(lengths) <= _MAX_DIMENSIONS:
        raise EmbeddingError(f"The embeddings have {max(lengths)} dimensions. Allowed: 1 to {_MAX_DIMENSIONS:,}.")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
        rows: Vectors = np.array([item.embedding for item in ordered], dtype=np.float32)
    norms: Vectors = np.linalg.norm(rows, axis=1, keepdims=True)
    if not math.isfinite(float(norms.sum())) or not norms.all():
        raise EmbeddingError("The embeddings server gave a vector of no length, or no number.")
    rows /= norms
    return rows
