"""Listen addresses, IPv6 included (trap 68)."""

from __future__ import annotations

import pytest

from mesh.config.address import join_address, split_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("[::]:80", "::", 80),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        ("localhost:0", "localhost", 0),
        ("gpu-box.lan:65535", "gpu-box.lan", 65535),
        (f"{'a' * 63}.lan:1", f"{'a' * 63}.lan", 1),
    ],
)
def test_round_trip(text: str, host: str, port: int) -> None:
    """Trap 68: brackets are for writing, never part of the host."""
    assert split_address(text) == (host, port)
    assert join_address(host, port) == text
    assert join_address(f"[{host}]" if ":" in host else host, port) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8080", "has no port"),
        (":8080", "write 0.0.0.0:8080"),
        ("::1:8080", r"IPv6 addresses need brackets: \[::1\]:8080"),
        ("[::1]", "need brackets|not a port"),
        ("[127.0.0.1]:80", "not an IPv6 address"),
        ("127.0.0.1:http", "'http' is not a port"),
        ("127.0.0.1:70000", "'70000' is not a port"),
        ("127.0.0.300:80", "'127.0.0.300' is not an address"),
        (f"{'a' * 64}.local:80", "is not an address"),
        (f"{'a' * 63}.{'b' * 64}:80", "is not an address"),
        ("ho st:80", "'ho st' is not an address"),
        ("", "has no port"),
    ],
)
def test_refusals_say_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_address(text)
