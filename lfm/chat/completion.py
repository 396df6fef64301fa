"""One request of n choices as n sequences for the engine."""

import secrets
from collections.abc import Sequence

import msgspec

from lfm.errors import RequestError
from lfm.protocol import INT64_MAX, INT64_MIN, MAX_N, EngineRequest, GrammarSpec, SamplingParams

MAX_DRAWN_SEED = 2**53 - MAX_N  # JavaScript clients read larger numbers inexactly, and could not repeat the answer


def requests_for(
    prompt_ids: Sequence[int],
    *,
    request_id: str,
    sampling: SamplingParams,
    n: int = 1,
    first_choice: int = 0,
    tenant: str = "",
    priority: int = 0,
    grammar: GrammarSpec | None = None,
) -> list[EngineRequest]:
    """Make one EngineRequest per choice: ids `<request_id>-<choice index>`, seeds `seed + i` for the i-th of the n.

    Args:
        first_choice: index of the first choice, for a request with several prompts (its number times n).

    Without a seed one is drawn here, so that the choices differ and each can be repeated; it is in `sampling.seed`.
    Raises RequestError unless 1 <= n <= 128.
    """
    check_n(n)
    base = secrets.randbelow(MAX_DRAWN_SEED) if sampling.seed is None else sampling.seed
    if not INT64_MIN <= base <= INT64_MAX:
        raise RequestError(f"seed={base} is out of range. Allowed: {INT64_MIN} to {INT64_MAX}.", param="seed")
    ids = list(prompt_ids)
    return [
        EngineRequest(
            request_id=f"{request_id}-{first_choice + i}",
            prompt_ids=ids,
            sampling=msgspec.structs.replace(sampling, seed=_wrapped(base + i)),
            tenant=tenant,
            priority=priority,
            grammar=grammar,
        )
        for i in range(n)
    ]


def check_n(n: int) -> None:
    """Raise RequestError unless so many choices may be asked for."""
    if not 1 <= n <= MAX_N:
        raise RequestError(f"n={n} is out of range. Allowed: 1 to {MAX_N}.", param="n")


def _wrapped(seed: int) -> int:
    """The seed as a signed 64-bit number: the choice after the largest one is the smallest."""
    return (seed - INT64_MIN) % 2**64 + INT64_MIN
