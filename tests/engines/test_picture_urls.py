"""Pictures come over the network within bounds, and from public addresses alone unless others are allowed.

The server is a real one, on loopback. Where a test needs a public address, names and connections lead there all the
same, so that everything between is what runs elsewhere.
"""

from __future__ import annotations

import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from skipvision.pictures import ImageError
from svcli_engines.picture_fetching import FetchError, fetch_picture, is_public
from svcli_engines.picture_sources import find_pictures
from svcli_engines.picture_urls import FetchLimits, url_name

CERTIFICATE = Path(__file__).parent / "pictures.example.pem"
"""Of pictures.example, with its key; of use in tests alone."""
PUBLIC = "93.184.215.14"
PRIVATE = "10.1.2.3"
HERE = FetchLimits(seconds=60, allow_private=True)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.headers['Host']} {self.path}")
        getattr(self, self.path.partition("?")[0].strip("/").partition("/")[0], self.picture)()

    def picture(self) -> None:
        self._head(200, ("Content-Length", str(len(png()))), ("Content-Type", "text/html"))
        self.wfile.write(png())

    def chunked(self) -> None:
        self._head(200, ("Transfer-Encoding", "chunked"))
        for byte in png():
            self.wfile.write(b"1\r\n" + bytes([byte]) + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def text(self) -> None:
        self._head(200, ("Content-Type", "image/png"))
        self.wfile.write(b"no picture")

    def missing(self) -> None:
        self._head(404)

    def to(self) -> None:
        self._head(302, ("Location", self.path.partition("?")[2]))

    def loop(self) -> None:
        self._head(307, ("Location", "/loop"))

    def endless(self) -> None:
        self._head(200)
        self._pour(b"x" * 4096, 0)

    def huge(self) -> None:
        self._head(200, ("Content-Length", str(2**40)))

    def drip(self) -> None:
        self._head(200)
        self._pour(b"x", 0.01)

    def drip_head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self._pour(b"x", 0.01)

    def silent(self) -> None:
        self.server.over.wait(120)

    def gone(self) -> None:
        self.close_connection = True

    def cut(self) -> None:
        self._head(200, ("Content-Length", "1000"))
        self.wfile.write(b"x" * 10)

    def cut_chunk(self) -> None:
        self._head(200, ("Transfer-Encoding", "chunked"))
        self.wfile.write(b"ff\r\nx")

    def gibberish(self) -> None:
        self.wfile.write(b"\0\1\2 what?\r\n\r\n")

    def negative(self) -> None:
        self._head(200, ("Transfer-Encoding", "chunked"))
        self.wfile.write(b"-ff\r\nx\r\n")

    def _head(self, status: int, *headers: tuple[str, str]) -> None:
        self.protocol_version = "HTTP/1.1"
        self.close_connection = True
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _pour(self, piece: bytes, pause: float) -> None:
        try:
            while not self.server.over.wait(pause):
                self.wfile.write(piece)
        except OSError:  # the client has had enough
            self.close_connection = True

    def log_message(self, *_args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_args: Any) -> None:
        """Clients that leave are what is tested."""


class Network:
    """Names and addresses as a test wants them; all connections lead to one port on loopback."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port = 0
        self.names: dict[str, list[list[str]]] = {}
        """Name to what it resolves to: the first time, the second time, and so on."""
        self.connected: list[str] = []
        self._connect, self._resolve = socket.socket.connect, socket.getaddrinfo
        monkeypatch.setattr(socket.socket, "connect", lambda this, address: self.connect(this, address))
        monkeypatch.setattr(socket, "getaddrinfo", self.resolve)

    def connect(self, this: socket.socket, address: Any) -> None:
        self.connected.append(address[0])
        assert address[0] in (PUBLIC, "127.0.0.1")
        self._connect(this, ("127.0.0.1", self.port or address[1]))

    def resolve(self, host: str, port: int, **options: Any) -> Any:
        answers = self.names.get(host)
        if answers is None:
            # Numbers alone; a real name is asked for by nobody here.
            return self._resolve(host, port, flags=socket.AI_NUMERICHOST, **options)
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [(kind, socket.SOCK_STREAM, 6, "", (each, port)) for kind, each in zip(kinds, addresses, strict=True)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Network:
    """Instead of no network at all, loopback alone."""
    return Network(monkeypatch)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.over.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def public(server: Server, offline: Network) -> Network:
    """The server as http://pictures.example, at a public address."""
    offline.port = server.server_port
    offline.names["pictures.example"] = [[PUBLIC]]
    return offline


def refused(url: str, limits: FetchLimits = HERE) -> str:
    with pytest.raises(FetchError) as error:
        fetch_picture(url, limits)
    assert isinstance(error.value, ImageError)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    name, _, message = str(error.value).partition(url_name(url) + ": ")
    assert not name
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", ["/picture", "/chunked", "/to?/picture", "/to?picture", "", "?/a b", "/ä/ö?ü=ß"])
def test_a_picture_comes_whatever_its_type_is_said_to_be(path: str, server: Server) -> None:
    (source,) = find_pictures(server.url + path)
    assert source.open(limits=HERE).image.getpixel((0, 0)) == (255, 0, 0)


def test_paths_and_queries_arrive_as_they_are_or_escaped(server: Server, public: Network) -> None:
    assert public
    fetch_picture("http://PICTURES.example/a%20b/ä?x=1&y=[z]%2F#part")
    fetch_picture("http://pictures.example:8080?/a b")
    assert server.asked == ["pictures.example /a%20b/%C3%A4?x=1&y=[z]%2F", "pictures.example:8080 /?/a%20b"]


def test_decoding_decides_and_not_the_content_type(server: Server) -> None:
    (source,) = find_pictures(f"{server.url}/text?key=secret")
    with pytest.raises(ImageError, match=rf"^{server.url}/text: not a picture that can be read"):
        source.open(limits=HERE)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "the answer was 404 Not Found"),
        ("/loop", "redirected more than 5 times"),
        ("/to?ftp://127.0.0.1/a.png", "pictures come over http and https, not ftp"),
        ("/to?file:///etc/passwd", "pictures come over http and https, not file"),
        ("/to?http://user:secret@127.0.0.1/", "the URL has a user name in it, which is not supported"),
        ("/gone", "cannot be reached (Remote end closed connection without response)"),
        ("/cut", "the connection broke off before the end"),
        ("/cut_chunk", "the connection broke off before the end"),
        ("/gibberish", "the answer is not HTTP as it should be"),
    ],
)
def test_what_goes_wrong_is_one_sentence(path: str, message: str, server: Server) -> None:
    assert refused(server.url + path) == message


