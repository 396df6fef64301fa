"""A served model as the client tests see it: where it is, and what its metrics say."""

import os
from dataclasses import dataclass
from pathlib import Path

import httpx2


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Where a client finds the server. `url` has no /v1 at its end."""

    url: str
    model: str
    api_key: str
    log: Path

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {self.api_key}"}, timeout=10)

    def count_tokens(self, text: str) -> int:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        body = {"model": self.model, "prompt": text}
        response = httpx2.post(f"{self.url}/tokenize", json=body, headers=headers, timeout=10)
        count: int = response.raise_for_status().json()["count"]
        return count

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels. Raises KeyError if the server does not report it."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        if not lines:
            raise KeyError(name)
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def environment(self, *, together_suffix: str = "", flaky_url: str = "") -> dict[str, str]:
        """The environment of a client program. Of Together's clients only the Python one adds /v1 to the URL itself."""
        return {
            **os.environ,
            "SERVER_URL": self.url,
            "SERVER_KEY": self.api_key,
            "FLAKY_URL": flaky_url,
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": self.api_key,
            "TOGETHER_BASE_URL": f"{self.url}{together_suffix}",
            "TOGETHER_API_KEY": self.api_key,
        }
