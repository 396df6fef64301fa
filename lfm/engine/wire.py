"""What travels between the processes: typed structs, and nothing that could run code when it is read.

Three ways, each with its own set of messages:

    data     ROUTER (engine) <-> DEALER (one per API process), `ipc://`; msgpack. A message is a list of frames and each
             frame is one struct, so that one message carries all that an API process has to say at that moment.
    status   PUB (supervisor) -> SUB (every API process), `ipc://`; msgpack. The newest one says everything.
    control  the engine process's stdin (Setup, then commands) and stdout (reports); one JSON struct per line.

Prompts are packed as int32, once per prompt: n choices of a 30,000-token prompt are one frame of 120 KB.
So are grammars.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lfm.config import EngineConfig
from lfm.errors import (
    InternalError,
    LfmError,
    MachineError,
    ModelError,
    NotFoundError,
    OverloadedError,
    RequestError,
    UsageError,
)
from lfm.protocol import EngineInfo, EngineRequest, EngineStats, ErrorInfo, GrammarSpec, TokenEvent

# A prompt of the longest context (1,048,576 ids, 4 MiB), the longest grammar (4 MiB), and 128 choices with 1,024 logit
# biases and banned ids each take under 11 MiB.
MAX_REQUEST_FRAME_BYTES = 16 * 1024 * 1024
# 1,048,576 prompt positions with 20 logprobs each take some 350 MB.
MAX_EVENT_FRAME_BYTES = 1024 * 1024 * 1024

# What may wait for a client in each process, one message per step: at 100 steps/s it may fall 40 s behind.
MAX_UNREAD_MESSAGES = 4096
MAX_CAUSE_CHARS = 500  # of an exception that is not ours


class Hello(msgspec.Struct, tag="hello", array_like=True, frozen=True):
    """An API process is there and wants statistics. Comes before its first Add."""


class Goodbye(msgspec.Struct, tag="goodbye", array_like=True, frozen=True):
    """An API process leaves: whatever it still has running is aborted."""


class Add(msgspec.Struct, tag="add", array_like=True, frozen=True):
    """Sequences of one prompt and one grammar. `prompt` is int32 in host byte order.

    The requests' own `prompt_ids` are empty, and their `grammar` is None.
    """

    prompt: bytes
    requests: list[EngineRequest]
    grammar: GrammarSpec | None = None


class Abort(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    """End these requests. Unknown and ended ones are ignored."""

    request_ids: list[str]


class Events(msgspec.Struct, tag="events", array_like=True, frozen=True):
    """What one step did for one API process, and the engine's counters after it."""

    events: list[TokenEvent]
    stats: EngineStats


class Lost(msgspec.Struct, tag="lost", array_like=True, frozen=True):
    """This API process did not read for so long that its requests were aborted; their last events are gone."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor tells every API process whenever it changes.

    `epoch` numbers the engine processes; each listens on its own socket. `info` is set while that engine serves.
    `reason` is None while all is well. `is_accepting` is False while the engine drains. `is_final`: no engine follows.
    """

    epoch: int
    reason: str | None
    info: EngineInfo | None = None
    is_accepting: bool = True
    is_final: bool = False
    retry_after_s: float = 1.0


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on the engine process's stdin. `factory` is "module:function"; only tests set another one."""

    config: EngineConfig
    factory: str
    address: str
    heartbeat_path: str
    parent_pid: int
    stuck_seconds: float
    log_level: int


class Drain(msgspec.Struct, tag="drain", frozen=True):
    """Finish what runs, for at most `seconds`; abort the rest; exit."""

    seconds: float


class Phase(msgspec.Struct, tag="phase", frozen=True):
    """The engine process does something long: loading, compiling, capturing."""

    text: str


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine listens on its socket."""

    info: EngineInfo


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine process ends because of this error. `kind` is the name of a class in `lfm.errors`."""

    kind: str
    message: str


FromClient = Hello | Goodbye | Add | Abort
FromEngine = Events | Lost
Report = Phase | Ready | Failed

client_frame_decoder = msgspec.msgpack.Decoder(FromClient)
engine_frame_decoder = msgspec.msgpack.Decoder(FromEngine)
status_decoder = msgspec.msgpack.Decoder(EngineStatus)
setup_decoder = msgspec.json.Decoder(Setup)
command_decoder = msgspec.json.Decoder(Drain)
report_decoder = msgspec.json.Decoder(Report)


