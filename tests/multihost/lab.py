"""Several hosts on this machine: each a network namespace, on a switch in a further one. ``with Lab(3) as lab: ...``.

The machine's own network is not touched, and nothing in the lab can reach it. Needs root or user namespaces;
``why_not()`` says what is missing. Needs no ``ip`` program. Any number of labs can be open at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import string
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from tests.e2e.harness import eventually
from tests.multihost.inside import Transport

ROOT = Path(__file__).parents[2]
_ENTER = Path(__file__).with_name("enter.py")
_START_S = 20.0
_ANSWER_S = 10.0
_MOST = 65536


def _environ() -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path}


class LabUnavailable(Exception):
    """The machine does not permit a lab, or not this part of it."""


class Host:
    """One host. ``address`` and ``address6`` are where the others reach it."""

    def __init__(self, lab: Lab, name: str, number: int, network: str) -> None:
        self.lab = lab
        self.name = name
        self.address = f"10.77.0.{number}"
        self.address6 = f"fd77::{number:x}"
        self._network = network  # the namespace, as a path
        self._inode = os.stat(network).st_ino
        self._started: list[subprocess.Popen[Any]] = []

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address}>"

    def popen(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in this host. It is killed when the thread that started it ends, or the lab does."""
        enter = [sys.executable, "-I", "-S", "-E", str(_ENTER), str(os.getpid()), self.lab.user_namespace]
        options = {"stdin": subprocess.DEVNULL, **options}
        self._started.append(subprocess.Popen([*enter, self._network, *map(str, argv)], **options))
        return self._started[-1]

    def run(
        self, argv: Sequence[str | Path], *, within_s: float = 30.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in this host to its end; return what it printed."""
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with self.popen(argv, **{**both, **options}) as process:
            try:
                out, err = process.communicate(timeout=within_s)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def python(self, code: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a Python program in this host, with the repository on its path."""
        env = {**_environ(), **options.pop("env", {})}
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return self.popen([sys.executable, "-u", "-c", code], **{**both, "env": env, **options})

    def new_socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Return a socket in this host's network, for the test itself to bind or connect."""
        made = self.lab.ask("socket", host=self.name, family=int(family), kind=int(kind))
        assert made is not None
        return made

    def connect(self, address: str, port: int, timeout_s: float | None = 10.0) -> socket.socket:
        """Return a connection from this host to *address*, an IP address."""
        sock = self.new_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            sock.settimeout(timeout_s)
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def http(self, base_url: str = "http://127.0.0.1:8080", **options: Any) -> httpx.Client:
        """Return an HTTP client that runs in this host."""
        return httpx.Client(base_url=base_url, transport=Transport(self.connect), trust_env=False, **options)

    def processes(self) -> list[psutil.Process]:
        """Return what runs in this host; zombies do not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                here = os.stat(f"/proc/{process.pid}/ns/net").st_ino == self._inode
                if here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """End everything that runs in this host at once, as a power cut would; return when it is gone."""

        def gone() -> bool:
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            return not self.processes()

        eventually(gone, what=f"everything in {self} ends")

    def reap(self) -> None:
        """Collect what a test that failed did not; everything here is dead."""
        for process in self._started:
            process.wait(_ANSWER_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


class Lab:
    """*hosts* hosts, named a, b, c ..., that all reach each other until they are told not to."""

    def __init__(self, hosts: int = 3) -> None:
        self.names = tuple(string.ascii_lowercase[:hosts])
        self.hosts: dict[str, Host] = {}
        self.user_namespace = "-"
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_START_S)
        command = [sys.executable, "-m", "tests.multihost.holder", str(os.getpid()), str(theirs.fileno())]
        env = _environ()
        with theirs:
            self._holder = subprocess.Popen(
                [*command, ",".join(self.names)],
                cwd=ROOT, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
        try:
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def _begin(self) -> None:
        try:
            ready = json.loads(self._control.recv(_MOST) or "{}")
        except OSError as error:
            raise LabUnavailable(f"the holder of the namespaces says nothing: {error}") from error
        if "namespaces" not in ready:
            raise LabUnavailable(ready.get("error") or self._last_words())
        self._control.settimeout(_ANSWER_S)
        own = f"/proc/{self._holder.pid}"
        if ready["user"]:
            self.user_namespace = f"{own}/ns/user"
        for number, name in enumerate(self.names, 1):
            self.hosts[name] = Host(self, name, number, f"{own}/fd/{ready['namespaces'][name]}")

    def _last_words(self) -> str:
        assert self._holder.stderr is not None
        lines = self._holder.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "the holder of the namespaces ended"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            for host in self.hosts.values():
                host.kill()
                host.reap()
        finally:
            self._end()

    def _end(self) -> None:
        self._control.close()  # the holder ends, and the namespaces with it
        try:
            self._holder.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait()
        assert self._holder.stderr is not None
        self._holder.stderr.close()

    def host(self, name: str) -> Host:
        return self.hosts[name]

    def ask(self, do: str, **arguments: object) -> socket.socket | None:
        """Have the holder do something; return the socket that it gives, if it gives one."""
        with self._lock:
            self._control.send(json.dumps({"do": do, **arguments}).encode())
            message, files, _, _ = socket.recv_fds(self._control, _MOST, 1)
        answer = json.loads(message or '{"error": "the holder of the namespaces is gone"}')
        if "error" in answer:
            raise LabUnavailable(f"{do}: {answer['error']}")
        return socket.socket(fileno=files[0]) if files else None

    # --- trouble

    def partition(self, *groups: Iterable[str]) -> None:
        """Let the hosts of each group reach only each other; those not named form a group too. Packets are lost."""
        sides = [sorted(group) for group in groups]
        named = [name for side in sides for name in side]
        assert len(set(named)) == len(named), "a host is on two sides"
        rest = [name for name in self.names if name not in named]
        self.ask("wire", groups=[*sides, rest] if rest else sides)

    def cut(self, *names: str) -> None:
        """Pull the cables of hosts out: they have no network but themselves, and nobody is told."""
        for name in names:
            self.ask("cut", host=name)

    def heal(self) -> None:
        """Let all hosts reach each other again, those that were cut too."""
        self.ask("wire", groups=[self.names])

    def shape(self, name: str, *, delay_ms: float = 0.0, loss_percent: float = 0.0) -> None:
        """Delay and lose what a host sends. Raise ``LabUnavailable`` if this kernel has no netem."""
        self.ask("shape", host=name, delay_ms=delay_ms, loss_percent=loss_percent)

    def kill(self, *names: str) -> None:
        """Cut the power of hosts: cables first, so that their kernels reset no connection."""
        self.cut(*names)
        for name in names:
            self.hosts[name].kill()


@functools.cache
def why_not() -> str:
    """Return why no lab can be built here, or nothing; tries it."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux"
    try:
        import pyroute2  # noqa: F401
    except ImportError:
        return "pyroute2 is not installed (pip install -e .[dev])"
    try:
        with Lab(hosts=1) as lab:
            entered = lab.host("a").run([sys.executable, "-c", ""])
            reason = (entered.stderr.strip().splitlines() or [f"status {entered.returncode}"])[-1]
            return "" if entered.returncode == 0 else f"cannot run Python in a namespace: {reason}"
    except (LabUnavailable, OSError) as error:
        return str(error)
