"""Documents made by the tests: PDF files of a few lines, web pages, folders."""

from collections.abc import Sequence
from pathlib import Path

PAGE = """<!DOCTYPE html><html><head><title>Pumps of the north</title></head><body>
<nav><a href="/">Home</a> <a href="/buy">Buy now</a></nav>
<main><h1>Pumps</h1><p>A pump moves water from a low place to a high place, and it needs a steady source of power.</p>
<h2>Winter</h2><p>In winter the valve of a pump freezes unless it is drained first, which takes about ten minutes.</p>
</main><footer>All rights reserved</footer></body></html>"""


def pdf(pages: Sequence[str]) -> bytes:
    """A PDF with one line of Latin text on each page."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in pages:
        escaped = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
        stream = f"BT /F1 12 Tf 50 700 Td ({escaped}) Tj ET".encode("latin-1")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), b" ".join(kids))
    return _assembled(objects)


def _assembled(objects: Sequence[bytes]) -> bytes:
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return out + b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        size,
        table,
        size,
        len(out),
    )


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Make the files, and the folders that they are in. Returns `folder`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
