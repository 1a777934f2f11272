"""The `llama-mesh` command, also as `python -m mesh`."""

from __future__ import annotations

import sys

from mesh.cli.main import run


def main() -> int:
    """Run the command line and return its exit status."""
    return run(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
