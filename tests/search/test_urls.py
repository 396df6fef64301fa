"""Hostile addresses: whatever is not a plain address of the public web is refused before anything is connected to."""

import asyncio
import ssl
from collections.abc import Sequence
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.errors import UsageError
from lfm.search.addresses import AllowList, is_public
from lfm.search.errors import FetchError
from lfm.search.extraction import Extractor
from lfm.search.fetch import PageFetcher
from lfm.search.urls import MAX_URL_CHARS, parse_url

MALFORMED = [
    "",
    " ",
    "example.org",
    "//example.org/",
    "/path",
    "http:example.org",
    "http:/example.org",
    "http:///example.org",
    "http://",
    "http://?x",
    "http://:80/",
    "file:///etc/passwd",
    "ftp://example.org/",
    "gopher://127.0.0.1:6379/_INFO",
    "dict://127.0.0.1:11211/stat",
    "javascript:alert(1)",
    "data:text/html,hello",
    "jar:http://example.org!/",
    "ws://example.org/",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/info",
    # Who is the host? Parsers have disagreed.
    "http://user@example.org/",
    "http://user:password@example.org/",
    "http://example.org@127.0.0.1/",
    "http://127.0.0.1@example.org/",
    "http://example.org:80@127.0.0.1/",
    "http://example.org\\@127.0.0.1/",
    "http://127.0.0.1\\@example.org/",
    "http:\\\\127.0.0.1\\",
    "http://example.org\\.evil.org/",
    "http://127.0.0.1#@example.org:x@/\\",
    "http://[::1]@example.org/",
    "http://[::1]example.org/",
    "http://example.org]/",
    "http://[example.org]/",
    "http://[/",
    "http://[]/",
    "http://exam ple.org/",
    "http://example.org /",
    "http://example.org/a b",
    "http://exa\tmple.org/",
    "http://exa\nmple.org/",
    "http://example.org/\r\nHost: evil",
    "http://example.org/\x00",
    "http://example.org\x00.evil.org/",
    "http://example.org\u200b/",
    "http://example.org/\u202e",
    "http://example.org/\ud800",
    "http://%65xample.org/",
    "http://%31%32%37.0.0.1/",
    "http://example%2eorg/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[::ffff:127.0.0.1",
    "http://[::1]:x/",
    "http://[::g]/",
    "http://[1::2::3]/",
    "http://[v1.fe80::a+en1]/",
    "http://[0:0:0:0:0:ffff:127.0.0.999]/",
    "http://example.org:0/",
    "http://example.org:65536/",
    "http://example.org:99999999/",
    "http://example.org:-1/",
    "http://example.org:80x/",
    "http://example.org:8 0/",
    "http://example.org:80:80/",
    "http://-example.org/",
    "http://example-.org/",
    "http://.example.org/",
    "http://example..org/",
    "http://./",
    "http://exam!ple.org/",
    "http://example.org,127.0.0.1/",
    "http://example.org;127.0.0.1/",
    "http://$(hostname).evil.org/",
    f"http://{'a' * 64}.org/",
    f"http://{'.'.join(['a' * 60] * 5)}.org/",
    "http://example.org/" + "a" * MAX_URL_CHARS,
    # Odd ways to write 127.0.0.1 and others: four plain decimal numbers are the only way.
    "http://127.1/",
    "http://127.0.1/",
    "http://127/",
    "http://0/",
    "http://2130706433/",
    "http://4294967296/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0X7F.0x0.0x0.0x1/",
    "http://0x/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://127.0.0.01/",
    "http://127.0.0.001/",
    "http://127.0.0.0x1/",
    "http://1.2.3/",
    "http://1.2.3.4.5/",
    "http://256.256.256.256/",
    "http://127.0.0.1../",
    "http://169.254.43518/",
    "http://0xa9fea9fe/",
    "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/",  # circled digits
    "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/",  # full-width digits
    "http://\U0001d7cf\U0001d7d0\U0001d7d5.0.0.1/",  # bold digits
    "http://\uff18.8.8.8/",
    "http://127\u3002\uff10\u30020\u30021/",  # ideographic full stops
    "http://example.0x7f/",
    "http://example.1/",
]

