"""The loop of `lfm chat`: reads lines, keeps the history, shows the answers."""

import contextlib
import json
import sys
import time
from pathlib import Path

from lfm.cli.speakers import Json, Speaker, Turn
from lfm.cli.terminal import note, speed_line, write_text
from lfm.errors import OverloadedError, RequestError

HELP = """/help        this list
/reset       forget the conversation
/save FILE   write the conversation to FILE, as JSON
/exit        leave; so does Ctrl-D
Ctrl-C       stops the answer. A line that begins with a space is sent as it is, even if a / follows."""


class Conversation:
    """The messages so far, and the one who answers them. `system` None: no system message."""

    def __init__(self, speaker: Speaker, *, system: str | None) -> None:
        self._speaker = speaker
        self._start: list[Json] = [{"role": "system", "content": system}] if system is not None else []
        self._messages = list(self._start)

    def run(self) -> None:
        """Talk until /exit or the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and history
        note(f"Talking with {self._speaker.name}. /help lists the commands.")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                note("\nLeave with /exit or Ctrl-D.")
                continue
            command, _, argument = line.partition(" ")
            if command == "/exit":
                return
            if command.startswith("/"):
                self._obey(command, argument.strip())
            elif line.strip():
                self._answer(line)

    def _obey(self, command: str, argument: str) -> None:
        if command == "/help":
            note(HELP)
        elif command == "/reset":
            self._messages = list(self._start)
            note("The conversation is forgotten.")
        elif command == "/save" and argument:
            self._save(Path(argument).expanduser())
        elif command == "/save":
            note("/save needs the name of a file: /save FILE")
        else:
            note(f"{command} is not a command. /help lists them.")

    def _save(self, path: Path) -> None:
        try:
            with path.open("x", encoding="utf-8") as file:  # an existing file may be somebody's conversation
                json.dump({"model": self._speaker.name, "messages": self._messages}, file, ensure_ascii=False, indent=2)
                file.write("\n")
        except FileExistsError:
            note(f"{path} exists already. Choose another name.")
        except OSError as error:
            note(f"{path} cannot be written: {error.strerror}. Choose another place.")
        else:
            note(f"Saved {len(self._messages)} messages to {path}.")

    def _answer(self, line: str) -> None:
        """Answer one line. An answer that was stopped stays in the history as far as it went."""
        messages: list[Json] = [*self._messages, {"role": "user", "content": line}]
        turn = Turn()
        start_s = time.monotonic()
        first_s: float | None = None
        try:
            for piece in self._speaker.answer(messages, turn):
                if piece and first_s is None:
                    first_s = time.monotonic()
                turn.text += piece
                write_text(piece)
        except KeyboardInterrupt:
            note("\n(stopped)")
        except (RequestError, OverloadedError) as error:
            note(f"error: {error}")
            return
        write_text("\n")
        self._messages = [*messages, *turn.messages, {"role": "assistant", "content": turn.text}]
        now = time.monotonic()
        note(
            speed_line(
                num_prompt_tokens=turn.num_prompt_tokens,
                num_cached_tokens=turn.num_cached_tokens,
                num_output_tokens=turn.num_output_tokens,
                first_s=(first_s or start_s) - start_s,
                total_s=now - start_s,
            )
        )
