"""What is left of a document when its format is gone."""

import msgspec


class Extracted(msgspec.Struct, frozen=True, kw_only=True):
    """The text of a document. `title` is "" where the document names none.

    `page_starts` are the offsets in `text` at which the pages begin, empty for a document without pages.
    """

    text: str
    title: str = ""
    is_markdown: bool = False
    page_starts: tuple[int, ...] = ()