INSIDE = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.100.100.200",  # the metadata service of one cloud
    "168.63.129.16",  # and of another
    "169.254.0.1",
    "169.254.169.254",  # and of most
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::8.8.8.8",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",  # Teredo
    "2001:db8::1",
    "2002:7f00:1::",  # 6to4 of 127.0.0.1
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "febf::1",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]

PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.215.14", "172.32.0.1", "2606:4700::1111", "2a00:1450:4001:810::200e"]

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # nothing is connected to; the usual one takes 50 ms to make


def refusal(url: str, *, addresses: Sequence[str] = (), allow: Sequence[str] = ()) -> FetchError:
    """Why a page is refused, when every name resolves to `addresses`."""

    async def resolver(host: str, port: int) -> Sequence[str]:
        assert addresses, f"{host} was looked up"
        return addresses

    async def fetch() -> None:
        async with PageFetcher(Extractor(), allow=AllowList.parse(allow), resolver=resolver, tls=NO_TLS) as fetcher:
            await fetcher.fetch(url)

    with pytest.raises(FetchError) as raised:
        asyncio.run(fetch())
    return raised.value


@pytest.mark.parametrize("url", MALFORMED)
def test_an_address_that_is_not_plain_is_refused_and_nothing_is_looked_up(url: str) -> None:
    error = refusal(url)
    assert error.reason == "refused"
    assert len(str(error)) < 300
    assert str(error).isprintable()


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_inside_is_refused_written_out_and_as_what_a_name_resolves_to(address: str) -> None:
    written = f"[{address}]" if ":" in address else address
    for url, addresses in ((f"http://{written}/", ()), ("https://innocent.example/", (address,))):
        error = refusal(url, addresses=addresses)
        assert error.reason == "refused"
        assert "is not on the public internet" in str(error)
    assert not is_public(ip_address(address))


def test_one_address_inside_among_public_ones_is_enough() -> None:
    assert refusal("http://innocent.example/", addresses=["8.8.8.8", "10.0.0.1"]).reason == "refused"
    assert refusal("http://innocent.example/", addresses=["2606:4700::1111", "::1"]).reason == "refused"


def test_the_refusal_does_not_tell_what_a_name_resolves_to() -> None:
    assert "10.1.2.3" not in str(refusal("http://innocent.example/", addresses=["10.1.2.3"]))


def test_a_link_local_address_with_a_zone_is_refused_and_no_crash() -> None:
    assert refusal("http://innocent.example/", addresses=["fe80::1%eth0"]).reason == "refused"


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("port", [22, 25, 81, 6379, 8000, 8080, 65535])
def test_other_ports_are_refused(port: int) -> None:
    assert f"asks for port {port}. Allowed: 80 and 443." in str(refusal(f"http://8.8.8.8:{port}/"))


def test_a_name_without_an_address_is_unreachable() -> None:
    with pytest.raises(FetchError, match=r"innocent\.example has no address"):
        AllowList().check(parse_url("http://innocent.example/"), [])


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("http://example.org", "http://example.org/"),
        ("HTTPS://EXAMPLE.org./A?b=C#d", "https://example.org/A?b=C"),
        ("http://example.org?q", "http://example.org/?q"),
        ("http://example.org:80/", "http://example.org/"),
        ("https://example.org:443/", "https://example.org/"),
        ("https://example.org:80/", "https://example.org:80/"),
        ("http://example.org:/", None),
        ("http://b\u00fccher.example/\u00fc?\u6771=1", "http://xn--bcher-kva.example/%C3%BC?%E6%9D%B1=1"),
        ("http://example.org/%2e%2e/%zz", "http://example.org/%2e%2e/%zz"),
        ('http://example.org/<">`', "http://example.org/%3C%22%3E%60"),
        ("http://_dmarc.example.org/", "http://_dmarc.example.org/"),
        ("http://[2606:4700:0::1111]:443/x", "http://[2606:4700::1111]:443/x"),
        ("http://8.8.8.8/", "http://8.8.8.8/"),
        ("http://1.2.3.example/", "http://1.2.3.example/"),
        ("http://example.org/\\x", "http://example.org/\\x"),
        ("http://example.org/@127.0.0.1", "http://example.org/@127.0.0.1"),
        ("http://example.org/?a=b#/@127.0.0.1", "http://example.org/?a=b"),
    ],
)
def test_plain_addresses_have_one_form(text: str, parsed: str | None) -> None:
    if parsed is None:
        with pytest.raises(FetchError):
            parse_url(text)
    else:
        assert str(parse_url(text)) == parsed
        assert str(parse_url(parsed)) == parsed


