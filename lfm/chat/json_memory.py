"""What was read from the JSON of recent requests, by what it says: agents send their tools and schemas again."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, TypeVar

from lfm.chat.json_fields import json_bytes

_T = TypeVar("_T")


class JsonMemory(Generic[_T]):
    """Up to `max_bytes` of JSON and what was made of it; the same JSON gives the same object. Any thread may use it."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._made: OrderedDict[bytes, tuple[_T, int]] = OrderedDict()

    def get(self, raw: object, make: Callable[[], _T], *, param: str, kind: str = "") -> _T:
        """What `make` returns for this JSON, or returned before.

        `param` names the JSON in messages; for another `param` or `kind`, something else may be made of it. Raises
        RequestError if it is no JSON, and what `make` raises.
        """
        encoded = json_bytes(raw, param)
        key = blake2b(b"\0".join((param.encode(), kind.encode(), encoded)), digest_size=16).digest()
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key][0]
        made = make()
        with self._lock:
            if key not in self._made:
                self._made[key] = (made, len(encoded))
                self._num_bytes += len(encoded)
            made = self._made[key][0]
            while self._num_bytes > self._max_bytes and len(self._made) > 1:
                self._num_bytes -= self._made.popitem(last=False)[1][1]
        return made
