"""Listen addresses as text: ``127.0.0.1:8080``, ``[::1]:8080``, ``localhost:8080`` (trap 68)."""

from __future__ import annotations

import ipaddress
import re

#: Labels that are longer do not only not exist: the resolver raises ``UnicodeError`` for them.
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")

_ACCEPTED = "expected address:port, for example 127.0.0.1:8080, 0.0.0.0:8080 or [::]:8080"


def split_address(text: str) -> tuple[str, int]:
    """Return host (IPv6 without brackets) and port; raise ``ValueError`` saying what to write instead."""
    host, colon, port = text.strip().rpartition(":")
    if not colon:
        raise ValueError(f"has no port; {_ACCEPTED}")
    if not host:
        raise ValueError(
            f"has no address; write 0.0.0.0:{port} for all interfaces or 127.0.0.1:{port} for this machine"
        )
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise ValueError(f"'{port}' is not a port (0 to 65535); {_ACCEPTED}")
    return _host(host, port), int(port)


def _host(host: str, port: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        inner = host[1:-1]
        if not _is_ip(inner, 6):
            raise ValueError(f"'{inner}' is not an IPv6 address; {_ACCEPTED}")
        return inner
    if ":" in host:
        raise ValueError(f"IPv6 addresses need brackets: [{host}]:{port}")
    looks_like_ip = host.replace(".", "").isdecimal()
    if _is_ip(host, 4) or (not looks_like_ip and _HOST_NAME.fullmatch(host)):
        return host
    raise ValueError(f"'{host}' is not an address; {_ACCEPTED}")


def _is_ip(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def join_address(host: str, port: int) -> str:
    """Return what ``split_address`` takes apart; *host* may be an IPv6 address with or without brackets."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"
