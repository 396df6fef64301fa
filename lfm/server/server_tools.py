"""Tools that run in this server: `web_search` and `file_search`. How requests ask for them, and how a model calls them.

To the model they are functions like any other. `lfm.server.server_tools_loop` runs the calls.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lfm.chat.grammar_tools import OPENAI_TOOLS, ToolSyntax
from lfm.chat.json_fields import json_type, typed
from lfm.errors import RequestError
from lfm.search.results import SearchQuery, bare_domain
from lfm.server.search_annotations import Citations
from lfm.server.search_memory import SearchMemory

Json = dict[str, object]
ContextSize = Literal["low", "medium", "high"]

SIZES: tuple[ContextSize, ...] = ("low", "medium", "high")
MAX_QUERY_CHARS = 300  # that a model may write: one that never ends its query costs no more
_WEB_SEARCH = re.compile(r"web_search(_preview)?(_\d{4}_?\d{2}_?\d{2})?")  # OpenAI's and Anthropic's, dated or not
_DESCRIPTIONS = {
    "web_search": "Search the web. Use it for what you do not know and for what may have changed. Gives numbered "
    "sources.",
    "file_search": "Search the documents of this organisation. Gives numbered sources.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTool:
    """One of the tools, as a request set it up. `is_local`: only the operator's own documents are searched."""

    name: Literal["web_search", "file_search"]
    size: ContextSize = "medium"
    allowed_domains: tuple[str, ...] = ()
    blocked_domains: tuple[str, ...] = ()
    country: str | None = None
    max_results: int | None = None
    max_uses: int | None = None
    is_local: bool = False

    def query(self, text: str, *, max_results: int) -> SearchQuery:
        """Raises RequestError for what no provider could be asked."""
        return SearchQuery(
            text=text,
            max_results=self.max_results or max_results,
            allowed_domains=self.allowed_domains,
            blocked_domains=self.blocked_domains,
            country=self.country,
        )

    def definition(self, syntax: ToolSyntax = OPENAI_TOOLS) -> Json:
        """The tool as a function that a caller could have sent."""
        query = {"type": "string", "minLength": 1, "maxLength": MAX_QUERY_CHARS, "description": "What to look for."}
        schema = {"type": "object", "properties": {"query": query}, "required": ["query"]}
        return {
            "type": syntax.kind,
            "name": self.name,
            "description": _DESCRIPTIONS[self.name],
            syntax.schema_field: schema,
        }


@dataclass(frozen=True, slots=True)
class ServerTools:
    """The tools of one request that run here, by name, and the sources that its answer may cite."""

    tools: Mapping[str, SearchTool]
    citations: Citations = field(default_factory=Citations)
    memory: SearchMemory | None = None  # of what its callers are not shown

    @property
    def may_cite(self) -> bool:
        """Whether there are sources, or may be some."""
        return bool(self.tools) or self.citations.next_number > 1


def web_search_options(value: object, *, param: str = "web_search_options") -> SearchTool:
    """Read the `web_search_options` of chat completions. `filters` and `external_web_access` are as in responses."""
    return _web_search(typed(value, dict, param), param)


def take_tools(raw: object, *, syntax: ToolSyntax = OPENAI_TOOLS) -> tuple[object, dict[str, SearchTool]]:
    """The tools of a request with those that run here as functions in their places, and what they are."""
    found: dict[str, SearchTool] = {}
    if not isinstance(raw, list):
        return raw, found
    tools: list[object] = []
    for index, entry in enumerate(raw):
        kind = entry.get("type") if isinstance(entry, dict) else None
        tool = _server_tool(entry, kind, f"tools[{index}]") if isinstance(kind, str) else None
        if tool is not None and tool.name in found:
            raise RequestError(f"tools[{index}] is a second {tool.name}. Send one.", param=f"tools[{index}]")
        if tool is not None:
            found[tool.name] = tool
        tools.append(entry if tool is None else tool.definition(syntax))
    return tools, found


