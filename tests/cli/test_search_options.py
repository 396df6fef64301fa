"""What an operator sets about search: flags and the environment, keys from the environment alone."""

import msgspec
import pytest

from lfm.cli.api_process import WorkerSetup
from lfm.cli.search_options import search_config
from lfm.config import ServerConfig
from lfm.errors import UsageError
from lfm.search.config import SearchConfig
from tests.cli.conftest import Lfm

UNSET = {
    "providers": "local",
    "searxng_url": None,
    "index_folder": None,
    "fetch_allow": None,
    "search_seconds": 10.0,
    "provider_seconds": 5.0,
    "provider_rates": None,
    "max_searches": 4,
    "server": ServerConfig(),
}

SHARED = ServerConfig(host="0.0.0.0", api_key="k", api_workers=4)


def configured(environ: dict[str, str] | None = None, **given: object) -> SearchConfig:
    return search_config({"XDG_DATA_HOME": "/data"} | (environ or {}), **(UNSET | given))  # type: ignore[arg-type]


def test_without_settings_the_own_documents_are_searched() -> None:
    config = configured()
    assert config.providers == ("local",)
    assert config.index_folder == "/data/lfm/search"
    assert config == SearchConfig(index_folder="/data/lfm/search")  # the flags' defaults are the config's


def test_keys_come_from_the_environment() -> None:
    environ = {"LFM_BRAVE_API_KEY": " b ", "LFM_TAVILY_API_KEY": "t", "LFM_EXA_API_KEY": "e", "LFM_EMBEDDINGS_KEY": "m"}
    config = configured(environ, providers=" brave, tavily ,exa,local", fetch_allow=["docs.internal:8080"])
    assert config.providers == ("brave", "tavily", "exa", "local")
    keys = (config.brave_api_key, config.tavily_api_key, config.exa_api_key, config.embeddings_key)
    assert keys == ("b", "t", "e", "m")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"providers": "google"}, "'google' is not known"),
        ({"providers": "exa"}, "Set LFM_EXA_API_KEY"),
        ({"fetch_allow": ["10.0.0.0/99"]}, "10.0.0.0/99"),
        ({"search_seconds": 0.0}, "search_seconds=0 is out of range"),
        ({"provider_rates": "brave"}, "'brave' is no rate"),
        ({"provider_rates": "local=5"}, "no search provider 'local' to set a rate of"),
        ({"provider_rates": "exa=nan"}, "The rate of exa, nan a second, is out of range"),
        ({"max_searches": 17}, "max_searches=17 is out of range. Allowed: 1 to 16"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        configured(**given)


def test_rates_of_plans_may_be_told() -> None:
    assert configured(provider_rates=" brave=20, exa=0.5,").rates_per_s == {"brave": 20.0, "exa": 0.5}


def test_the_embeddings_server_is_the_one_of_lfm_index() -> None:
    config = configured({"LFM_EMBEDDINGS_URL": "http://127.0.0.1:1", "LFM_EMBEDDINGS_MODEL": "m"})
    assert (config.embeddings_url, config.embeddings_model) == ("http://127.0.0.1:1", "m")
    with pytest.raises(UsageError, match="belong together"):
        configured({"LFM_EMBEDDINGS_URL": "http://127.0.0.1:1"})


def test_a_worker_gets_all_settings() -> None:
    config = configured({"LFM_EXA_API_KEY": "e"}, providers="exa,local", fetch_allow=["10.0.0.0/8"], server=SHARED)
    assert (config.shows_paths, config.num_processes) == (False, 4)
    setup = WorkerSetup(
        config=ServerConfig(),
        search_config=config,
        model="m",
        model_name="m",
        directory="d",
        socket_fd=3,
        worker=1,
        parent_pid=1,
        log_level=20,
    )
    assert msgspec.json.decode(msgspec.json.encode(setup), type=WorkerSetup).search_config == config


def test_serve_refuses_a_wrong_setting_before_it_loads_anything(lfm: Lfm) -> None:
    result = lfm("serve", "random:tiny", "--port", "0", "--search-providers", "brave")
    assert result.code == 2
    assert "LFM_BRAVE_API_KEY" in result.error
