"""What was searched for a chat is kept for a while and no longer, and never more than so much of it."""

from lfm.chat.messages import Message, ToolCall
from lfm.search.chain import CACHE_S
from lfm.server import search_memory
from lfm.server.search_memory import SearchMemory, Unseen

FOUND = Message(role="tool", content="found", tool_call_id="ours")


def unseen(call_id: str) -> Unseen:
    return Unseen(
        turns=(),
        text="",
        calls=(ToolCall(name="web_search", arguments={}, id="ours"), ToolCall(name="now", arguments={}, id=call_id)),
        results=(FOUND,),
        shown_text="",
        shown_ids=(call_id,),
    )


def conversation(call_id: str) -> list[Message]:
    call = ToolCall(name="now", arguments={"zone": "UTC"}, id=call_id)
    return [
        Message(role="user", content="Hi"),
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="12:00", tool_call_id=call_id),
    ]


def knows(memory: SearchMemory, call_id: str) -> bool:
    return FOUND in memory.restored(conversation(call_id), tenant="a")


def test_the_callers_calls_are_as_it_sends_them() -> None:
    memory = SearchMemory()
    memory.keep(unseen("1"), tenant="a")
    _, turn, *results = memory.restored(conversation("1"), tenant="a")
    assert [(call.name, call.arguments) for call in turn.tool_calls] == [("web_search", {}), ("now", {"zone": "UTC"})]
    assert [result.text for result in results] == ["found", "12:00"]


def test_after_15_minutes_it_is_forgotten() -> None:
    now_s = [1000.0]
    memory = SearchMemory(clock=lambda: now_s[0])
    memory.keep(unseen("1"), tenant="a")
    now_s[0] += CACHE_S - 1
    assert knows(memory, "1")
    now_s[0] += 1
    assert not knows(memory, "1")


def test_of_too_many_the_oldest_is_forgotten() -> None:
    memory = SearchMemory()
    for number in range(search_memory._MAX_KEPT + 1):
        memory.keep(unseen(str(number)), tenant="a")
    assert not knows(memory, "0")
    assert knows(memory, "1")