def take_choice(value: object) -> object:
    """A `tool_choice` of responses, with tools that run here as functions by name."""
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if isinstance(kind, str) and (name := _name_of(kind)) is not None:
        return {"type": "function", "name": name}
    if kind == "allowed_tools" and isinstance(value.get("tools"), list):
        return {**value, "tools": [take_choice(tool) for tool in value["tools"]]}
    return value


def _name_of(kind: str) -> Literal["web_search", "file_search"] | None:
    if _WEB_SEARCH.fullmatch(kind):
        return "web_search"
    return "file_search" if kind == "file_search" else None


def _server_tool(raw: Json, kind: str, where: str) -> SearchTool | None:
    name = _name_of(kind)
    if name == "web_search":
        return _web_search(raw, where)
    return _file_search(raw, where) if name == "file_search" else None


def _web_search(raw: Json, where: str) -> SearchTool:
    filters = _object(raw, "filters", where)
    size = raw.get("search_context_size") or "medium"
    if size not in SIZES:
        raise RequestError(
            f"{where}.search_context_size={str(size)[:80]!r} is not known. Allowed: {', '.join(SIZES)}.",
            param=f"{where}.search_context_size",
        )
    access = raw.get("external_web_access")
    name = raw.get("name")
    if name not in (None, "web_search"):
        raise RequestError(f"{where}.name={str(name)[:80]!r} is not known. Allowed: web_search.", param=f"{where}.name")
    tool = SearchTool(
        name="web_search",
        size=size,
        allowed_domains=_domains(raw, filters, "allowed_domains", where),
        blocked_domains=_domains(raw, filters, "blocked_domains", where),
        country=_country(raw, where),
        max_uses=_count(raw, "max_uses", where),
        is_local=access is not None and not typed(access, bool, f"{where}.external_web_access"),
    )
    if tool.allowed_domains and tool.blocked_domains:
        raise RequestError(
            f"{where} has allowed_domains and blocked_domains. Send one of them.", param=f"{where}.blocked_domains"
        )
    return _checked(tool, where)


def _file_search(raw: Json, where: str) -> SearchTool:
    """Vector stores, ranking options and filters of files do not exist here: there is one index."""
    if raw.get("filters") is not None:
        raise RequestError(f"{where}.filters is not supported. Leave it out.", param=f"{where}.filters")
    max_results = _count(raw, "max_num_results", where)
    return _checked(SearchTool(name="file_search", max_results=max_results, is_local=True), where)


def _checked(tool: SearchTool, where: str) -> SearchTool:
    try:
        tool.query("any", max_results=1)
    except RequestError as error:
        error.message, error.param = f"{where}: {error.message}", f"{where}.{error.param}"
        raise
    return tool


def _domains(raw: Json, filters: Json, name: str, where: str) -> tuple[str, ...]:
    value = filters.get(name, raw.get(name))
    entries = typed(value or [], list, f"{where}.{name}")
    return tuple(bare_domain(typed(entry, str, f"{where}.{name}[{index}]")) for index, entry in enumerate(entries))


def _country(raw: Json, where: str) -> str | None:
    location = _object(raw, "user_location", where)
    location = _object(location, "approximate", f"{where}.user_location") or location
    country = location.get("country")
    return None if country is None else typed(country, str, f"{where}.user_location.country").upper()


def _object(raw: Json, name: str, where: str) -> Json:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{where}.{name} is {json_type(value)}. Allowed: an object.", param=f"{where}.{name}")
    return value


def _count(raw: Json, name: str, where: str) -> int | None:
    value = raw.get(name)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise RequestError(f"{where}.{name} is not valid. Allowed: an integer from 1 on.", param=f"{where}.{name}")
    return value


def with_tool(tools: object, tool: SearchTool) -> object:
    """The tools of a chat request and one that runs here behind them. What is no array is left for others to refuse."""
    if tools is None:
        return [tool.definition()]
    return [*tools, tool.definition()] if isinstance(tools, list) else tools
