"""A process that reads the machine as often as it is asked to: ``python -m tests.fake_nvml.reader``, for NVML tests.

Each line on stdin asks for one read; the answer is one line, a pickled ``Devices`` or exception in base64. A process of
its own, because the dynamic linker looks for libraries where ``LD_LIBRARY_PATH`` pointed when the process began.
"""

from __future__ import annotations

import base64
import pickle
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mesh.core.devices import Devices
from mesh.host.devices import DeviceReader
from mesh.host.nvml import Nvml


class RemoteReader:
    """The test's side."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def read(self, clock_s: float = 0.0) -> Devices:
        """Let it read now, with its clock at *clock_s*."""
        self.ask(clock_s)
        return self.answer()

    def ask(self, clock_s: float = 0.0) -> None:
        """Let it begin to read."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{clock_s}\n".encode())
        self.process.stdin.flush()

    def has_answer(self, within_s: float) -> bool:
        """Whether it has read, or has within that time."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], within_s)[0])

    def answer(self) -> Devices:
        """Return what it read; raise what it raised."""
        assert self.process.stdout is not None
        answer = pickle.loads(base64.b64decode(self.process.stdout.readline()))
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Devices)
        return answer


@contextmanager
def remote_reader(env: Mapping[str, str], *args: str) -> Iterator[RemoteReader]:
    """Start the process; end it on leaving, and fail if it did not end well."""
    command = [sys.executable, "-m", "tests.fake_nvml.reader", *args]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=dict(env), cwd=Path(__file__).parents[2]) as process:
        yield RemoteReader(process)
    assert process.returncode == 0


def main(sys_root: str = "/nothing") -> None:
    """Answer until stdin ends."""
    now = 0.0
    reader = DeviceReader(sys_root=Path(sys_root), nvml=Nvml(lambda: now))
    for line in sys.stdin:
        now = float(line)
        answer: Devices | Exception
        try:
            answer = reader.read()
        except Exception as error:
            answer = error
        print(base64.b64encode(pickle.dumps(answer)).decode(), flush=True)
    reader.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
