"""What is said of the node's engine as a whole."""

from __future__ import annotations

from pathlib import Path

from mesh.config.builds import LlamaCpp
from mesh.engine.locate import Engines
from mesh.engine.status import EngineStatus
from tests.engine.test_locate import executable


async def test_a_named_build_is_an_engine_too(tmp_path: Path) -> None:
    default = LlamaCpp(binary_path=str(tmp_path / "none"))
    named = LlamaCpp(binary_path=str(tmp_path / "build-0123abc/bin/llama-server"))
    status = EngineStatus(Engines({"default": default, "other": named}))
    missing = status.missing()
    assert missing is not None
    assert missing.message.startswith("llama_cpp.binary_path"), "of the default one, which is asked for first"
    assert (status.problem(), status.version()) == ("Binary missing", None)
    executable(Path(named.binary_path))
    assert status.problem() == "Binary missing", "not looked at for each question"
    status = EngineStatus(Engines({"default": default, "other": named}))
    assert (status.problem(), status.version(), status.source()) == (None, "0123abc", "configured")
    executable(Path(default.binary_path))
    assert EngineStatus(Engines({"default": default, "other": named})).version() is None, "of the default one"
