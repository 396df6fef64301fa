"""What the operator sets is checked at the start, and its keys are shown nowhere."""

import asyncio
from pathlib import Path

import pytest

from lfm.errors import UsageError
from lfm.search.chain import SearchChain
from lfm.search.config import SearchConfig
from lfm.search.local_index import LocalIndex
from lfm.search.results import SearchQuery
from lfm.search.setup import open_chain
from tests.search.indexes import document


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"providers": ("google",)}, r"'google' is not known\. Allowed: local, searxng, brave, tavily, exa\."),
        ({"providers": ("brave",)}, r"brave needs brave_api_key\. Set LFM_BRAVE_API_KEY\."),
        ({"providers": ("searxng",)}, r"searxng needs searxng_url"),
        ({"providers": ("local", "local")}, "named twice in local, local"),
        ({"rates_per_s": {"brave": 0}}, "The rate of brave, 0 a second, is out of range"),
        (
            {"searxng_url": "localhost:8080"},
            "The address of searxng cannot be used: 'localhost:8080' is no web address",
        ),
        ({"searxng_url": "http://["}, "is no web address"),
        ({"searxng_url": "http://s.example/search?format=json"}, "has a query"),
        ({"searxng_url": "http://2130706433"}, "writes an address in an odd way"),
        ({"embeddings_url": "x:1", "embeddings_model": "m"}, "The address of the embeddings server cannot be used"),
        ({"brave_api_key": "caf\u00e9"}, "brave_api_key holds characters that are in no key"),
        ({"embeddings_key": "a\nb"}, r"Set LFM_EMBEDDINGS_KEY again\."),
    ],
)
def test_what_cannot_work_is_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SearchConfig(**fields)  # type: ignore[arg-type]


def test_keys_are_never_shown() -> None:
    config = SearchConfig(providers=("brave",), brave_api_key="secret", exa_api_key="secret")
    assert "secret" not in repr(config)
    assert "tavily_api_key=None" in repr(config)


def test_the_chain_has_the_providers_in_order_with_their_rates(tmp_path: Path) -> None:
    config = SearchConfig(
        providers=("searxng", "brave", "exa", "tavily", "local"),
        searxng_url="http://127.0.0.1:1",
        brave_api_key="a",
        tavily_api_key="b",
        exa_api_key="c",
        rates_per_s={"brave": 20.0},
    )
    with LocalIndex(tmp_path) as index:
        chain = open_chain(config, index=index)
        assert [link.provider.name for link in chain._links] == list(config.providers)
        limits = [link.rate_limit for link in chain._links]
        assert limits[0] is limits[4] is None
        assert limits[1] is not None
        assert [limits[1].reserve() for _ in range(21)] == pytest.approx([0.0] * 20 + [0.05], abs=0.01)
        asyncio.run(chain.aclose())


def test_processes_share_the_rate_of_a_plan() -> None:
    config = SearchConfig(providers=("brave",), brave_api_key="a", rates_per_s={"brave": 20.0}, num_processes=4)
    chain = open_chain(config)
    limit = chain._links[0].rate_limit
    assert limit is not None
    assert [limit.reserve() for _ in range(6)] == pytest.approx([0.0] * 5 + [0.2], abs=0.05)
    asyncio.run(chain.aclose())


def test_the_local_provider_needs_an_index_and_then_works_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="local needs an index"):
        open_chain(SearchConfig())
    with LocalIndex(tmp_path) as index:
        index.store.write([document("/a.md", "A pump.")])
        chain: SearchChain = open_chain(SearchConfig(), index=index)
        answer = asyncio.run(chain.search(SearchQuery(text="pump")))
        assert [result.url for result in answer.results] == ["file:///a.md"]
