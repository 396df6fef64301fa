"""Runs tools of the server between turns of the model. To the shapes it is one answer, like that of a single turn.

    turn of the model -> its calls of our tools are run -> the next turn, with the results -> ... -> the answer

Calls of the caller's own tools go out, and end the answer. Text of every turn belongs to the answer; what the tools do
comes as steps between the texts.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from lfm.chat.call_parser_stream import CallDelta
from lfm.chat.messages import Message, ToolCall
from lfm.chat.output import Delta, ToolStep
from lfm.server.admission import num_context_tokens
from lfm.server.constraints import Turn, plan_next_turn, with_tools
from lfm.server.generation import Choice, Generation
from lfm.server.past_searches import FoundMessage
from lfm.server.search_annotations import Cited
from lfm.server.search_memory import Unseen
from lfm.server.search_run import NO_MORE, SearchRun, run_search
from lfm.server.server_tools import SearchTool, ServerTools
from lfm.server.state import AppState, RequestRecord

_ANSWER_TOKENS = 1_024  # kept for the answer when results are packed
_JOINT_TOKENS = 256  # of a turn's control tokens, its calls and the headings of sources


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchStep(ToolStep):
    """A search has begun, or is done (`run` is set then). `call_id` tells which of them.

    `is_after_calls`: calls of the caller's own tools came before it.
    """

    call_id: str
    tool: SearchTool
    query: str
    run: SearchRun | None = None
    is_after_calls: bool = False


@dataclass(slots=True)
class _Call:
    """A call of one of our tools, while it is written."""

    delta: CallDelta
    tool: SearchTool

    @property
    def query(self) -> str:
        """What to look for; empty if the arguments are not whole."""
        try:
            arguments = msgspec.json.decode(self.delta.arguments or "{}")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return ""
        query = arguments.get("query") if isinstance(arguments, dict) else None
        return query if isinstance(query, str) else ""


class ToolLoop:
    """A `DeltaSource` of one choice. `generate` makes the generation of a later turn, for at most so many tokens.

    A model that has searched as often as the operator or the request allows answers without tools of ours.
    """

    def __init__(
        self,
        first: Generation,
        *,
        turn: Turn,
        server_tools: ServerTools,
        generate: Callable[[Turn, int], Generation],
        state: AppState,
        record: RequestRecord,
        tenant: str,
        param: str,
    ) -> None:
        self._generation = first
        self._turn = turn
        self._tools = server_tools.tools
        self._citations = server_tools.citations
        self._memory = server_tools.memory
        self._num_given = len(turn.messages)
        self._generate = generate
        self._state, self._record = state, record
        self._tenant, self._param = tenant, param
        self._token_limit = first.choices[0].request.sampling.max_tokens
        self._past = [0, 0, 0]  # prompt, cached and output tokens of the turns before
        self._num_chars = 0  # of the answer's text so far
        self._answer_text: list[str] = []
        self._turn_text: list[str] = []
        self._calls: dict[int, _Call] = {}  # of our tools in this turn, by their index among all calls
        self._their_calls: dict[int, CallDelta] = {}  # the first piece of each of the caller's, in the same way
        self._num_uses: dict[str, int] = dict.fromkeys(self._tools, 0)
        self._work: asyncio.Task[list[tuple[Choice, Delta]]] | None = None
        self._is_over = False

    @property
    def choices(self) -> Sequence[Choice]:
        return self._generation.choices

    @property
    def is_finished(self) -> bool:
        return self._is_over

    @property
    def num_prompt_tokens(self) -> int:
        return self._past[0] + self._generation.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        return self._past[1] + self._generation.num_cached_tokens

    @property
    def num_output_tokens(self) -> int:
        return self._past[2] + self._generation.num_output_tokens

    async def open(self) -> None:
        await self._generation.open()

    async def next_deltas(self, *, timeout_s: float | None = None) -> list[tuple[Choice, Delta]] | None:
        """As `Generation.next_deltas`: of all turns, with the steps of the tools between them."""
        while not self._is_over:
            if self._work is not None:
                done, _ = await asyncio.wait({self._work}, timeout=timeout_s)
                if not done:
                    return None
                work, self._work = self._work, None
                return work.result()
            news = await self._generation.next_deltas(timeout_s=timeout_s)
            if news is None:
                return None
            choice, delta = news[0]
            if shown := self._read(choice, delta):
                return [(choice, shown)]
        return []

    async def aclose(self) -> None:
        """Abort what runs, searches included, and note what all turns used."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait({self._work})
            self._work = None
        await self._generation.aclose()
        record = self._record
        record.num_prompt_tokens = self.num_prompt_tokens
        record.num_cached_tokens = self.num_cached_tokens
        record.num_output_tokens = self.num_output_tokens

    def _read(self, choice: Choice, delta: Delta) -> Delta:
        """What the caller gets of a delta. At the end of a turn that called our tools, have them run."""
        theirs = [piece for piece in map(self._sort, delta.calls) if piece is not None]
        self._num_chars += len(delta.text)
        self._answer_text.append(delta.text)
        self._turn_text.append(delta.text)
        if delta.finish_reason is None:
            return replace(delta, calls=tuple(theirs))
        if delta.finish_reason != "tool_calls" or not self._calls:
            self._is_over = True
            if delta.finish_reason == "tool_calls":
                self._keep_unseen(())
            return replace(delta, calls=tuple(theirs))
        begun = tuple(self._step(call) for call in self._calls.values())
        is_last = bool(self._their_calls)  # the caller has to run its own
        self._work = asyncio.create_task(self._run_calls(choice, delta if is_last else None))
        return replace(delta, calls=tuple(theirs), finish_reason=None, steps=begun)

    def _sort(self, piece: CallDelta) -> CallDelta | None:
        """A piece of one of the caller's calls, numbered among those; None for one of ours, which is kept."""
        if piece.index in self._calls:
            call = self._calls[piece.index]
            call.delta = replace(call.delta, arguments=call.delta.arguments + piece.arguments)
            return None
        if piece.index not in self._their_calls:
            if piece.name is not None and piece.name in self._tools:
                self._calls[piece.index] = _Call(piece, self._tools[piece.name])
                return None
            self._their_calls[piece.index] = piece
        return replace(piece, index=list(self._their_calls).index(piece.index))

    def _step(self, call: _Call, run: SearchRun | None = None) -> SearchStep:
        return SearchStep(
            position=self._num_chars,
            call_id=call.delta.id,
            tool=call.tool,
            query=call.query,
            run=run,
            is_after_calls=bool(self._their_calls),
        )

    async def _run_calls(self, choice: Choice, last: Delta | None) -> list[tuple[Choice, Delta]]:
        """Run this turn's calls, then begin the next turn. `last` ends the answer instead: the caller has to act."""
        calls = list(self._calls.values())
        runs = await self._search_all(calls)
        steps = tuple(self._step(call, run) for call, run in zip(calls, runs, strict=True))
        if last is not None:
            self._is_over = True
            self._keep_unseen(_past_results(calls, runs))
            return [(choice, Delta(finish_reason=last.finish_reason, steps=steps))]
        if not await self._begin_turn(calls, runs):
            self._is_over = True
            return [(choice, Delta(finish_reason="length", steps=steps))]
        return [(choice, Delta(steps=steps))]

    def _keep_unseen(self, results: Sequence[Message]) -> None:
        """Keep what this answer searched, whose caller is shown its own calls only and will send no more back."""
        turns = self._turn.messages[self._num_given :]
        if self._memory is None or not self._their_calls or not (turns or results):
            return
        calls = {index: _past_call(call) for index, call in self._calls.items()}
        calls |= {
            at: ToolCall(name=call.name or "", arguments={}, id=call.id) for at, call in self._their_calls.items()
        }
        unseen = Unseen(
            turns=tuple(turns),
            text="".join(self._turn_text),
            calls=tuple(calls[index] for index in sorted(calls)),
            results=tuple(results),
            shown_text="".join(self._answer_text),
            shown_ids=tuple(call.id for call in self._their_calls.values()),
        )
        self._memory.keep(unseen, tenant=self._tenant)

    async def _search_all(self, calls: Sequence[_Call]) -> list[SearchRun]:
        """Run calls at once. Their sources are numbered in the order of the calls, whichever is done first."""
        are_allowed = [self._use(call.tool) for call in calls]
        room_tokens = self._room_tokens() // max(1, sum(are_allowed))
        runs = await asyncio.gather(
            *(
                self._search(call, room_tokens) if is_allowed else _not_allowed()
                for call, is_allowed in zip(calls, are_allowed, strict=True)
            )
        )
        numbered = []
        for call, run in zip(calls, runs, strict=True):
            numbered.append(run.numbered_from(self._citations.next_number))
            for source in numbered[-1].sources:
                self._citations.add(Cited(source=source, is_file=call.tool.name == "file_search"))
        return numbered

    async def _search(self, call: _Call, room_tokens: int) -> SearchRun:
        return await run_search(
            call.query,
            call.tool,
            service=self._state.search,
            tenant=self._tenant,
            room_tokens=room_tokens,
            count_tokens=self._count_tokens,
            request_id=self._record.request_id,
        )

    def _count_tokens(self, text: str) -> int:
        return len(self._state.tokenizer.encode(text))

    def _use(self, tool: SearchTool) -> bool:
        """Count one use of a tool; False if that would be one too many."""
        if not self._may_use(tool):
            return False
        self._num_uses[tool.name] += 1
        return True

    def _may_use(self, tool: SearchTool) -> bool:
        is_over = sum(self._num_uses.values()) >= self._state.search.config.max_searches
        return not is_over and (tool.max_uses is None or self._num_uses[tool.name] < tool.max_uses)

    def _room_tokens(self) -> int:
        """What the results of this turn's calls may take, so that an answer fits behind them."""
        (choice,) = self._generation.choices
        used = len(choice.request.prompt_ids) + self._generation.num_output_tokens + _JOINT_TOKENS
        left = num_context_tokens(self._state) - used
        return left - min(_ANSWER_TOKENS, left // 2)

    async def _begin_turn(self, calls: Sequence[_Call], runs: Sequence[SearchRun]) -> bool:
        """Give the model the results and let it go on; False if the answer has used up its tokens."""
        left = self._token_limit - self.num_output_tokens
        if left < 1:
            return False
        text = "".join(self._turn_text)
        more = [
            Message(role="assistant", content=text, tool_calls=tuple(map(_past_call, calls))),
            *_past_results(calls, runs),
        ]
        self._turn = await plan_next_turn(self._turn, more, state=self._state, tenant=self._tenant, param=self._param)
        used_up = {name for name, tool in self._tools.items() if not self._may_use(tool)}
        assert self._turn.rules.tools is not None, "tools were called"
        if used_up:
            names = frozenset(self._turn.rules.tools.names) - used_up
            self._turn = await with_tools(self._turn, names, state=self._state, tenant=self._tenant)
        await self._generation.aclose()
        self._past = [self.num_prompt_tokens, self.num_cached_tokens, self.num_output_tokens]
        self._generation = self._generate(self._turn, left)
        self._calls, self._their_calls, self._turn_text = {}, {}, []
        await self._generation.open()
        return True


async def _not_allowed() -> SearchRun:
    return SearchRun(message=NO_MORE, error="max_uses_exceeded")


def _past_results(calls: Sequence[_Call], runs: Sequence[SearchRun]) -> list[Message]:
    """What the model is told of its calls."""
    return [
        FoundMessage(
            role="tool",
            content=run.text,
            tool_call_id=call.delta.id,
            sources=run.sources,
            is_file=call.tool.name == "file_search",
        )
        for call, run in zip(calls, runs, strict=True)
    ]


def _past_call(call: _Call) -> ToolCall:
    return ToolCall(name=call.tool.name, arguments={"query": call.query}, id=call.delta.id)
