"""Plants each bug of tests/core/mutants.py in turn and prints what caught it: `python scripts/mutants.py`.

Exits with 1 if one survives: then a test is missing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests are no installed package

from tests.core.catching import caught_by  # noqa: E402
from tests.core.mutants import MUTANTS  # noqa: E402
from tests.core.subject import broken  # noqa: E402


def main() -> int:
    survivors = 0
    print(f"{'file':14}{'planted bug':58}{'caught by':74}seconds")
    for mutant in MUTANTS:
        begun = time.monotonic()
        caught = caught_by(broken(mutant))
        survivors += caught is None
        print(f"{mutant.file:14}{mutant.breaks:58}{caught or 'NOTHING':74}{time.monotonic() - begun:7.2f}", flush=True)
    print(f"{len(MUTANTS)} planted bugs, {len(MUTANTS) - survivors} caught, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
