"""The process that parses HTML and PDF: python -m lfm.search.extraction_worker MEMORY_BYTES.

Parsers of hostile input run here, under limits on memory, processor time and files, with nothing in the environment
and no socket open. It takes one job after the other from stdin and answers on stdout; it ends with its parent's pipe,
with its limits, or with a crash, and none of these can hurt more than this one document.
"""

import io
import os
import resource
import signal
import sys
from typing import BinaryIO

from lfm.search.extracted import Extracted
from lfm.search.extraction_wire import LENGTH, MAX_TEXT_CHARS, Done, Failed, Job, decode_job, frame

MAX_PAGES = 5000


class Unreadable(Exception):
    """The cause, as the end of the sentence "the document ..."."""


def main() -> None:
    jobs = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not end up among the answers
    _limit_process(memory_bytes=int(sys.argv[1]))
    while (job := _read_job(jobs)) is not None:
        answers.write(frame(_answer(job)))
        answers.flush()


def _limit_process(*, memory_bytes: int) -> None:
    sys.dont_write_bytecode = True
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _read_job(jobs: BinaryIO) -> Job | None:
    header = jobs.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    return decode_job(jobs.read(LENGTH.unpack(header)[0]))


def _answer(job: Job) -> Done | Failed:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_s = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + job.cpu_s + 1, resource.RLIM_INFINITY))
    try:
        extracted = _html(job.data) if job.kind == "html" else _pdf(job.data)
        if len(extracted.text) > MAX_TEXT_CHARS:
            return Failed(f"has {len(extracted.text):,} characters of text. Allowed: {MAX_TEXT_CHARS:,}.")
        return Done(extracted)
    except Unreadable as error:
        return Failed(str(error))
    except MemoryError:
        return Failed("needs more memory than a document may use.")
    except ModuleNotFoundError as error:
        return Failed(f"cannot be read without the package {error.name}. Install lfm-serve's extra `search`.")
    except Exception as error:  # noqa: BLE001 -- whatever a parser raises on hostile input; the parent gets the cause
        return Failed(f"is damaged: its parser failed ({type(error).__name__}).")


def _html(data: bytes) -> Extracted:
    from trafilatura import extract, html2txt, load_html

    tree = load_html(data)
    if tree is None:  # HTML may leave out its outer tags, but trafilatura wants to see one
        tree = load_html(b"<html>" + data)
    if tree is None:
        raise Unreadable("is no HTML.")
    title = " ".join((tree.findtext(".//title") or "").split())
    text = extract(tree, output_format="markdown", favor_recall=True, include_comments=False) or ""
    if not text.strip():  # a page that looks like no article: take all that it shows
        text = html2txt(data)
    return Extracted(text=_encodable(text), title=_encodable(title), is_markdown=True)


def _pdf(data: bytes) -> Extracted:
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unreadable("is encrypted. Remove its password first.")
    if len(reader.pages) > MAX_PAGES:
        raise Unreadable(f"has {len(reader.pages):,} pages. Allowed: {MAX_PAGES:,}.")
    text = io.StringIO()
    page_starts = []
    for page in reader.pages:
        page_starts.append(text.tell())
        text.write(_encodable(page.extract_text()).rstrip() + "\n\n")
        if text.tell() > MAX_TEXT_CHARS:
            break
    title = reader.metadata.title if reader.metadata else None
    return Extracted(text=text.getvalue(), title=_encodable(title or ""), page_starts=tuple(page_starts))


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which no message and no database takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


if __name__ == "__main__":
    main()
