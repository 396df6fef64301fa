"""What can go wrong in a search. Every message can be read by a user, and by a model in place of a result.

SearchError
+-- NoIndexError       exit 2: nobody has made an index yet
+-- IndexFileError     exit 2: the index's files are corrupt, of a newer version, or no index at all
+-- IndexBusyError     exit 3: another process writes to the index, or it is being rebuilt; try again
+-- ExtractionError    exit 2: no text could be taken from a document
+-- FetchError         exit 1: a page was refused or could not be had
+-- ProviderError      exit 1: a search provider did not answer, or not with results
+-- EmbeddingError     exit 3: the embeddings server did not answer, or not with vectors
"""

from typing import Literal

from lfm.errors import LfmError

ProviderReason = Literal["forbidden", "rate_limited", "timeout", "unreachable", "malformed", "failed", "not_configured"]
FetchReason = Literal["refused", "unreachable", "timeout", "status", "too_large", "content_type", "unreadable"]


class SearchError(LfmError):
    """Base of everything that a search can fail with."""


class NoIndexError(SearchError):
    """Nobody has made an index yet."""

    exit_code = 2


class IndexFileError(SearchError):
    """The index's files are corrupt, of a newer version, or no index at all."""

    exit_code = 2


class IndexBusyError(SearchError):
    """Another process writes to the index, or it is being rebuilt."""

    exit_code = 3


class ExtractionError(SearchError):
    """No text could be taken from a document: it is damaged, encrypted, hostile, or needs a package that is missing."""

    exit_code = 2


class FetchError(SearchError):
    """A page that was refused or could not be had. `reason` is for programs, the message for readers."""

    def __init__(self, reason: FetchReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ProviderError(SearchError):
    """A search provider did not answer, or not with results. `reason` is for programs, the message for readers.

    `retry_after_s` is how long the provider wants to be left alone, if it said so.
    """

    def __init__(self, reason: ProviderReason, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class EmbeddingError(SearchError):
    """The embeddings server did not answer, or not with vectors."""

    exit_code = 3
