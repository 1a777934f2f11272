"""Shared by the host tests: the fake NVML library, built once, and a process that reads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fake_nvml.build import FakeDriver, GpuSpec, library_dir
from tests.fake_nvml.reader import RemoteReader, remote_reader

Start = Callable[..., tuple[FakeDriver, RemoteReader]]


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library_dir(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(nvml_library: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a reader on a machine with the given GPUs; ``sys_root`` may name a fake /sys."""
    with ExitStack() as readers:

        def start(*gpus: GpuSpec, sys_root: Path = Path("/nothing")) -> tuple[FakeDriver, RemoteReader]:
            driver = FakeDriver(tmp_path, *gpus, library=nvml_library)
            reader = readers.enter_context(remote_reader({**os.environ, **driver.env}, str(sys_root)))
            return driver, reader

        yield start
