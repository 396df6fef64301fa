"""Text from outside, made fit to be shown to a model or a person: no control characters, no hidden ones, no excess.

What a text says is not judged here. It cannot forge a role whatever it says: prompts are built from ids, and text is
encoded with control tokens switched off.
"""

import re

_LINE_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Control characters; lone surrogates; what turns text around; and the tags and fillers that carry hidden messages.
_HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f\U000e0100-\U000e01ef]"
)
_BLANK_LINES = re.compile("\n[ \t]*(?:\n[ \t]*)+\n")


def clean_text(text: str, *, max_chars: int) -> str:
    """`text` without hidden characters and with at most one blank line in a row, cut at `max_chars`."""
    text = _HIDDEN.sub("", _LINE_BREAKS.sub("\n", text[: 2 * max_chars]))
    return _BLANK_LINES.sub("\n\n", text).strip()[:max_chars].rstrip()


def clean_line(text: str, *, max_chars: int) -> str:
    """`text` on one line: for titles and the like."""
    return " ".join(_HIDDEN.sub(" ", text[: 2 * max_chars]).split())[:max_chars].rstrip()
