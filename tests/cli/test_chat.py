"""`lfm chat`: history, commands, interruption; with a model in this process and with a server."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm.chat.defaults import RequestedSampling
from lfm.cli.conversation import Conversation
from lfm.cli.speakers import Json, LocalSpeaker, Turn, held_interrupt
from lfm.config import EngineConfig
from lfm.errors import OverloadedError, RequestError
from lfm.llm import LLM
from tests.cli.conftest import Lfm
from tests.server.fakes import MODEL, FakeBackend, serving


class Echo:
    """Answers with the last message in two pieces, and remembers what it was sent."""

    name = "echo"

    def __init__(self) -> None:
        self.asked: list[list[tuple[object, object]]] = []
        self.failure: BaseException | None = None

    def answer(self, messages: list[Json], turn: Turn) -> Iterator[str]:
        self.asked.append([(message["role"], message["content"]) for message in messages])
        turn.num_prompt_tokens, turn.num_output_tokens = 7, 3
        yield "you said: "
        if self.failure is not None:
            raise self.failure
        yield str(messages[-1]["content"])


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Talk":
    return Talk(monkeypatch, capsys)


class Talk:
    """One conversation: lines in, stdout and stderr out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.speaker = Echo()
        self.out = self.err = ""

    def __call__(self, *lines: str | BaseException, system: str | None = None) -> None:
        waiting = iter(lines)

        def read(prompt: str) -> str:
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        self._monkeypatch.setattr("builtins.input", read)
        Conversation(self.speaker, system=system).run()
        self.out, self.err = self._capsys.readouterr()


def test_every_turn_sends_the_turns_before_it(talk: Talk) -> None:
    talk("one", "two", system="Be kind.")
    assert talk.speaker.asked[1] == [
        ("system", "Be kind."),
        ("user", "one"),
        ("assistant", "you said: one"),
        ("user", "two"),
    ]
    assert talk.out == "you said: one\nyou said: two\n"


def test_tokens_and_speed_follow_each_answer(talk: Talk) -> None:
    talk("one", "two")
    assert talk.err.count("7 tokens in, 3 out") == 2
    assert talk.err.count("tok/s") == 2


def test_reset_forgets_all_but_the_system_message(talk: Talk) -> None:
    talk("one", "/reset", "two", system="Be kind.")
    assert talk.speaker.asked[1] == [("system", "Be kind."), ("user", "two")]


def test_help_and_unknown_commands_are_not_sent(talk: Talk) -> None:
    talk("/help", "/hlep", "/save", "", "   ")
    assert talk.speaker.asked == []
    assert "/save FILE" in talk.err
    assert "/hlep is not a command" in talk.err
    assert "needs the name of a file" in talk.err


def test_exit_and_the_end_of_the_input_leave(talk: Talk) -> None:
    talk("/exit", "never")
    assert talk.speaker.asked == []


def test_a_line_after_a_space_is_sent_though_it_begins_with_a_slash(talk: Talk) -> None:
    talk(" /etc is what?")
    assert talk.speaker.asked == [[("user", " /etc is what?")]]


def test_save_writes_the_conversation_and_never_over_another(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk("one", f"/save {path}", f"/save {path}", f"/save {tmp_path / 'no' / 'folder'}")
    assert json.loads(path.read_text()) == {
        "model": "echo",
        "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "you said: one"}],
    }
    assert "Saved 2 messages" in talk.err
    assert "exists already" in talk.err
    assert "cannot be written" in talk.err


def test_ctrl_c_stops_the_answer_and_keeps_what_came(talk: Talk) -> None:
    talk.speaker.failure = KeyboardInterrupt()
    talk("one", "two")
    assert talk.speaker.asked[1] == [("user", "one"), ("assistant", "you said: "), ("user", "two")]
    assert "(stopped)" in talk.err


def test_ctrl_c_at_the_prompt_does_not_leave(talk: Talk) -> None:
    talk(KeyboardInterrupt(), "one")
    assert len(talk.speaker.asked) == 1
    assert "/exit or Ctrl-D" in talk.err


@pytest.mark.parametrize("error", [RequestError("too long"), OverloadedError("too many", retry_after_s=1)])
def test_a_refused_turn_is_not_part_of_the_conversation(talk: Talk, error: Exception) -> None:
    talk.speaker.failure = error
    talk("one", "two")
    assert talk.speaker.asked[1] == [("user", "two")]
    assert f"error: {error}" in talk.err


def test_an_interrupt_is_held_until_it_is_asked_for() -> None:
    with held_interrupt() as interrupt:
        interrupt.raise_if_held()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.raise_if_held()


def test_a_second_interrupt_is_not_held() -> None:
    with held_interrupt():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stopped_answer_leaves_the_model_usable() -> None:
    with LLM(EngineConfig(model="random:tiny", device="cpu")) as llm:
        speaker = LocalSpeaker(llm, requested=RequestedSampling(temperature=0.0), max_tokens=200)
        messages: list[Json] = [{"role": "user", "content": "Hello"}]
        pieces = speaker.answer(messages, Turn())
        next(pieces)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
        assert not llm.engine.has_work()
        assert llm.engine.stats().num_blocks_used == 0
        turn = Turn()
        assert "".join(speaker.answer(messages, turn))
        assert turn.num_output_tokens > 1


def test_a_model_in_this_process_finds_its_earlier_turns_in_the_cache(lfm: Lfm) -> None:
    lines = "A question that is longer than one block of the cache\nAnd another\n"
    done = lfm("chat", "random:tiny", "--temperature", "0", "--max-tokens", "8", stdin=lines)
    assert done.code == 0
    assert "Talking with random:tiny" in done.err
    assert done.err.count("8 out") == 2
    assert "cached)" in done.err


def test_a_server_is_asked_for_its_model_and_streams(lfm: Lfm) -> None:
    backend = FakeBackend()
    backend.text = "Hello there"
    with serving(backend) as server:
        done = lfm("chat", "--url", f"{server.url}/v1", "--temperature", "0.5", stdin="one\ntwo\n")
    assert done.code == 0
    assert f"Talking with {MODEL}" in done.err
    assert done.out == "Hello there\nHello there\n"
    first, second = backend.requests
    assert first.sampling.temperature == 0.5
    assert len(second.prompt_ids) > len(first.prompt_ids)
    assert f"{len(first.prompt_ids)} tokens in, {len('Hello there') + 1} out" in done.err


def test_a_server_that_is_not_there_is_the_machine_s_fault(lfm: Lfm, free_port: int) -> None:
    done = lfm("chat", "--url", f"http://127.0.0.1:{free_port}", stdin="one\n")
    assert done.code == 3
    assert "does not answer" in done.error


def test_the_servers_words_are_shown_for_a_refused_turn(lfm: Lfm) -> None:
    backend = FakeBackend()
    backend.refusal = RequestError("prompt has 9 tokens. Send fewer.", param="prompt")
    with serving(backend) as server:
        done = lfm("chat", "--url", server.url, stdin="one\n")
    assert done.code == 0
    assert "Send fewer." in done.err
