"""The `lfm` command: its verbs, and the one place where errors become a line of text and an exit code.

0 done; 1 our fault; 2 wrong usage or input; 3 the machine lacks something; 130 interrupted.
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from lfm import __version__
from lfm.cli.bench_offline import offline
from lfm.cli.bench_serve import serve as bench_serve
from lfm.cli.bench_startup import startup as bench_startup
from lfm.cli.chat import chat
from lfm.cli.evaluate import evaluate
from lfm.cli.generate import generate
from lfm.cli.index import index
from lfm.cli.info import info
from lfm.cli.serve import serve
from lfm.cli.train import train
from lfm.engine.threads import WAIT_ENVIRONMENT
from lfm.errors import LfmError

logger = logging.getLogger(__name__)

EXIT_BUG, EXIT_MACHINE, EXIT_INTERRUPTED = 1, 3, 130
_EPILOG = "Every flag --some-flag can also be set as LFM_SOME_FLAG in the environment."

app = typer.Typer(
    name="lfm",
    help="Run LFM2-24B-A2B and its relatives on your own hardware.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(
    help="Measure speed: in process (offline), over HTTP (serve), from cold (startup).", no_args_is_help=True
)
for verb in (serve, generate, chat, info):
    app.command(epilog=_EPILOG)(verb)
bench.command("offline", epilog=_EPILOG)(offline)
bench.command("serve", epilog=_EPILOG)(bench_serve)
bench.command("startup", epilog=_EPILOG)(bench_startup)
app.add_typer(bench, name="bench")
app.add_typer(index, name="index")
app.add_typer(train, name="train")
app.add_typer(evaluate, name="eval")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"lfm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line of this process and exit."""
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code. A failure prints one line on stderr, with --debug a traceback."""
    is_debug = "--debug" in args or os.environ.get("LFM_DEBUG", "").lower() in ("1", "true", "t", "yes", "y", "on")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("lfm").setLevel(logging.DEBUG if is_debug else logging.INFO)
    for name, value in WAIT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return int(app(args=list(args), prog_name="lfm", standalone_mode=False) or 0)
    except typer.TyperException as error:  # a flag that cannot be parsed, an unknown verb
        return _fail(error, _with_help_hint(error), error.exit_code)
    except LfmError as error:
        return _fail(error, str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except MemoryError as error:
        return _fail(error, "The machine ran out of memory. Give a smaller --max-model-len.", EXIT_MACHINE)
    except BrokenPipeError:  # the reader of our output went away, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at exit
        return EXIT_BUG
    except Exception as error:
        logger.debug("unforeseen", exc_info=True)
        hint = "" if is_debug else " Run again with --debug for the traceback, and please report it."
        print(f"error: a bug in lfm: {type(error).__name__}: {_one_line(str(error))}.{hint}", file=sys.stderr)
        return EXIT_BUG


def _fail(error: Exception, message: str, exit_code: int) -> int:
    logger.debug("the command failed", exc_info=error)
    if message.strip():  # empty where the help was shown instead
        print(f"error: {_one_line(message)}", file=sys.stderr)
    return exit_code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _with_help_hint(error: typer.TyperException) -> str:
    text, context = error.format_message().rstrip(), getattr(error, "ctx", None)
    if not text or context is None:
        return text
    return f"{text.removesuffix('.')}. See {context.command_path} --help."
