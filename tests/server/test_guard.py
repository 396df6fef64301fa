"""What stands in front of every route: the key, Host and Origin, the size of the headers."""

import pytest
from starlette.routing import Route

from lfm.config import ServerConfig
from lfm.protocol import MAX_HEADER_BYTES
from lfm.server.guard import PUBLIC_PATHS
from tests.server.fakes import CHAT_PATH, MODEL, AppClient, chat_body

KEY = "sk-lfm-secret"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
BASIC = {"Authorization": "Basic YTpi"}  # what a proxy may add


@pytest.fixture
def keyed() -> AppClient:
    return AppClient(config=ServerConfig(api_key=KEY))


def bound_to(host: str, *, api_key: str | None = None, insecure: bool = False) -> AppClient:
    return AppClient(config=ServerConfig(host=host, api_key=api_key, insecure=insecure))


def test_every_route_but_the_probes_needs_the_key(keyed: AppClient) -> None:
    paths = {route.path: route for route in keyed.app.routes if isinstance(route, Route)}
    assert len(paths) > 12
    for path, route in paths.items():
        method = "POST" if "POST" in (route.methods or ()) else "GET"
        url = path.replace("{model:path}", MODEL).replace("{project}", "p")
        status = keyed.request(method, url).status_code
        assert status == (200 if path in PUBLIC_PATHS else 401), path
    assert keyed.get("/no/such/path").status_code == 401  # nothing tells which paths exist


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Bearer ", "missing_api_key"),
        (f"Basic {KEY}", "missing_api_key"),
        (KEY, "missing_api_key"),
        ("Bearer wrong", "invalid_api_key"),
        (f"Bearer {KEY}x", "invalid_api_key"),
        (f"Bearer {KEY[:-1]}", "invalid_api_key"),
        (f"Bearer {KEY.upper()}", "invalid_api_key"),
        ("Bearer \xff\xfe", "invalid_api_key"),
    ],
)
def test_a_wrong_key_is_401(keyed: AppClient, authorization: str | None, code: str) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    response = keyed.post(CHAT_PATH, chat_body(), headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", code)
    assert KEY not in response.text
    assert keyed.backend.streams == []


def test_the_right_key_opens(keyed: AppClient) -> None:
    assert keyed.post(CHAT_PATH, chat_body(), headers=WITH_KEY).status_code == 200
    assert keyed.get("/v1/models", headers={"Authorization": f"bearer  {KEY} "}).status_code == 200
    assert keyed.get("/metrics", headers=WITH_KEY).status_code == 200


def test_the_key_may_come_in_either_header(keyed: AppClient) -> None:
    """Clients of OpenAI and Together send one, Anthropic's send the other, or both."""
    for headers in ({"x-api-key": KEY}, {"X-Api-Key": f" {KEY} ", **WITH_KEY}, {"x-api-key": KEY, **BASIC}):
        assert keyed.get("/v1/models", headers=headers).status_code == 200
    for headers in ({"x-api-key": ""}, {"x-api-key": KEY, "Authorization": "Bearer wrong"}, {"x-api-key": f"{KEY}x"}):
        assert keyed.get("/v1/models", headers=headers).status_code == 401


def test_a_key_beyond_ascii_works() -> None:
    client = AppClient(config=ServerConfig(api_key="schl\u00fcssel"))
    headers = {"Authorization": "Bearer schl\u00fcssel".encode()}
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_only_the_exact_paths_of_the_probes_are_open(keyed: AppClient) -> None:
    for path in ("/livez/", "//livez", "/livez/../metrics", "/LIVEZ", "/livez%2f", "/livez;/metrics", "/v1/livez"):
        assert keyed.get(path).status_code == 401, path


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "LOCALHOST", "localhost."]
)
def test_loopback_names_are_served(host: str) -> None:
    assert AppClient().get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "192.168.0.1",
        "127.0.0.1.evil.example",
        "[",
        "",
        "0.0.0.0",
    ],
)
def test_other_names_are_refused_on_loopback(host: str) -> None:
    """A page of evil.example whose name now resolves to 127.0.0.1 sends its own name as Host."""
    for path in ("/v1/models", "/livez"):
        response = AppClient().get(path, headers={"Host": host})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_other_names_are_served_beyond_loopback() -> None:
    client = bound_to("0.0.0.0", api_key=KEY)
    assert client.get("/v1/models", headers={"Host": "lfm.example", **WITH_KEY}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://[", "file://"]
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_pages_of_other_sites_cannot_call_a_server_without_key(host: str, origin: str) -> None:
    """A text/plain POST needs no preflight, so the browser would send it."""
    client = bound_to(host, insecure=True)
    response = client.post(CHAT_PATH, chat_body(), headers={"Origin": origin, "Content-Type": "text/plain"})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "origin_not_allowed"
    assert client.backend.streams == []


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:8000"])
def test_pages_of_this_machine_may_call_a_loopback_server(origin: str) -> None:
    assert AppClient().post(CHAT_PATH, chat_body(), headers={"Origin": origin}).status_code == 200


def test_own_pages_may_call_a_server_beyond_loopback() -> None:
    client = bound_to("0.0.0.0", insecure=True)
    headers = {"Host": "lfm.example:8000", "Origin": "http://lfm.example:8000"}
    assert client.post(CHAT_PATH, chat_body(), headers=headers).status_code == 200
    keyed = bound_to("0.0.0.0", api_key=KEY)
    assert keyed.get("/v1/models", headers={"Origin": "https://app.example", **WITH_KEY}).status_code == 200


def test_headers_of_more_than_32_kib_are_431() -> None:
    client = AppClient()
    assert client.get("/livez", headers={"X-Big": "a" * (MAX_HEADER_BYTES - 1000)}).status_code == 200
    response = client.get("/livez", headers={f"X-{i}": "a" * 100 for i in range(330)})
    assert response.status_code == 431
    assert response.json()["error"]["code"] == "headers_too_large"


def test_no_cross_origin_access_is_granted() -> None:
    response = AppClient().get("/v1/models", headers={"Origin": "http://localhost:3000"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_the_key_salts_the_prefix_cache_and_never_travels_itself(keyed: AppClient) -> None:
    """Sequences of one key share blocks with each other and with nobody else's."""
    for _ in range(2):
        assert keyed.post(CHAT_PATH, chat_body(), headers=WITH_KEY).status_code == 200
    other = AppClient(config=ServerConfig(api_key="another"))
    other.post(CHAT_PATH, chat_body(), headers={"Authorization": "Bearer another"})
    first, second = (request.tenant for request in keyed.backend.requests)
    (third,) = (request.tenant for request in other.backend.requests)
    assert first == second != third
    assert first
    assert KEY not in first
