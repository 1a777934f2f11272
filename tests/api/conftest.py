"""The data plane is tested on both loops: the node runs on uvloop, whose transports behave differently at the edges."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

_ON_BOTH_LOOPS = {"test_dataplane", "test_exchange", "test_form_exchange", "test_form_stream"}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    module = item.nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
    if module in _ON_BOTH_LOOPS or module.startswith("test_forwarding"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that the kernel accepts connections on, and nobody else does."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(16)
        yield sock.getsockname()[1]