def test_a_chunk_of_negative_length_ends_in_a_sentence(server: Server) -> None:
    assert refused(f"{server.url}/negative")


@pytest.mark.parametrize("path", ["/endless", "/huge"])
def test_a_body_is_bounded(path: str, server: Server) -> None:
    limits = FetchLimits(seconds=60, num_bytes=2**20, allow_private=True)
    assert refused(server.url + path, limits) == "larger than 1 MB"


@pytest.mark.parametrize("path", ["/silent", "/drip", "/drip_head", "/to?/drip"])
def test_the_time_is_bounded_however_the_server_is_slow(path: str, server: Server) -> None:
    began = time.monotonic()
    assert refused(server.url + path, FetchLimits(seconds=0.3, allow_private=True)) == "took longer than 0.3 s"
    assert time.monotonic() - began < 20


def test_waiting_for_a_name_is_bounded_too(offline: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offline
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: [over.wait(120)][1:])
    assert refused("http://pictures.example/", FetchLimits(seconds=0.2)) == "took longer than 0.2 s"
    over.set()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://127.0.0.1/a.png", "pictures come over http and https, not ftp"),
        ("picture.png", "pictures come over http and https, not without a scheme"),
        ("http:///a.png", "the URL has no host"),
        ("http://[::1/a.png", "not a URL that can be read"),
        ("http://127.0.0.1:99999/", "not a URL that can be read"),
        ("http://user@127.0.0.1/", "the URL has a user name in it, which is not supported"),
        ("http://127.0.0.1\\@10.0.0.1/", "the URL has a user name in it, which is not supported"),
        (f"http://{'a' * 70}.example/", "its host is not found (no such name)"),
        ("http://unknown.example/", "its host is not found (Name or service not known)"),
    ],
)
def test_urls_that_lead_nowhere_are_refused(url: str, message: str) -> None:
    assert refused(url) == message


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rest=st.text(max_size=30) | st.text("a.:/@[]%?#\\\0\n 1", max_size=30),
    scheme=st.sampled_from(["http://", "https:", ""]),
)
def test_whatever_a_url_says_ends_in_a_sentence(rest: str, scheme: str, offline: Network) -> None:
    with pytest.raises(FetchError):
        fetch_picture(scheme + rest, FetchLimits(seconds=5))
    assert offline.connected == []


