"""Labs for the tests of several hosts. Everything under this directory is marked ``e2e``.

Where a lab is not permitted these tests are skipped, and the end of the run says so in one loud line; with
``MESH_REQUIRE_LAB=1`` in the environment, as in CI, that is a failure.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.e2e.harness import Models, Node
from tests.multihost.lab import Lab, why_not

HERE = Path(__file__).parent
_skipped: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies below this directory."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.e2e)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip if there can be no lab. That is tried here, and once, so that a run without these tests builds none."""
    if not item.path.is_relative_to(HERE) or not (reason := why_not()):
        return
    if os.environ.get("MESH_REQUIRE_LAB"):
        pytest.fail(f"no lab of several hosts, and MESH_REQUIRE_LAB is set: {reason}", pytrace=False)
    _skipped.append(item.nodeid)
    pytest.skip(f"no lab of several hosts: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped:
        terminalreporter.section("THE MESH WAS NOT TESTED ON SEVERAL HOSTS", red=True, bold=True)
        terminalreporter.line(f"{len(_skipped)} tests of tests/multihost were skipped, since here: {why_not()}")
        terminalreporter.line("They need root or user namespaces, and pyroute2. CI runs them.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the running nodes said beside a test that failed."""
    report = yield
    if report.failed:
        report.sections += [(f"node in {node.directory}", node.tail()) for node in Node.running]
    return report


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three hosts: a, b and c."""
    with Lab(hosts=3) as lab:
        yield lab


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The tiny models, written once; alpha says "I am alpha"."""
    directory = tmp_path_factory.mktemp("models")
    paths = {name: directory / f"{name}.gguf" for name in Models.__dataclass_fields__}
    for name in ("alpha", "beta", "gamma", "tool"):
        tiny_models.write_chat(paths[name], f"I am {name}")
    tiny_models.write_embed(paths["embed"])
    tiny_models.write_rerank(paths["rerank"])
    return Models(**paths)
