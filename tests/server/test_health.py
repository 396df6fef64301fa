"""The probes, and what a server that cannot serve says to everyone else."""

import pytest

from tests.server.fakes import CHAT_PATH, AppClient, chat_body, state_of


@pytest.fixture
def client() -> AppClient:
    return AppClient()


def test_a_server_that_serves_is_alive_and_ready(client: AppClient) -> None:
    for path in ("/livez", "/readyz", "/health"):
        response = client.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})
        assert client.request("HEAD", path).status_code == 200


def test_a_loading_server_is_alive_but_not_ready(client: AppClient) -> None:
    client.backend.engine_info = None
    client.backend.reason = "loading weights, 3.1 of 48 GB"
    assert client.get("/livez").status_code == 200
    for path in ("/readyz", "/health"):
        response = client.get(path)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "12"  # what the backend expects
        assert "3.1 of 48 GB" in response.json()["error"]["message"]
    assert client.chat().status_code == 503
    assert client.backend.streams == []


def test_a_stuck_engine_turns_readyz_red(client: AppClient) -> None:
    client.backend.reason = "no step for 61 s while 3 requests run"
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "4"  # a restart costs what the load cost: 3.2 s
    assert response.json()["error"]["code"] == "not_ready"
    assert client.chat().status_code == 503
    client.backend.reason = None
    assert client.get("/readyz").status_code == 200


def test_a_draining_server_takes_no_new_requests(client: AppClient) -> None:
    state_of(client.app).is_draining = True
    assert client.get("/livez").status_code == 200
    for response in (client.get("/readyz"), client.chat(), client.chat(stream=True), client.complete()):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "30"
        assert response.json()["error"]["code"] == "shutting_down"
    assert client.backend.streams == []


def test_a_refused_request_is_not_validated_first(client: AppClient) -> None:
    client.backend.reason = "loading"
    assert client.request("POST", CHAT_PATH, content=b"not json").status_code == 503
    client.backend.reason = None
    assert client.post(CHAT_PATH, chat_body()).status_code == 200
