"""Whose API a request speaks. Anthropic's has paths of its own. OpenAI's and Together's share theirs, but differ in a
few places where no answer satisfies both; the User-Agent decides there.

GET /models                     {"object": "list", "data": [...]}   |  a bare array
completions object              text_completion                     |  text.completion, completion.chunk
delta.role                      first chunk (openai joins strings)  |  every chunk
usage of a stream               extra chunk, when asked for         |  last chunk, always
echo of completions             in front of the text                |  only in `prompt`
"""

import re

from starlette.datastructures import Headers

TOGETHER_AGENT = re.compile(
    r"(Async)?Together/"
)  # "Together/Python 3.1.1", "AsyncTogether/Python", "Together/JS 0.52.0"


def is_together(headers: Headers) -> bool:
    return TOGETHER_AGENT.match(headers.get("user-agent", "")) is not None


def is_anthropic(path: str) -> bool:
    return path.endswith(("/messages", "/messages/count_tokens", "/messages/render"))
