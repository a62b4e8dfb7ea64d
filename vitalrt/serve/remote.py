"""Images by link, from places that the operator has named. Everything here is about not being led elsewhere."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from vitalrt.errors import VitalError
from vitalrt.serve.errors import ApiError, bad_request

TIMEOUT_S = 10.0
_PORTS = {"http": 80, "https": 443}

Origin = tuple[str, str, int]  # scheme, host in lower case, port


class Fetcher:
    """Fetches from allowed origins, `https://host[:port]` or `http://…`, and nowhere else.

    A host name must lead to public addresses only, and the very address that was checked is connected to; an origin
    that is itself a numeric address is taken at its word, private or not. Redirects are not followed, links with a user
    or a password are refused, and no proxy of the environment is used.

    Raises VitalError on an origin that is none.
    """

    def __init__(self, origins: Iterable[str], max_bytes: int) -> None:
        self.origins = frozenset(_allowed(text) for text in origins)
        self.max_bytes = max_bytes
        self._tls = ssl.create_default_context()

    def fetch(self, url: str, param: str) -> bytes:
        """Blocks, for TIMEOUT_S at most.  Raises ApiError, which does not repeat the link."""
        if not self.origins:
            raise bad_request(f"{param}: expected a data URI; this server fetches no links", param, "remote_image")
        parts, origin = _split(url)
        if parts is None or origin not in self.origins:
            raise bad_request(f"{param}: this server does not fetch images from there", param, "remote_image")
        try:
            return self._get(parts, origin, param)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"the image could not be fetched ({type(error).__name__})"
            raise bad_request(f"{param}: {reason}", param, "remote_image") from None

    def _get(self, parts: SplitResult, origin: Origin, param: str) -> bytes:
        scheme, host, port = origin
        deadline = time.monotonic() + TIMEOUT_S
        address = _public_address(host, port, param)
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        raw = socket.create_connection((address, port), timeout=TIMEOUT_S)
        try:
            connection.sock = self._tls.wrap_socket(raw, server_hostname=host) if scheme == "https" else raw
            path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
            connection.request("GET", path, headers={"Accept": "image/png, image/jpeg, application/dicom"})
            response = connection.getresponse()
            if response.status != 200:
                came = f"its server answered {response.status}; redirects are not followed"
                raise bad_request(f"{param}: the image could not be fetched: {came}", param, "remote_image")
            data = bytearray()
            while chunk := response.read1(1 << 16):
                data += chunk
                if len(data) > self.max_bytes:
                    limit = f"more than this server's limit of {self.max_bytes:,} bytes"
                    raise ApiError(413, f"{param}: {limit}", param=param, code="image_too_large")
                if time.monotonic() > deadline:
                    raise TimeoutError
            return bytes(data)
        finally:
            connection.close()
            raw.close()


def _allowed(text: str) -> Origin:
    parts, origin = _split(text)
    if parts is None or origin is None or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise VitalError(f"image_origins: expected https://host[:port] or http://host[:port], got {text!r}")
    return origin


def _split(url: str) -> tuple[SplitResult | None, Origin | None]:
    """(None, None) for anything but a plain http or https link."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return None, None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None, None
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc:
        return None, None
    return parts, (parts.scheme, parts.hostname, port or _PORTS[parts.scheme])


def _public_address(host: str, port: int, param: str) -> str:
    """One of the host's addresses. Raises ApiError unless all are public, or the host is an address."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if not all(_is_public(address) for address in found):
        raise bad_request(f"{param}: the image's host leads to a private address", param, "remote_image")
    return sorted(found)[0]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None) or parsed
    return parsed.is_global and mapped.is_global and not parsed.is_multicast
