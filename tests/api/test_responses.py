"""Envelopes: the numbers behind a refusal, in each dialect."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import pytest

from mesh.api.responses import envelope, error_event
from mesh.api.routes import Dialect
from mesh.errors import CapacityError, MeshError, TooLargeError
from tests.api.asgi import request
from tests.api.node import Node

MEMORY = {
    "need_mib": {"vram": 40000},
    "capacity_mib": {"vram": 24000},
    "free_mib": {"vram": 4000},
    "held_by": [],
    "foreign_mib": {},
}


@pytest.mark.parametrize("error", [MeshError("m", details=MEMORY), CapacityError("m", details=MEMORY),
                                   TooLargeError("m", details=MappingProxyType(MEMORY))])  # fmt: skip
@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.LLAMA])
def test_the_openai_envelope_carries_the_numbers(error: MeshError, dialect: Dialect) -> None:
    """trap 49"""
    told = json.loads(envelope(error, dialect))["error"]
    assert told["memory"] == MEMORY
    assert (told["message"], told["type"]) == ("m", error.type)
    event = error_event(error, dialect).removeprefix(b"data: ")
    assert json.loads(event)["error"]["memory"] == MEMORY


@pytest.mark.parametrize("dialect", Dialect)
def test_a_message_that_quotes_too_much_is_cut(dialect: Dialect) -> None:
    error = MeshError(f"Model '{'x' * 65536}' not found")
    message = json.loads(envelope(error, dialect))["error"]["message"]
    assert len(message) < 17_000
    assert message.startswith("Model 'xxx")
    assert message.endswith("xxx' not found")


def test_anthropics_envelope_stays_as_its_clients_know_it() -> None:
    """trap 74: unknown keys would be no help there; the message has the numbers."""
    told = json.loads(envelope(CapacityError("needs 40000 MiB", details=MEMORY), Dialect.ANTHROPIC, "r-1"))
    assert told == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "needs 40000 MiB"},
        "request_id": "r-1",
    }


@pytest.mark.parametrize("details", [None, {}])
def test_without_numbers_there_is_no_memory(details: dict[str, Any] | None) -> None:
    told = json.loads(envelope(CapacityError("m", details=details), Dialect.OPENAI))["error"]
    assert set(told) - {"memory"} == {"message", "type", "param", "code", "source"}
    assert ("memory" in told) is (details is not None)


async def test_prewarm_tells_them_too() -> None:
    node = Node()
    node.supervisor.refusal = TooLargeError("too large", details=MEMORY)
    answer = await request(node.app, "POST", "/admin/prewarm", json_body={"model": "Smol"})
    assert (answer.status, answer.json["error"]["memory"]) == (503, MEMORY)
    assert "retry-after" not in answer.headers
