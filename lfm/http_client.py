"""The little HTTP of agents, `chat --url` and `bench serve`: addresses, headers, event streams, errors as LfmErrors."""

import json
from typing import Any

import httpx2

from lfm.errors import InternalError, LfmError, MachineError, OverloadedError, RequestError, UsageError

CONNECT_S = 10.0
READ_S = 300.0  # a queued request gets a keep-alive comment every few seconds, so silence means that it is lost
TIMEOUT = httpx2.Timeout(READ_S, connect=CONNECT_S)
DONE = "[DONE]"


def api_root(url: str) -> str:
    """The address that /v1/... is appended to. Raises UsageError for anything but http:// and https:// addresses."""
    root = url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        raise UsageError(f"{url} is no address. Give one such as http://127.0.0.1:8000.")
    return root


def auth_headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def served_model(client: httpx2.Client, root: str) -> str:
    """The first model that a server offers. Raises LfmError if it offers none or does not answer."""
    try:
        response = client.get(f"{root}/v1/models")
    except httpx2.HTTPError as error:
        raise unreachable(root, error) from error
    return first_model(response, root)


def first_model(response: httpx2.Response, root: str) -> str:
    """The first model of an answer to GET /v1/models. Raises LfmError if there is none."""
    if response.status_code != 200:
        raise refused(response)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{root}/v1/models lists no model. Give the address of an OpenAI-compatible server."
        ) from error


def event_data(line: str) -> dict[str, Any] | None:
    """The JSON of one line of an event stream; None for comments, blank lines and the end mark. Raises on an error."""
    if not line.startswith("data:"):
        return None
    text = line.removeprefix("data:").strip()
    if text == DONE:
        return None
    try:
        event = json.loads(text)
    except ValueError as error:
        raise InternalError(f"The server sent an event that is not JSON ({error}).") from error
    if not isinstance(event, dict):
        raise InternalError("The server sent an event that is no JSON object.")
    if "error" in event:
        raise InternalError(f"The server ended the answer with an error: {_message(event)}")
    return event


def unreachable(root: str, error: httpx2.HTTPError) -> LfmError:
    return MachineError(f"{root} does not answer ({type(error).__name__}: {error}). Start it with: lfm serve")


def refused(response: httpx2.Response) -> LfmError:
    """The exception for a response that is no success. Its body must have been read."""
    try:
        text = _message(response.json())
    except ValueError:
        text = response.text[:200]
    if response.status_code == 401:
        return UsageError(f"The server wants an API key: {text} Give it with --api-key or LFM_API_KEY.")
    if response.status_code in (429, 503):
        return OverloadedError(text, retry_after_s=_seconds(response.headers.get("retry-after")))
    if 400 <= response.status_code < 500:
        return RequestError(text)
    return InternalError(f"The server failed with status {response.status_code}: {text}")


def _seconds(retry_after: str | None) -> float:
    """A wait that a server asks for. A date, which HTTP allows as well, counts as a second."""
    try:
        return max(0.0, float(retry_after or 1))
    except ValueError:
        return 1.0


def _message(body: object) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", error) if isinstance(error, dict) else error or body)
