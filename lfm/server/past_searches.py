"""Searches of earlier answers, as clients send them back: what they found, as the model saw it."""

import base64

import orjson

from lfm.search.sources import Source, render

Json = dict[str, object]


def past_results(content: object) -> str:
    """The text of a result block that a client sends back; of another service's, its titles and addresses."""
    if isinstance(content, dict):
        return f"The search failed: {str(content.get('error_code', 'unavailable'))[:80]}."
    entries = [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []
    sources = [_unpacked(entry, number) for number, entry in enumerate(entries, 1)]
    return render(sources) if sources else "Nothing was found."


def past_sources(results: object) -> str:
    """The text of an item's results."""
    entries = [entry for entry in results if isinstance(entry, dict)] if isinstance(results, list) else []
    sources = []
    for at, entry in enumerate(entries, 1):
        number = entry.get("number")
        sources.append(
            Source(
                number=number if type(number) is int else at,
                text=str(entry.get("text") or ""),
                title=str(entry.get("title") or entry.get("filename") or ""),
                url=str(entry.get("url") or entry.get("file_id") or ""),
            )
        )
    return render(sources)


def _unpacked(entry: Json, number: int) -> Source:
    text = ""
    try:
        kept = orjson.loads(base64.b64decode(str(entry.get("encrypted_content", "")), validate=True))
        number, text = int(kept["number"]), str(kept["text"])
    except (ValueError, TypeError, KeyError, OverflowError):  # not ours
        pass
    return Source(number=number, text=text, title=str(entry.get("title") or ""), url=str(entry.get("url") or ""))
