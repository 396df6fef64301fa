"""What requests may say about searches, for the OpenAPI document; `lfm.server.server_tools` reads them."""

from typing import Literal

from pydantic import BaseModel

ContextSizeField = Literal["low", "medium", "high"]


class Place(BaseModel):
    """Where the user is. Only the country is passed on: two letters."""

    city: str | None = None
    country: str | None = None
    region: str | None = None
    timezone: str | None = None


class UserLocation(Place):
    """In the form of responses and messages, or in that of chat completions (`approximate`)."""

    type: Literal["approximate"]
    approximate: Place | None = None


class DomainFilters(BaseModel):
    allowed_domains: list[str] | None = None
    blocked_domains: list[str] | None = None


class WebSearchOptions(BaseModel):
    """`external_web_access` false: only the operator's own documents are searched."""

    search_context_size: ContextSizeField | None = None
    user_location: UserLocation | None = None
    filters: DomainFilters | None = None
    external_web_access: bool | None = None


class ResponsesWebSearch(WebSearchOptions):
    type: Literal["web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"]


class ResponsesFileSearch(BaseModel):
    """Searches the operator's own documents. There is one index, whatever `vector_store_ids` says."""

    type: Literal["file_search"]
    max_num_results: int | None = None
    vector_store_ids: list[str] | None = None


class MessagesWebSearch(DomainFilters):
    type: Literal["web_search_20250305"]
    name: Literal["web_search"]
    max_uses: int | None = None
    user_location: UserLocation | None = None


class ChosenSearch(BaseModel):
    type: Literal["web_search", "web_search_preview", "file_search"]


class PastSearch(BaseModel):
    """A search of an earlier response. The model sees it again if it holds `results`, which `include` asks for."""

    type: Literal["web_search_call", "file_search_call"]
    results: list[dict[str, object]] | None = None


class SearchToolUse(BaseModel):
    type: Literal["server_tool_use"]
    id: str
    name: str
    input: dict[str, object]


class SearchToolResult(BaseModel):
    type: Literal["web_search_tool_result"]
    tool_use_id: str
    content: list[dict[str, object]] | dict[str, object]
