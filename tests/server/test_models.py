"""GET /v1/models, in the shape that each vendor's client can read."""

import pytest

from tests.server.fakes import DEFAULTS, MAX_MODEL_LEN, MODEL, AppClient


@pytest.mark.parametrize("path", ["/v1/models", "/v1/v1/models", "/models"])
def test_openai_gets_a_list_object(path: str) -> None:
    models = AppClient().get(path).json()
    assert models["object"] == "list"
    (item,) = models["data"]
    assert item["id"] == MODEL
    assert item["object"] == "model"
    assert item["owned_by"] == item["organization"] == "LiquidAI"
    assert item["context_length"] == MAX_MODEL_LEN
    assert item["default_sampling"] == DEFAULTS.as_dict()
    assert item["default_sampling_origin"] == "the tests"


@pytest.mark.parametrize("agent", ["Together/Python 3.1.1", "AsyncTogether/Python 3.1.1", "Together/JS 0.52.0"])
def test_together_gets_a_bare_array(agent: str) -> None:
    (item,) = AppClient().get("/v1/models", headers={"User-Agent": agent}).json()
    assert item["id"] == MODEL
    assert item["type"] == "chat"
    assert set(item["pricing"]) == {"hourly", "input", "output", "base", "finetune"}


@pytest.mark.parametrize("agent", ["OpenAI/Python 3.54.0", "curl/8", "NotTogether/1", "altogether/1", ""])
def test_everyone_else_gets_the_list_object(agent: str) -> None:
    assert AppClient().get("/v1/models", headers={"User-Agent": agent}).json()["object"] == "list"


@pytest.mark.parametrize("name", [MODEL, MODEL.replace("/", "%2F")])
def test_one_model_is_found_by_its_name(name: str) -> None:
    assert AppClient().get(f"/v1/models/{name}").json()["id"] == MODEL


def test_another_model_is_404_and_the_served_one_is_told() -> None:
    response = AppClient().get("/v1/models/gpt-4o")
    assert response.status_code == 404
    assert MODEL in response.json()["error"]["message"]


def test_models_are_listed_while_the_engine_loads() -> None:
    client = AppClient()
    client.backend.engine_info = None
    client.backend.reason = "loading weights"
    assert client.get("/v1/models").json()["data"][0]["context_length"] == 4096


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_stubs_of_togethers_second_api(prefix: str) -> None:
    supported = AppClient().get(f"{prefix}/v2/supported-models").json()
    assert [item["id"] for item in supported["data"]] == [MODEL]
    assert supported["data"][0]["contextLength"] == str(MAX_MODEL_LEN)
    assert AppClient().get(f"{prefix}/v2/projects/p/models").json() == {"data": [], "next_cursor": None}
