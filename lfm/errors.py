"""The tree of all exceptions that a user can cause or see.

LfmError                     show the message, not the traceback
+-- UsageError               exit 2: a flag, a value or a combination that cannot work
+-- MachineError             exit 3: the machine lacks something (memory, disk, port, GPU, network)
+-- ModelError               exit 2: a model folder that cannot be loaded (missing shard, corrupt header, other model)
+-- InternalError            exit 1, HTTP 500: our fault
+-- RequestError             HTTP 400: one request is wrong; carries `param` and `code`
    +-- NotFoundError        HTTP 404: unknown model or path
    +-- OverloadedError      HTTP 503: the queue is full; carries `retry_after_s`

A message says what was given, what is allowed and what to do, on one line.
"""


class LfmError(Exception):
    """Base of every error whose message is meant to be read by a user."""

    exit_code = 1


class UsageError(LfmError):
    """A flag, a value or a combination of them that cannot work."""

    exit_code = 2


class MachineError(LfmError):
    """The machine lacks something: memory, disk, a free port, a GPU, the network."""

    exit_code = 3


class ModelError(LfmError):
    """A model folder that cannot be loaded."""

    exit_code = 2


class InternalError(LfmError):
    """Our fault: the engine died, or a step produced no finite numbers."""

    exit_code = 1


class RequestError(LfmError):
    """One request is wrong. `status` is its HTTP status; `type`, `param` and `code` go into the error body."""

    exit_code = 2
    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class NotFoundError(RequestError):
    """The request names a model or a path that is not served here."""

    status = 404


class OverloadedError(RequestError):
    """The queue is full, or the server is loading or draining. `retry_after_s` is our estimate of the wait."""

    exit_code = 1
    status = 503
    type = "overloaded_error"

    def __init__(self, message: str, *, retry_after_s: float, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s
