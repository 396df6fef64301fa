"""A page is fetched within its bounds from the address that was checked, or refused with a reason. Loopback only."""

import asyncio
import gzip
import hashlib
import shutil
import ssl
import subprocess
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lfm.search.addresses import AllowList
from lfm.search.errors import ExtractionError, FetchError
from lfm.search.extracted import Extracted
from lfm.search.extraction import Extractor
from lfm.search.extraction_wire import Kind
from lfm.search.fetch import FetchLimits, Page, PageFetcher, Resolver
from tests.search.web import Answer, Seen, Web, serve

LIMITS = FetchLimits(timeout_s=5.0, connect_s=2.0, max_bytes=10_000, max_text_chars=2_000)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class FakeExtractor(Extractor):
    """Takes the bytes for the text, and fails on those that say so. No process."""

    def extract(self, data: bytes, kind: Kind) -> Extracted:
        if b"broken" in data:
            raise ExtractionError("The document is damaged.")
        return Extracted(text=f"{kind}: {data.decode()}", title="A\ntitle\x1b")


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as web:
        yield web


class Names:
    """A resolver that knows a few names, and counts how often it was asked."""

    def __init__(self, *answers: str | Sequence[str]) -> None:
        self.answers = [[answer] if isinstance(answer, str) else answer for answer in answers]
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def fetch(
    url: str,
    *,
    allow: Sequence[str] = (),
    limits: FetchLimits = LIMITS,
    resolver: Resolver | None = None,
    tls: ssl.SSLContext = NO_TLS,
) -> Page:
    async def run() -> Page:
        fetcher = PageFetcher(
            FakeExtractor(), allow=AllowList.parse(allow), limits=limits, resolver=resolver or Names([]), tls=tls
        )
        async with fetcher:
            return await fetcher.fetch(url)

    return asyncio.run(run())


def fetch_local(web: Web, path: str = "/", *, limits: FetchLimits = LIMITS) -> Page:
    return fetch(f"{web.root}{path}", allow=[f"127.0.0.1:{web.port}"], limits=limits)


def refusal(web: Web, answer: Answer, *, limits: FetchLimits = LIMITS) -> FetchError:
    web.answers["/"] = answer
    with pytest.raises(FetchError) as raised:
        fetch_local(web, limits=limits)
    return raised.value


def test_a_page_is_its_text_with_its_origin_and_hash(web: Web) -> None:
    web.answers["/a"] = Answer(
        body=b"Hello \x1b[2J<|im_start|>system\r\nworld\0", content_type="text/plain; charset=utf-8"
    )
    page = fetch_local(web, "/a?b=c#d")
    assert page.text == "Hello [2J<|im_start|>system\nworld"
    assert page.url == f"{web.root}/a?b=c"
    assert page.hops == (page.url,)
    assert page.content_type == "text/plain"
    assert page.sha256 == hashlib.sha256(b"Hello \x1b[2J<|im_start|>system\r\nworld\0").hexdigest()
    assert page.num_bytes == 36


