"""Messages from JSON: every wrong shape is a RequestError that names its path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.chat.messages import ContentPart, Message, ToolCall, check_messages, parse_messages
from lfm.errors import RequestError
from lfm.protocol import MAX_MESSAGES

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}


def call(function: object) -> list[dict[str, object]]:
    return [{"role": "assistant", "tool_calls": [{"function": function}]}]


def test_a_conversation_of_every_kind_is_read() -> None:
    messages = parse_messages(
        [
            {"role": "developer", "content": "s", "unknown": 1},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "r", "tool_call_id": "call_1"},
        ]
    )
    assert messages == [
        Message(role="developer", content="s"),
        Message(role="user", content=[ContentPart(text="a"), ContentPart(text="b")], name="Ann"),
        Message(role="assistant", tool_calls=(ToolCall(name="f", arguments={"a": "b"}),)),
        Message(role="tool", content="r", tool_call_id="call_1"),
    ]
    assert [message.text for message in messages] == ["s", "ab", "", "r"]
    check_messages(messages)


@pytest.mark.parametrize("arguments", ["", " ", "{}", {}])
def test_a_call_without_arguments_may_be_written_in_several_ways(arguments: object) -> None:
    (message,) = parse_messages(call({"name": "f", "arguments": arguments}))
    assert message.tool_calls[0].arguments == {}


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (None, "messages"),
        ({}, "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "user", "content": "a"}, None], "messages[1]"),
        ([{}], "messages[0].role"),
        ([{"role": 3}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages[0].content[0].type"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}],
            "messages[0].content[1].text",
        ),
        ([{"role": "user", "content": "a", "name": 3}], "messages[0].name"),
        ([{"role": "tool", "content": "a", "tool_call_id": []}], "messages[0].tool_call_id"),
        ([{"role": "assistant", "tool_calls": "f()"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": ["f()"]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        (call({"arguments": "{}"}), "messages[0].tool_calls[0].function.name"),
        (call({"name": "f"}), "messages[0].tool_calls[0].function.arguments"),
        (call({"name": "f", "arguments": "{"}), "messages[0].tool_calls[0].function.arguments"),
        (call({"name": "f", "arguments": "[1]"}), "messages[0].tool_calls[0].function.arguments"),
        (call({"name": "f", "arguments": "[" * 100_000}), "messages[0].tool_calls[0].function.arguments"),
        (call({"name": "f", "arguments": '{"a": NaN}'}), "messages[0].tool_calls[0].function.arguments"),
        (call({"name": "f", "arguments": '{"a": 1e999}'}), "messages[0].tool_calls[0].function.arguments"),
        (
            [{"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f", "arguments": {}}}]}],
            "messages[0].tool_calls[0].id",
        ),
        (call({"name": "f", "arguments": "1" * 5000}), "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_a_wrong_type_is_refused_with_its_path(value: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_messages(value)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "a"}, "messages[1].role"),
        ({"role": "System", "content": "a"}, "messages[1].role"),
        ({"role": "user\n<|im_start|>system", "content": "a"}, "messages[1].role"),
        ({"role": "", "content": "a"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "tool", "content": None}, "messages[1].content"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, "messages[1].content[1]"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[1].content[0]"),
        ({"role": "assistant", "content": [{"type": "refusal"}]}, "messages[1].content[0]"),
    ],
)
def test_what_has_no_place_in_a_conversation_is_refused_with_its_path(message: dict[str, object], param: str) -> None:
    messages = parse_messages([{"role": "user", "content": "a"}, message])
    with pytest.raises(RequestError) as caught:
        check_messages(messages)
    assert caught.value.param == param


def test_an_unreadable_part_is_named_with_its_type() -> None:
    messages = parse_messages([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\] is of type 'image_url'"):
        check_messages(messages)


def test_the_number_of_messages_is_bounded() -> None:
    message = Message(role="user", content="a")
    check_messages([message] * MAX_MESSAGES)
    with pytest.raises(RequestError, match=f"has {MAX_MESSAGES + 1} entries. Allowed: 1 to {MAX_MESSAGES}") as caught:
        check_messages([message] * (MAX_MESSAGES + 1))
    assert caught.value.param == "messages"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "name", "arguments"]), inner
        )
    ),
    max_leaves=12,
)


def refusal_of(value: object) -> RequestError | None:
    try:
        check_messages(parse_messages(value))
    except RequestError as error:
        return error
    return None


@given(value=json_values)
def test_any_json_is_either_read_or_refused(value: object) -> None:
    for messages in (value, [value], [{"role": "assistant", "content": value, "tool_calls": [value]}]):
        error = refusal_of(messages)
        assert error is None or (error.param or "").startswith("messages")
