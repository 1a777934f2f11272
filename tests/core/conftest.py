"""The planner under test: tests that take it are also run with planted bugs."""

from __future__ import annotations

import pytest

from mesh.core.scheduler import plan
from tests.core.worlds import Planner


@pytest.fixture
def planner() -> Planner:
    return plan