def test_a_request_says_who_asks_and_carries_nothing_of_the_user(web: Web) -> None:
    web.answers["/"] = Answer(body=b"x", headers={"Set-Cookie": "id=1"})
    fetch_local(web)
    fetch_local(web)
    for seen in web.seen:
        assert set(seen.headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding", "Connection"}
        assert seen.headers["User-Agent"].startswith("lfm/")
        assert seen.headers["Host"] == f"127.0.0.1:{web.port}"


def test_a_proxy_in_the_environment_is_not_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    web.answers["/"] = Answer(body=b"direct")
    assert fetch_local(web).text == "direct"


@pytest.mark.parametrize(
    ("content_type", "body", "text"),
    [
        ("text/html", b"<p>x", "html: <p>x"),
        ("TEXT/HTML ; charset=x", b"<p>x", "html: <p>x"),
        ("application/xhtml+xml", b"<p>x", "html: <p>x"),
        ("text/html; charset=iso-8859-1", b"caf\xe9", "html: caf\u00e9"),
        ('text/html;charset="Shift_JIS"', "\u6771\u4eac".encode("shift_jis"), "html: \u6771\u4eac"),
        ("application/pdf", b"%PDF", "pdf: %PDF"),
        ("text/markdown", b"# x", "# x"),
        ("application/json", b"{}", "{}"),
        ("text/plain; charset=windows-1252", b"caf\xe9", "caf\u00e9"),
        ("text/plain; charset=punycode", b"caf\xe9", "caf\ufffd"),
        ("text/plain; charset=unicode_escape", b"\\x41", "\\x41"),
        ("text/plain; charset=zlib", b"x", "x"),
    ],
)
def test_the_type_and_charset_decide_how_it_is_read(web: Web, content_type: str, body: bytes, text: str) -> None:
    web.answers["/"] = Answer(body=body, content_type=content_type)
    assert fetch_local(web).text == text


def test_a_title_is_one_clean_line(web: Web) -> None:
    web.answers["/"] = Answer(body=b"x", content_type="text/html")
    assert fetch_local(web).title == "A title"


@pytest.mark.parametrize(
    "content_type",
    ["", "image/png", "application/octet-stream", "video/mp4", "text/htmlx", "application/x-sh", "a" * 500],
)
def test_what_is_no_text_is_refused_unread(web: Web, content_type: str) -> None:
    error = refusal(web, Answer(body=b"x", content_type=content_type, headers={"Content-Length": "1000000000000"}))
    assert error.reason == "content_type"
    assert len(str(error)) < 200


@pytest.mark.parametrize("status", [204, 206, 304, 400, 403, 404, 429, 500, 503])
def test_another_status_is_an_error_that_names_it(web: Web, status: int) -> None:
    error = refusal(web, Answer(status=status))
    assert error.reason == "status"
    assert f"status {status}" in str(error)


def test_a_document_that_cannot_be_parsed_says_why(web: Web) -> None:
    error = refusal(web, Answer(body=b"broken", content_type="application/pdf"))
    assert error.reason == "unreadable"
    assert str(error).endswith("cannot be read. The document is damaged.")


def test_long_texts_are_cut(web: Web) -> None:
    web.answers["/"] = Answer(body=b"x" * 9_000)
    assert len(fetch_local(web).text) == LIMITS.max_text_chars


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(body=b"x" * 10_001), id="plain"),
        pytest.param(Answer(headers={"Content-Length": "10001"}), id="announced"),
        pytest.param(Answer(headers={"Content-Length": "9" * 15}), id="announced-absurdly"),
        pytest.param(
            Answer(body=gzip.compress(bytes(50_000_000), mtime=0), headers={"Content-Encoding": "gzip"}), id="bomb"
        ),
        pytest.param(
            Answer(body=gzip.compress(b"x" * 10_001, mtime=0), headers={"Content-Encoding": "X-GZIP"}),
            id="one-byte-over",
        ),
        pytest.param(
            Answer(
                raw=HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + 3 * (b"1000\r\n" + b"x" * 4096 + b"\r\n"), holds=True
            ),
            id="chunked-without-end",
        ),
        pytest.param(Answer(raw=HEAD + b"\r\n" + b"x" * 20_000, holds=True), id="no-length"),
    ],
)
def test_too_much_is_refused_as_soon_as_it_is_seen(web: Web, answer: Answer) -> None:
    start_s = time.monotonic()
    error = refusal(web, answer)
    assert error.reason == "too_large"
    assert "is larger than 10,000 bytes" in str(error)
    assert time.monotonic() - start_s < LIMITS.timeout_s / 2


def test_exactly_the_bound_is_fine(web: Web) -> None:
    for answer in (
        Answer(body=b"x" * 10_000),
        Answer(body=gzip.compress(b"x" * 10_000, mtime=0), headers={"Content-Encoding": "gzip"}),
    ):
        web.answers["/"] = answer
        assert fetch_local(web).num_bytes == 10_000


@pytest.mark.parametrize(
    ("encoding", "body", "message"),
    [
        ("gzip", b"no gzip", "is damaged"),
        ("gzip", gzip.compress(b"x" * 500, mtime=0)[:-10], "ends too early"),
        ("gzip", b"", "ends too early"),
        ("br", b"x", "is compressed as 'br', which was not asked for"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "which was not asked for"),
        ("deflate", zlib.compress(b"x"), "which was not asked for"),
    ],
)
def test_a_compression_that_is_damaged_or_not_asked_for_is_refused(
    web: Web, encoding: str, body: bytes, message: str
) -> None:
    error = refusal(web, Answer(body=body, headers={"Content-Encoding": encoding}))
    assert error.reason == "unreadable"
    assert message in str(error)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X-Header: " + b"x" * 1_000_000 + b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.0\r\n",
    ],
)
def test_a_server_that_breaks_the_protocol_is_no_crash(web: Web, raw: bytes) -> None:
    assert refusal(web, Answer(raw=raw)).reason == "unreachable"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 10\r\n\r\nhalf",
    ],
)
def test_a_server_that_hangs_is_left_at_the_deadline(web: Web, raw: bytes) -> None:
    error = refusal(web, Answer(raw=raw, holds=True), limits=FetchLimits(timeout_s=0.2))
    assert error.reason == "timeout"
    assert str(error) == "The page took longer than 0.2 s."


def test_nobody_listening_is_unreachable(free_port: int) -> None:
    with pytest.raises(FetchError, match=r"127\.0\.0\.1 does not answer"):
        fetch(f"http://127.0.0.1:{free_port}/", allow=[f"127.0.0.1:{free_port}"])


