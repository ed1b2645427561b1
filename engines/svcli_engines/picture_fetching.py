"""Fetching a picture from where a URL says, within bounds, and from nowhere that only this machine can see. No torch.

The standard library's HTTP, on a socket that is connected here: the address that was checked is the one connected to,
for each redirect anew. Proxies of the environment are not used: they resolve names themselves, behind any check.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from skipvision import __version__
from skipvision.pictures import ImageError
from svcli_engines.picture_urls import FetchLimits, url_name

_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"User-Agent": f"svcli/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}
_SAFE = "%/:=&?~+!$,;'@()*[]"
"""What stays as it is in a path or a query; all else that is not a letter or digit is escaped."""
_PIECE = 1 << 16
_BROKEN_OFF = "the connection broke off before the end"
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
_TRANSLATED_6 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv4 behind a NAT64; the address is the last 32 bits."""

_Address = tuple[int, Any]
"""A family, and what a socket of it connects to."""


class FetchError(ImageError):
    """A picture that could not be fetched, or may not be."""


def fetch_picture(url: str, limits: FetchLimits | None = None) -> bytes:
    """The bytes behind an http or https URL; decoding says whether they are a picture.

    Raises FetchError for other schemes, user names in the URL, addresses that are not allowed, whatever fails on the
    way, and whatever exceeds `limits`.
    """
    limits = limits or FetchLimits()
    name, deadline = url_name(url), _Deadline(limits.seconds)
    try:
        for _ in range(limits.num_redirects + 1):
            data, target = _get(url, limits, deadline)
            if target is None:
                return data
            url = urljoin(url, target)
    except FetchError as error:
        raise FetchError(f"{name}: {error}") from None
    except TimeoutError:
        raise FetchError(f"{name}: took longer than {limits.seconds:g} s") from None
    except ssl.SSLCertVerificationError as error:
        raise FetchError(f"{name}: its certificate is not trusted ({error.verify_message})") from None
    except ssl.SSLError as error:
        raise FetchError(f"{name}: no secure connection ({error.reason or error})") from None
    except socket.gaierror as error:
        raise FetchError(f"{name}: its host is not found ({error.strerror})") from None
    except OSError as error:
        raise FetchError(f"{name}: cannot be reached ({error.strerror or error})") from None
    except http.client.IncompleteRead:
        raise FetchError(f"{name}: {_BROKEN_OFF}") from None
    except (http.client.HTTPException, ValueError):
        raise FetchError(f"{name}: the answer is not HTTP as it should be") from None
    raise FetchError(f"{name}: redirected more than {limits.num_redirects} times")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, and not to this machine, its network, a group or nobody."""
    # Zones, which stand behind %, belong to link-local addresses alone.
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if ip in _TRANSLATED_6:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if ip not in _UNICAST_6 or ip.teredo is not None:
            return False
    return ip.is_global and not (ip.is_private or ip.is_multicast or ip.is_reserved)


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds; raises TimeoutError where there are none."""
        if (left := self._end - time.monotonic()) <= 0:
            raise TimeoutError
        return left


def _get(url: str, limits: FetchLimits, deadline: _Deadline) -> tuple[bytes, str | None]:
    """The body behind `url`, or where it redirects to."""
    parts, host, port = _parsed(url)
    with _connected(_allowed(_resolved(host, port, deadline), limits), deadline) as plain:
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            plain.settimeout(deadline.left())
            with context.wrap_socket(plain, server_hostname=host) as secure:
                connection = http.client.HTTPSConnection(host, port, context=context)
                return _exchange(connection, secure, parts, limits, deadline)
        connection = http.client.HTTPConnection(host, port)
        return _exchange(connection, plain, parts, limits, deadline)


def _parsed(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise FetchError("not a URL that can be read") from None
    if parts.scheme not in ("http", "https"):
        raise FetchError(f"pictures come over http and https, not {parts.scheme or 'without a scheme'}")
    if not host:
        raise FetchError("the URL has no host")
    if parts.username is not None or parts.password is not None:
        raise FetchError("the URL has a user name in it, which is not supported")
    return parts, host, port or (443 if parts.scheme == "https" else 80)


def _resolved(host: str, port: int, deadline: _Deadline) -> list[_Address]:
    """All addresses of a host. In a thread, since asking for them takes no time-out."""
    answers: queue.SimpleQueue[list[_Address] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put([(family, address) for family, _, _, _, address in found])
        except OSError as error:
            answers.put(error)
        except ValueError:  # no name that the domain name system can have
            answers.put(socket.gaierror(socket.EAI_NONAME, "no such name"))

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.left())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def _allowed(addresses: list[_Address], limits: FetchLimits) -> list[_Address]:
    if not limits.allow_private and not all(is_public(address[0]) for _, address in addresses):
        remedy = limits.private_remedy and f"; {limits.private_remedy}"
        raise FetchError(f"its host has a private address, and nothing is fetched from those{remedy}")
    return addresses


def _connected(addresses: list[_Address], deadline: _Deadline) -> socket.socket:
    """A connection to the first of `addresses` that answers; each gets its share of the time."""
    failure: OSError = OSError("no address")
    for index, (family, address) in enumerate(addresses):
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(deadline.left() / (len(addresses) - index))
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure


def _exchange(
    connection: http.client.HTTPConnection,
    sock: socket.socket,
    parts: SplitResult,
    limits: FetchLimits,
    deadline: _Deadline,
) -> tuple[bytes, str | None]:
    connection.auto_open = 0
    connection.sock = _TimedSocket(sock, deadline)
    target = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    connection.request("GET", target, headers=_HEADERS | {"Connection": "close"})
    response = connection.getresponse()
    location = response.getheader("Location")
    if response.status in _REDIRECTS and location:
        # Headers are read as Latin-1, whatever their bytes are.
        return b"", quote(location, safe=_SAFE + "#", encoding="latin-1")
    if response.status != http.client.OK:
        known = http.client.responses.get(response.status, "")
        raise FetchError(f"the answer was {response.status} {known}".rstrip())
    too_large = FetchError(f"larger than {limits.num_bytes / 2**20:.3g} MB")
    if (response.length or 0) > limits.num_bytes:
        raise too_large
    body = bytearray()
    while piece := response.read(_PIECE):
        body += piece
        if len(body) > limits.num_bytes:
            raise too_large
    if response.length:
        raise FetchError(_BROKEN_OFF)
    return bytes(body), None


class _TimedSocket:
    """As much of a socket as http.client uses; no wait outlasts the deadline. Whoever opened the socket closes it."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.left())
        self._sock.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._deadline))

    def close(self) -> None:
        pass


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.left())
        return self._sock.recv_into(buffer)