def test_a_port_where_nobody_listens_is_said_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert refused(f"http://127.0.0.1:{port}/") == "cannot be reached (Connection refused)"


def test_passwords_and_keys_do_not_stand_in_messages() -> None:
    assert url_name("https://user:secret@host/a.png?key=secret#secret") == "https://host/a.png"
    assert len(url_name("http://host/" + "a" * 1000)) == 120


def test_private_addresses_are_refused_before_anything_is_connected(server: Server, offline: Network) -> None:
    message = "its host has a private address, and nothing is fetched from those"
    port = server.server_port
    for host in ("127.0.0.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254"):
        assert refused(f"http://{host}:{port}/picture", FetchLimits()) == message
    offline.names["mixed.example"] = [[PUBLIC, PRIVATE]]
    assert refused("http://mixed.example/picture", FetchLimits()) == message
    assert offline.connected == []
    assert server.asked == []


def test_a_redirect_to_a_private_address_is_refused(server: Server, public: Network) -> None:
    public.names["inside.example"] = [[PRIVATE]]
    for target in ("http://inside.example/a.png", "http://127.0.0.1/a.png", "//[::1]/a.png"):
        assert "private address" in refused(f"http://pictures.example/to?{target}", FetchLimits())
    assert public.connected == [PUBLIC] * 3
    assert len(server.asked) == 3


def test_the_address_that_was_checked_is_the_one_connected_to(server: Server, public: Network) -> None:
    public.names["rebinding.example"] = [[PUBLIC], ["127.0.0.1"]]
    fetch_picture("http://rebinding.example/picture", FetchLimits())
    assert public.connected == [PUBLIC]
    assert server.asked == ["rebinding.example /picture"]
    # And whoever asks anew, for a redirect, checks anew.
    public.names["rebinding.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert "private address" in refused("http://rebinding.example/to?/picture", FetchLimits())


def test_the_next_address_is_tried_where_one_does_not_answer(server: Server, offline: Network) -> None:
    offline.names["two.example"] = [["127.0.0.1", "127.0.0.1"]]
    connect = offline.connect
    failing = [OSError("unreachable")]

    def sometimes(this: socket.socket, address: Any) -> None:
        if failing:
            raise failing.pop()
        connect(this, address)

    offline.connect = sometimes  # type: ignore[method-assign]
    assert fetch_picture(f"http://two.example:{server.server_port}/", HERE) == png()


def test_proxies_of_the_environment_are_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch_picture(f"{server.url}/picture", HERE) == png()


def test_a_connection_that_is_not_secure_is_refused(server: Server) -> None:
    assert refused(server.url.replace("http:", "https:")).startswith("no secure connection (")


def test_certificates_are_checked_for_trust_and_name(
    server: Server, public: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    untrusted = refused("https://pictures.example/picture", FetchLimits())
    assert untrusted.startswith("its certificate is not trusted (self")
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    assert fetch_picture("https://pictures.example/picture", FetchLimits()) == png()
    public.names["other.example"] = [[PUBLIC]]
    mismatch = refused("https://other.example/picture", FetchLimits())
    assert mismatch.startswith("its certificate is not trusted (Hostname mismatch")


NETWORKS = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.2.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/96",
    "::1/128",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
    "100::/64",
    "2001:db8::/32",
    "2001::/32",
    "64:ff9b:1::/48",
]


@given(network=st.sampled_from(NETWORKS), data=st.data())
def test_no_address_of_a_network_that_is_not_public_is(network: str, data: st.DataObject) -> None:
    net = ipaddress.ip_network(network)
    number = data.draw(st.integers(int(net.network_address), int(net.broadcast_address)))
    kind = ipaddress.IPv4Address if net.version == 4 else ipaddress.IPv6Address
    address = kind(number)
    assert not is_public(str(address))
    if net.version == 4:
        assert not is_public(f"::ffff:{address}")
        assert not is_public(f"64:ff9b::{address}")
        assert not is_public(str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80))))


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:220:1::1", f"::ffff:{PUBLIC}", f"64:ff9b::{PUBLIC}"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


def test_a_zone_does_not_make_an_address_public() -> None:
    assert not is_public("fe80::1%eth0")
