"""`lfm generate`: the answer on stdout, everything else on stderr."""

import signal
import subprocess
from collections.abc import Callable

import pytest

from lfm.chat.messages import Message
from lfm.config import EngineConfig
from lfm.llm import LLM
from lfm.protocol import SamplingParams
from tests.cli.conftest import Lfm

GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(EngineConfig(model="random:tiny", device="cpu"))


def greedy(llm: LLM) -> SamplingParams:
    return SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=llm.tokenizer.stop_token_ids)


def test_a_prompt_is_a_user_message(lfm: Lfm, llm: LLM) -> None:
    done = lfm("generate", "random:tiny", "Hello", *GREEDY)
    assert done.code == 0
    assert done.out == llm.chat([Message(role="user", content="Hello")], sampling=greedy(llm)).text + "\n"
    assert "random:tiny is loaded on cpu in float32" in done.err
    assert "12 out" in done.err
    assert "tok/s" in done.err


def test_raw_continues_the_prompt_as_it_is(lfm: Lfm, llm: LLM) -> None:
    done = lfm("generate", "random:tiny", "Hello", "--raw", *GREEDY)
    assert done.out == llm.generate(["Hello"], sampling=greedy(llm))[0].text + "\n"


def test_a_dash_reads_the_prompt_from_stdin(lfm: Lfm) -> None:
    assert lfm("generate", "-", *GREEDY, stdin="Hello").out == lfm("generate", "Hello", *GREEDY).out


def test_a_system_message_goes_before_the_prompt(lfm: Lfm, llm: LLM) -> None:
    done = lfm("generate", "Hello", "--system", "Be brief.", *GREEDY)
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="Hello")]
    assert done.out == llm.chat(messages, sampling=greedy(llm)).text + "\n"


def test_a_seed_makes_it_repeatable_and_stop_ends_it(lfm: Lfm) -> None:
    first = lfm("generate", "Hello", "--seed", "1", "--max-tokens", "20").out
    assert lfm("generate", "Hello", "--seed", "1", "--max-tokens", "20").out == first
    stop = next(char for char in first if char.isascii() and char.isprintable())
    assert lfm("generate", "Hello", "--seed", "1", "--max-tokens", "20", "--stop", stop).out == (
        first.partition(stop)[0] + "\n"
    )


def test_the_model_may_come_from_the_environment(lfm: Lfm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM_MODEL", "random:nothing")
    assert "random:nothing is not known" in lfm("generate", "Hello").error
    assert lfm("generate", "random:tiny", "Hello", *GREEDY).code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "9"], "temperature=9.0 is out of range. Allowed: 0 to 2."),
        (["--temperature", "nan"], "temperature=nan is out of range"),
        (["--max-tokens", "0"], "max_tokens=0 is out of range"),
        (["--max-tokens", "40000"], "32768"),
        (["--max-model-len", "40000"], "--max-model-len 40000 is beyond the model's 32768 positions"),
    ],
)
def test_a_request_that_cannot_be_served_is_wrong_usage(lfm: Lfm, flags: list[str], message: str) -> None:
    done = lfm("generate", "Hello", *flags)
    assert done.code == 2
    assert message in done.error


def test_a_lone_surrogate_in_the_prompt_is_wrong_usage(lfm: Lfm) -> None:
    done = lfm("generate", "a\ud800b", *GREEDY)
    assert done.code == 2
    assert "surrogate" in done.error


@pytest.mark.slow
def test_ctrl_c_ends_it_with_130_and_no_traceback(start_lfm: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = start_lfm("generate", "Hello", "--raw", "--temperature", "0", LFM_DEVICE="cpu")
    assert process.stdout is not None
    assert process.stdout.read(5)  # it generates
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_bug(start_lfm: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = start_lfm("generate", "Hello", "--raw", "--temperature", "0", LFM_DEVICE="cpu")
    assert process.stdout is not None
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(30) == 1
