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
    made = GrammarTrial(table, timeout_s=2)
    yield made
    made.close()


def chain(length: int) -> str:
    """Rules within rules: the library compiles them by recursion, and overflows its stack."""
    hungry = GrammarSpec(text="start: " + '"a" ' * 20_000)
    with pytest.raises(RequestError, match="failed"):
        trial.check(hungry)
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


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_is_gone(trial: GrammarTrial) -> None:
    trial.check(GOOD)
    process = trial._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()  # as the system does when the parent ends
    assert process.wait(timeout=30) == 0
