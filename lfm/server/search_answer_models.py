"""What answers say about searches and citations, for the OpenAPI document, as in `answer_models`."""

from typing import Literal

from pydantic import BaseModel, Field

JsonObject = dict[str, object]


class DocumentPlace(BaseModel):
    """A sentence of the request's document number `index`, from 0."""

    index: int
    start_index: int
    end_index: int


class UrlCitation(BaseModel):
    """[start_index, end_index) of the answer is the statement that the source supports; `content` is what it says."""

    start_index: int
    end_index: int
    title: str
    url: str
    content: str | None = None
    document: DocumentPlace | None = None


class Annotation(BaseModel):
    type: Literal["url_citation"]
    url_citation: UrlCitation


class SearchedAddress(BaseModel):
    """`sha256` and `num_bytes` are of what was read there."""

    type: Literal["url"]
    url: str
    title: str
    sha256: str
    num_bytes: int


class SearchAction(BaseModel):
    """`sources` only where `include` asks for them."""

    type: Literal["search"]
    query: str
    queries: list[str]
    sources: list[SearchedAddress] = Field(default_factory=list)


class WebSearchItem(BaseModel):
    id: str
    type: Literal["web_search_call"]
    status: Literal["in_progress", "searching", "completed", "failed"]
    action: SearchAction | JsonObject
    results: list[JsonObject] = Field(default_factory=list)


class FileSearchItem(BaseModel):
    id: str
    type: Literal["file_search_call"]
    status: Literal["in_progress", "searching", "completed", "failed"]
    queries: list[str]
    results: list[JsonObject] | None


class ResultCitation(BaseModel):
    """[start_index, end_index) of the block's text is the statement that the source supports."""

    type: Literal["web_search_result_location"]
    url: str
    title: str | None
    encrypted_index: str
    cited_text: str
    start_index: int
    end_index: int


class SearchUseBlock(BaseModel):
    type: Literal["server_tool_use"]
    id: str
    name: str
    input: JsonObject


class SearchResultBlock(BaseModel):
    """`content` is an array of results, or an error."""

    type: Literal["web_search_tool_result", "file_search_tool_result"]
    tool_use_id: str
    content: list[JsonObject] | JsonObject


class SearchCount(BaseModel):
    web_search_requests: int
    web_fetch_requests: int