@given(
    st.text(max_size=60) | st.text(alphabet="htps:/\\@[]#?%.0127xf \t", max_size=40).map(lambda text: f"http://{text}")
)
def test_no_text_is_more_than_refused(text: str) -> None:
    """Nor does an accepted host contain what another parser could split or decode."""
    try:
        url = parse_url(text)
    except FetchError:
        return
    assert url.scheme in ("http", "https")
    assert url.host
    assert not set(url.host) & set("/\\@#?%[] \t")
    assert url.target.startswith("/")
    assert url.target.isascii()
    assert parse_url(str(url)) == url


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/b", "http://example.org/b"),
        ("b?c", "http://example.org/x/b?c"),
        ("../b", "http://example.org/b"),
        ("//other.example/b", "http://other.example/b"),
        ("https://other.example", "https://other.example/"),
        ("?q", "http://example.org/x/y?q"),
        ("", "http://example.org/x/y"),
    ],
)
def test_a_redirect_is_joined(location: str, target: str) -> None:
    assert str(parse_url("http://example.org/x/y").joined(location)) == target


@pytest.mark.parametrize(
    "location",
    [
        "http://127.1/",
        "javascript:x",
        "file:///etc/passwd",
        "//user@host/",
        "http:\\\\host",
        "//[::1",
        "/a\r\nX: y",
        "\x00",
    ],
)
def test_a_redirect_to_what_is_no_address_is_refused(location: str) -> None:
    with pytest.raises(FetchError):
        parse_url("http://example.org/x/y").joined(location)


@pytest.mark.parametrize(
    ("rule", "url", "addresses"),
    [
        ("10.1.0.0/16", "http://10.1.2.3/", ["10.1.2.3"]),
        ("10.1.0.0/16", "http://docs.internal/", ["10.1.2.3"]),
        ("fd00::/8", "http://docs.internal/", ["fd00::1"]),
        ("127.0.0.1/32", "http://127.0.0.1/", ["127.0.0.1"]),
        ("docs.internal:8080", "http://docs.internal:8080/", ["192.168.0.1"]),
        ("Docs.Internal.:8080", "http://docs.internal:8080/", []),
        ("127.0.0.1:9000", "http://127.0.0.1:9000/", ["127.0.0.1"]),
        ("[::1]:9000", "http://[0:0::1]:9000/", ["::1"]),
    ],
)
def test_the_operator_may_allow_a_server_or_a_network(rule: str, url: str, addresses: list[str]) -> None:
    AllowList.parse([rule]).check(parse_url(url), [ip_address(address) for address in addresses])


@pytest.mark.parametrize(
    ("rule", "url", "addresses"),
    [
        ("10.1.0.0/16", "http://10.2.0.1/", ["10.2.0.1"]),
        ("10.1.0.0/16", "http://10.1.2.3:8080/", ["10.1.2.3"]),
        ("10.1.0.0/16", "http://docs.internal/", ["10.1.2.3", "10.2.0.1"]),
        ("10.1.0.0/16", "http://docs.internal/", ["::ffff:10.1.2.3"]),
        ("docs.internal:8080", "http://docs.internal/", ["10.0.0.1"]),
        ("docs.internal:8080", "http://evil.docs.internal:8080/", ["10.0.0.1"]),
        ("docs.internal:8080", "http://other.example:8080/", ["10.0.0.1"]),
        ("127.0.0.1:9000", "http://localhost:9000/", ["127.0.0.1"]),
    ],
)
def test_and_nothing_beyond_it(rule: str, url: str, addresses: list[str]) -> None:
    with pytest.raises(FetchError):
        AllowList.parse([rule]).check(parse_url(url), [ip_address(address) for address in addresses])


@pytest.mark.parametrize(
    "rule", ["", "docs.internal", ":80", "a:0", "a:70000", "10.0.0.1/8", "x/8", "http://a:80", "a b:80"]
)
def test_a_rule_that_allows_nothing_sensible_is_refused(rule: str) -> None:
    with pytest.raises(UsageError, match="Give "):
        AllowList.parse([rule])
