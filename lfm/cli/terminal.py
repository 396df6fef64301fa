"""Talking to the person at the terminal: results on stdout, everything about getting there on stderr."""

import re
import shutil
import sys
import time

_CLEAR_LINE = "\r\x1b[2K"


class PhaseLine:
    """Shows the phases of a load on stderr: on a terminal one line that is rewritten, elsewhere the ends of a phase.

    Call it with each line of progress, and `finish` it with the line that stays.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._start_s = time.monotonic()
        self._label = ""
        self._held = ""  # off the terminal: the newest line of this phase that was not printed

    def __call__(self, text: str) -> None:
        label = re.split(r"[\[\d]", text, maxsplit=1)[0]
        is_new = label != self._label
        if self._is_terminal:
            end_of_last = "\n" if is_new and self._label else ""
            shown = _printable(text)[: shutil.get_terminal_size().columns - 1]
            self._write(f"{end_of_last}{_CLEAR_LINE}{shown}")
        elif is_new:
            self._flush_held()
            self._write(f"{_printable(text)}\n")
        else:
            self._held = text
        self._label = label

    def finish(self, text: str) -> None:
        """End the display with `text` and the seconds since it began."""
        self._flush_held()
        end_of_last = "\n" if self._is_terminal and self._label else ""
        self._write(f"{end_of_last}{_printable(text)} ({time.monotonic() - self._start_s:.1f} s)\n")
        self._label = ""

    def close(self) -> None:
        """Leave the terminal on a fresh line, after a failure. Idempotent."""
        self._flush_held()
        if self._is_terminal and self._label:
            self._write("\n")
        self._label = ""

    def _flush_held(self) -> None:
        if self._held:
            self._write(f"{_printable(self._held)}\n")
        self._held = ""

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _printable(text: str) -> str:
    return one_line(" ".join(text.split()))


def one_line(text: str) -> str:
    """`text`, a name of a file say, with line breaks and other control characters as escapes: a\\nb."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def write_text(text: str) -> None:
    """Write model output to stdout at once. On a terminal, control characters other than line breaks are made visible.

    Output of a model is data: an escape sequence in it must not drive the terminal.
    """
    if sys.stdout.isatty():
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line about the work to stderr."""
    print(text, file=sys.stderr, flush=True)


def speed_line(
    *, num_prompt_tokens: int, num_cached_tokens: int, num_output_tokens: int, first_s: float, total_s: float
) -> str:
    """Tokens and tokens per second of one answer. Seconds count from its submission; the first token is not decode."""
    cached = f" ({num_cached_tokens} cached)" if num_cached_tokens else ""
    line = f"[{num_prompt_tokens} tokens in{cached}, {num_output_tokens} out, first after {first_s:.2f} s"
    if num_output_tokens > 1 and total_s > first_s:
        line += f", {(num_output_tokens - 1) / (total_s - first_s):.1f} tok/s"
    return line + "]"
