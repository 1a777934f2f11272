"""Models and nodes for the end-to-end tests. Everything under this directory is marked ``e2e``."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mesh.cli import demo_model, whisper_setup
from mesh.cli.whisper_build import NotPossibleError
from mesh.cli.whisper_setup import WhisperParts
from tests import tiny_models, tiny_whisper
from tests.build_project import Repository, make_repository
from tests.e2e.harness import Models, Node, cookbook, profile

HERE = Path(__file__).parent
TOOL_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

StartNode = Callable[..., Node]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies below this directory."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.e2e)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the running nodes said beside a test that failed."""
    report = yield
    if report.failed:
        report.sections += [(f"node in {node.directory}", node.tail()) for node in Node.running]
    return report


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The tiny models, written once."""
    directory = tmp_path_factory.mktemp("models")
    paths = {name: directory / f"{name}.gguf" for name in Models.__dataclass_fields__}
    for name in ("alpha", "beta", "gamma"):
        tiny_models.write_chat(paths[name], f"I am {name}")
    tiny_models.write_chat(paths["tool"], TOOL_CALL)
    tiny_models.write_embed(paths["embed"])
    tiny_models.write_rerank(paths["rerank"])
    return Models(**paths)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M out of the project's cache, fetched if it is not there (93 MB; ``make test`` does that first)."""
    return demo_model.ensure(os.environ, Console(stderr=True))


@pytest.fixture(scope="session")
def whisper_parts() -> WhisperParts:
    """The real ones out of the cache, made if they are not there (85 MB, and 10 s of compiling)."""
    try:
        return whisper_setup.ensure(os.environ, Console(stderr=True))
    except NotPossibleError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="session")
def tiny_speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that hears one sentence in every 30 s of whatever it gets."""
    path = tmp_path_factory.mktemp("whisper") / "tiny.bin"
    tiny_whisper.write_whisper(path)
    return path


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    """Start nodes that are stopped, and looked after, at the end of the test."""
    with ExitStack() as stack:
        count = 0

        def start(cookbook_text: str, config: Mapping[str, Any] | None = None, **options: Any) -> Node:
            nonlocal count
            count += 1
            return stack.enter_context(Node(tmp_path / f"node{count}", cookbook_text, config, **options))

        yield start


@pytest.fixture(scope="session")
def family(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with a model of every kind, for tests that leave it as it is."""
    text = cookbook(
        {
            "alpha": [
                profile(models.alpha, aliases=["gpt-4o-mini"], description="says who it is"),
                profile(models.alpha, "-t 1 -tb 1 -c 32768 -np 1 --no-warmup", id="endless"),
            ],
            "org/Beta.Q4_1": profile(models.beta),
            "tool": profile(models.tool, "-t 1 -tb 1 -c 4096 -np 1 --no-warmup --jinja"),
            "embed": profile(models.embed, "-t 1 -tb 1 --embedding --no-warmup"),
            "rerank": profile(models.rerank, "-t 1 -tb 1 --reranking --no-warmup"),
        }
    )
    with Node(tmp_path_factory.mktemp("family"), text, {"default_model": "alpha"}) as node:
        yield node


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Where the stand-in for llama.cpp is developed."""
    return make_repository(tmp_path / "llama.cpp")