def data_address(directory: Path, *, epoch: int) -> str:
    """Where the engine process number `epoch` listens. A new one each time: nothing old can be read by a new engine."""
    return f"ipc://{directory}/engine-{epoch}"


def status_address(directory: Path) -> str:
    """Where the supervisor publishes EngineStatus."""
    return f"ipc://{directory}/status"


def encode_adds(requests: Sequence[EngineRequest]) -> list[bytes]:
    """One Add frame per distinct prompt and grammar, in order. Raises RequestError for what cannot travel."""
    groups: list[list[EngineRequest]] = []
    for request in requests:
        first = groups[-1][0] if groups else None
        if first is None or first.prompt_ids is not request.prompt_ids or first.grammar is not request.grammar:
            groups.append([])
        groups[-1].append(request)
    return [_encode_add(group[0].prompt_ids, group[0].grammar, group) for group in groups]


def _encode_add(prompt_ids: list[int], grammar: GrammarSpec | None, requests: list[EngineRequest]) -> bytes:
    requests = [msgspec.structs.replace(request, prompt_ids=[], grammar=None) for request in requests]
    try:
        prompt = array("i", prompt_ids).tobytes()
    except (OverflowError, TypeError) as error:
        message = f"prompt holds a token id that is no int32 ({error}). Send ids of the model's vocabulary."
        raise RequestError(message, param="prompt") from error
    try:
        frame = msgspec.msgpack.encode(Add(prompt, requests, grammar))
        client_frame_decoder.decode(frame)  # what the engine could not read would never be answered
    except (OverflowError, TypeError, ValueError) as error:
        raise RequestError(f"a field of the request has a value of a wrong type or size ({error}).") from error
    if len(frame) > MAX_REQUEST_FRAME_BYTES:
        raise RequestError(
            f"prompt of {len(prompt_ids)} tokens makes a message of {len(frame)} bytes; at most "
            f"{MAX_REQUEST_FRAME_BYTES} bytes can reach the engine. Send a shorter prompt or grammar.",
            param="prompt",
        )
    return frame


def requests_of(message: Add) -> list[EngineRequest]:
    """The requests of an Add with prompt and grammar put back; all share them. Raises ValueError if it is cut off."""
    prompt = array("i")
    prompt.frombytes(message.prompt)
    prompt_ids = prompt.tolist()
    return [
        msgspec.structs.replace(request, prompt_ids=prompt_ids, grammar=message.grammar) for request in message.requests
    ]


def to_error_info(error: RequestError) -> ErrorInfo:
    """The error as it crosses to the API process."""
    retry_after_s = error.retry_after_s if isinstance(error, OverloadedError) else None
    return ErrorInfo(
        message=error.message,
        type=error.type,
        param=error.param,
        code=error.code,
        status=error.status,
        retry_after_s=retry_after_s,
    )


def to_request_error(info: ErrorInfo) -> LfmError:
    """The other way round: what `submit` raises. A status of our own fault becomes InternalError."""
    if info.status == OverloadedError.status:
        return OverloadedError(info.message, retry_after_s=info.retry_after_s or 1.0, code=info.code)
    if info.status == NotFoundError.status:
        return NotFoundError(info.message, param=info.param, code=info.code)
    if info.status < 500:
        return RequestError(info.message, param=info.param, code=info.code)
    return InternalError(info.message)


STARTUP_ERRORS: dict[str, type[LfmError]] = {
    cls.__name__: cls for cls in (UsageError, MachineError, ModelError, InternalError)
}


def to_failure(error: BaseException) -> Failed:
    """The report of an error that ends the engine process; a class unknown here is our own fault."""
    for cls in type(error).__mro__:
        if cls.__name__ in STARTUP_ERRORS and isinstance(error, LfmError):
            return Failed(cls.__name__, str(error))
    first_line = str(error).strip().partition("\n")[0]
    return Failed(InternalError.__name__, f"{type(error).__name__}: {first_line[:MAX_CAUSE_CHARS]}")


def to_exception(failure: Failed) -> LfmError:
    """The reported error as an exception of its own class, so that the command exits with its code."""
    return STARTUP_ERRORS.get(failure.kind, InternalError)(failure.message)