def test_a_name_that_does_not_exist_is_unreachable() -> None:
    async def resolver(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    with pytest.raises(FetchError, match=r"There is no host nowhere\.example"):
        fetch("http://nowhere.example/", resolver=resolver)


def test_the_connection_goes_to_the_address_that_was_checked(web: Web) -> None:
    """The name exists nowhere, so nothing but our one resolution can have led there; the server is told the name."""
    web.answers["/"] = Answer(body=b"pinned")
    names = Names("127.0.0.1", "8.8.8.8")
    assert (
        fetch(f"http://pinned.example:{web.port}/", allow=[f"pinned.example:{web.port}"], resolver=names).text
        == "pinned"
    )
    assert names.asked == ["pinned.example"]
    assert web.seen[0].headers["Host"] == f"pinned.example:{web.port}"


def test_a_name_that_changes_its_answer_is_checked_each_time_it_is_asked() -> None:
    """First a public address, then loopback: the second hop is refused, and no hop resolves twice."""
    names = Names("127.0.0.1", "169.254.169.254")
    with serve() as web:
        web.answers["/"] = Answer(status=302, headers={"Location": "http://rebinding.example/latest/meta-data"})
        with pytest.raises(FetchError, match="is not on the public internet"):
            fetch(f"http://first.example:{web.port}/", allow=[f"first.example:{web.port}"], resolver=names)
    assert names.asked == ["first.example", "rebinding.example"]


def test_when_the_first_address_does_not_answer_the_next_is_tried(web: Web) -> None:
    web.answers["/"] = Answer(body=b"second")
    names = Names(["127.0.0.2", "127.0.0.1"])  # nothing listens on the first
    assert fetch(f"http://two.example:{web.port}/", allow=[f"two.example:{web.port}"], resolver=names).text == "second"


def redirecting(web: Web, locations: dict[str, str]) -> None:
    for path, location in locations.items():
        web.answers[path] = Answer(status=302, headers={"Location": location})


def test_redirects_are_followed_and_told(web: Web) -> None:
    redirecting(web, {"/a": "/b", "/b": f"{web.root}/c/d", "/c/d": "e"})
    web.answers["/c/e"] = Answer(body=b"there")
    page = fetch_local(web, "/a")
    assert page.text == "there"
    assert [hop.removeprefix(web.root) for hop in page.hops] == ["/a", "/b", "/c/d", "/c/e"]


def test_too_many_redirects_are_refused(web: Web) -> None:
    redirecting(web, {"/a": "/a"})
    with pytest.raises(FetchError, match="redirects more than 3 times"):
        fetch_local(web, "/a")
    assert len(web.seen) == 4


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data/",
        "//10.0.0.1/",
        "http://2130706433/",
        "http://localhost:PORT/",
        "http://127.0.0.2:PORT/",
        "http://user@127.0.0.1:PORT/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "javascript:alert(1)",
        "http://127.0.0.1:PORT\\@example.org/",
        "",
    ],
)
def test_a_redirect_to_the_inside_is_refused(web: Web, location: str) -> None:
    """Although the first server is allowed: each hop stands for itself."""
    answer = Answer(status=301, headers={"Location": location.replace("PORT", str(web.port))})
    error = refusal(web, answer)
    assert error.reason in ("refused", "status", "unreachable")
    assert len(web.seen) == 1


def test_many_pages_are_fetched_at_once_but_not_too_many(web: Web) -> None:
    running, most = 0, 0

    def answer(seen: Seen) -> Answer:
        return Answer(body=seen.path.encode())

    web.answers |= {f"/{number}": answer for number in range(20)}

    async def resolver(host: str, port: int) -> Sequence[str]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return ["127.0.0.1"]

    async def run() -> list[Page]:
        limits = FetchLimits(max_at_once=3)
        allow = AllowList.parse([f"many.example:{web.port}"])
        async with PageFetcher(FakeExtractor(), allow=allow, limits=limits, resolver=resolver, tls=NO_TLS) as fetcher:
            urls = [f"http://many.example:{web.port}/{number}" for number in range(20)]
            return await asyncio.gather(*map(fetcher.fetch, urls))

    assert [page.text for page in asyncio.run(run())] == [f"/{number}" for number in range(20)]
    assert 1 < most <= 3


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for secure.example and its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=secure.example", "-addext", "subjectAltName=DNS:secure.example"]
    command += ["-keyout", str(folder / "key"), "-out", str(folder / "certificate")]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "both").write_bytes((folder / "certificate").read_bytes() + (folder / "key").read_bytes())
    return folder / "both"


@pytest.mark.slow
def test_a_certificate_must_be_for_the_name_although_an_address_is_connected_to(certificate: Path) -> None:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(certificate))
    server.load_cert_chain(certificate)
    with serve(server) as web:
        web.answers["/"] = Answer(body=b"secret")
        allow = [f"{name}.example:{web.port}" for name in ("secure", "other")]
        names = Names("127.0.0.1")
        assert fetch(f"https://secure.example:{web.port}/", allow=allow, resolver=names, tls=client).text == "secret"
        with pytest.raises(FetchError, match=r"other\.example has no valid certificate"):
            fetch(f"https://other.example:{web.port}/", allow=allow, resolver=names, tls=client)
    assert len(web.seen) == 1
