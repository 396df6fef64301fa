"""The process that tries grammars: bad ones are refused, and one that crashes or loops takes nothing else with it."""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from lfm.chat.tokenizer import Tokenizer
from lfm.engine.grammar_library import TokenTable
from lfm.engine.grammar_masks import token_table
from lfm.engine.grammar_worker import GrammarTrial, try_grammar
from lfm.errors import RequestError
from lfm.model.presets import PRESETS
from lfm.protocol import GrammarSpec

GOOD = GrammarSpec(text='start: "a" /[b-d]+/')


@pytest.fixture(scope="module")
def table() -> TokenTable:
    config = PRESETS["tiny"]
    return token_table(Tokenizer.byte_level(config), vocab_size=config.vocab_size)


@pytest.fixture
def trial(table: TokenTable) -> Iterator[GrammarTrial]:
    made = GrammarTrial(table, timeout_s=30)  # a busy machine takes its time to crash
    yield made
    made.close()


def chain(length: int) -> str:
    """Rules within rules: the library compiles them by recursion, and overflows its stack."""
    rules = [f'x{index}: "a" x{index + 1}' for index in range(length)]
    return "\n".join(["start: x0", *rules, f'x{length}: "b"'])


def intersections(count: int) -> str:
    """An intersection of so many languages that its states never end."""
    return "start: A\nA: " + " & ".join(f"/.*x{index}.{{{index}}}y{index}.*/" for index in range(count))


@pytest.mark.slow
def test_good_grammars_pass_and_are_remembered(trial: GrammarTrial) -> None:
    assert not trial.has_passed(GOOD)
    trial.check(GOOD)
    assert trial.has_passed(GOOD)
    trial.close()  # without a process, a grammar that passed before still passes
    trial.check(GOOD)
    trial.check(GrammarSpec(text='start: "other"'))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('start: "a', "lexer error"),
        ("start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ('start: "a" K\nK: /x/ & /y/', "."),
        (chain(60_000), "failed"),
        (intersections(200), "more than 2 s"),
    ],
    ids=["syntax", "nesting", "dead end", "crash", "loop"],
)
def test_a_bad_grammar_costs_its_own_request_only(trial: GrammarTrial, text: str, reason: str) -> None:
    trial.check(GOOD)
    if "2 s" in reason:
        trial._timeout_s = 2
    with pytest.raises(RequestError, match=reason) as caught:
        trial.check(GrammarSpec(text=text), param="tools")
    assert caught.value.param == "tools"
    assert caught.value.code == "invalid_grammar"
    trial._timeout_s = 30
    trial.check(GrammarSpec(text='start: "the next one"'))


@pytest.mark.slow
def test_what_killed_the_worker_is_not_tried_again_at_once(
    trial: GrammarTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many agents may send the same tools."""
    killer = GrammarSpec(text=chain(60_000))
    for _ in range(2):
        with pytest.raises(RequestError, match="failed"):
            trial.check(killer)
        assert trial._process is None
    trial.check(GOOD)
    alive = trial._process
    with pytest.raises(RequestError, match="failed"):
        trial.check(killer)
    assert trial._process is alive, "it was not tried"
    monkeypatch.setattr(trial, "_killed", {key: (0.0, entry[1]) for key, entry in trial._killed.items()})
    with pytest.raises(RequestError, match="failed"):
        trial.check(killer)
    assert trial._process is None, "after a while it was"


@pytest.mark.slow
def test_a_worker_that_eats_memory_costs_its_own_request_only(trial: GrammarTrial) -> None:
    """What it takes beyond its limit is refused, and the library does not survive that."""
    program = "from lfm.engine import grammar_worker as w; w._limit_resources(); bytearray(2 * w.MEMORY_BYTES)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode != 0
    assert "MemoryError" in ended.stderr
    trial.check(GOOD)
    assert trial._process is not None
    resource.prlimit(trial._process.pid, resource.RLIMIT_AS, (64 * 2**20, 64 * 2**20))  # as if all were taken
    with pytest.raises(RequestError, match="failed"):
        trial.check(GrammarSpec(text="start: " + '"a" ' * 20_000))
    trial.check(GrammarSpec(text='start: "the next one"'))


@pytest.mark.slow
def test_a_worker_that_is_gone_is_replaced(trial: GrammarTrial) -> None:
    trial.check(GOOD)
    process = trial._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trial.check(GrammarSpec(text='start: "after"'))


@pytest.mark.slow
def test_checks_of_several_threads_take_their_turns(trial: GrammarTrial) -> None:
    failures: list[BaseException] = []

    def check(index: int) -> None:
        try:
            trial.check(GrammarSpec(text=f'start: "{index}"'))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=check, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_trial_walks_some_tokens_into_the_grammar(table: TokenTable) -> None:
    tokenizer = table.compiled()
    stop_ids = frozenset(table.stop_ids)
    assert try_grammar(tokenizer, GOOD.text, stop_ids=stop_ids) is None
    assert try_grammar(tokenizer, 'start: "a" "b" K\nK: /x/ & /y/', stop_ids=stop_ids) is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("start: start", "it comes to a place where nothing is allowed"),
        ("start: K\nK: /a/ & /b/", "it comes to a place where nothing is allowed"),
        ('start: "a" start', "it can be read in too many ways at once"),
        ("start: x\nx: other", 'line 2, column 4: unknown name: "other"'),
        ('start: "a', "line 1, column 10: lexer error"),
        ('A: "x"', "no start rule found"),
        ("start: /(/", 'line 1, column 8: invalid regex "(" (in regex): regex parse error'),
    ],
    ids=["no text", "no match", "no end", "unknown name", "syntax", "no start", "regex"],
)
def test_what_is_wrong_is_said_in_words_and_places_of_the_writer(table: TokenTable, text: str, words: str) -> None:
    assert try_grammar(table.compiled(), f"%llguidance {{}}\n{text}", stop_ids=frozenset(table.stop_ids)) == words


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_is_gone(trial: GrammarTrial) -> None:
    trial.check(GOOD)
    process = trial._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()  # as the system does when the parent ends
    assert process.wait(timeout=30) == 0
