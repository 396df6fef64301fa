"""Writes to an index until it is killed: python -m tests.search.writer FOLDER FIRST COUNT [PAUSE_AT].

Documents FIRST to FIRST + COUNT - 1 are written, each again and again in new versions, and the index follows after each
one. Every commit of the truth is reported on stdout before the index follows. With PAUSE_AT "chunk" or "commit" the
process announces "pausing" and sleeps for ever in the middle of the tenth update of the index: after its first chunk,
or when all is written but the commit.
"""

import signal
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from lfm.search import text_index
from lfm.search.local_index import LocalIndex
from tests.search.indexes import document

NUM_SENTENCES = 30


def text_of(number: int, version: int) -> str:
    """Many chunks, each with the document's number and version in it."""
    return "".join(f"## Part {part}\n\nDocument d{number} in v{version}.\n\n" for part in range(NUM_SENTENCES))


def pause() -> None:
    print("pausing", flush=True)
    signal.pause()


def pause_in_update(number: int, where: str) -> None:
    """Make the update of the index after `number` others stop for ever."""
    numbers = count(1)
    original = text_index._Batch.update

    def update(batch: text_index._Batch) -> text_index.Update:
        made = original(batch)
        if next(numbers) < number:
            return made
        return text_index.Update(made.removed_documents, pausing(made), made.position)

    def pausing(made: text_index.Update) -> Iterator[text_index.IndexedChunk]:
        chunks = list(made.chunks)
        for index, chunk in enumerate(chunks):
            yield chunk
            if where == "chunk" and index == 0:
                pause()
        pause()

    text_index._Batch.update = update  # type: ignore[method-assign]


def main(folder: str, first: str, num_documents: str, pause_at: str = "") -> None:
    if pause_at:
        pause_in_update(10, pause_at)
    with LocalIndex(Path(folder)) as index:
        for version in count(1):
            for number in range(int(first), int(first) + int(num_documents)):
                index.store.write([document(f"/{number}.md", text_of(number, version), title="t")])
                print(f"{number} {version}", flush=True)
                index.sync()


if __name__ == "__main__":
    main(*sys.argv[1:])
