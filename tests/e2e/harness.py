"""A real node for tests: ``python -m mesh serve`` in a directory of its own, with real llama-servers below it.

``Node`` starts it, asks it, and stops it as a service manager would; then it looks for what must not be left: a process
(each carries a mark in its environment, so orphans are found too), the port, the state lock, a traceback in the logs.
Never imports the node's own modules beyond constants and ``is_free``: what it knows, it knows as a client does.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import httpx
import psutil

from mesh.host.ports import is_free
from tests.e2e.wire import CHAT, RawConnection
from tests.e2e.wire import child_get as child_get

ROOT = Path(__file__).parents[2]
#: below Linux's ephemeral range, and beside the 10000-19999 that nodes give to their children
PORTS = range(20000, 30000)
MARK = "MESH_E2E_NODE"
START_S = 30.0
STOP_S = 25.0
#: what every child gets: one thread each, since many share few cores
TINY_ARGS = "-t 1 -tb 1 -c 4096 -np 2 --no-warmup"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Models:
    """Paths of the tiny models; ``alpha`` says "I am alpha", so that an answer tells who gave it."""

    alpha: Path
    beta: Path
    gamma: Path
    tool: Path
    embed: Path
    rerank: Path


def profile(path: Path | str | None, args: str | Sequence[str] = TINY_ARGS, **keys: Any) -> dict[str, Any]:
    """Return a cookbook profile; ``id`` is "default" unless given."""
    source = {} if path is None else {"model_path": str(path)}
    return {"id": "default", **source, "llama_server_args": args, **keys}


def cookbook(models: Mapping[str, dict[str, Any] | list[dict[str, Any]]], **top: Any) -> str:
    """Return the text of a cookbook. JSON is YAML."""
    entries = [{"name": n, "profiles": p if isinstance(p, list) else [p]} for n, p in models.items()]
    return json.dumps({**top, "models": entries}, indent=1)


def free_port() -> int:
    """Return a port that nobody listens on and that no outgoing connection can hold."""
    while True:
        port = secrets.choice(PORTS)
        if is_free(port):
            return port


def eventually(probe: Callable[[], T], *, within_s: float = 15.0, every_s: float = 0.05, what: str = "") -> T:
    """Return the first truthy result of *probe*; fail if there is none in time."""
    deadline = time.monotonic() + within_s
    while True:
        result = probe()
        if result:
            return result
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what or probe}; last was {result!r}"
        time.sleep(every_s)


class Node:
    """One node process. ``with Node(directory, cookbook(...)) as node``: ready inside, nothing left after it."""

    #: the nodes that were started, until they ended; what they said is shown with a failed test
    running: ClassVar[list[Node]] = []

    def __init__(
        self,
        directory: Path,
        cookbook_text: str,
        config: Mapping[str, Any] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        key: str | None = None,
    ) -> None:
        self.directory = directory
        self.key = key  #: the API key of ``http`` and ``cli``
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.mark = secrets.token_hex(8)
        self.flags = tuple(flags)
        self.cookbook_path = directory / "cookbook.yaml"
        self.config = {
            "node_id": "e2e",
            "listen_addr": f"127.0.0.1:{self.port}",
            "metrics_path": str(directory / "state" / "metrics.json"),
            "shutdown_grace_period_seconds": 10,
            **(config or {}),
        }
        self._extra_env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._client: httpx.Client | None = None
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(json.dumps(self.config, indent=1))
        self.cookbook_path.write_text(cookbook_text)

    # -- life

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self._kill_everything()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.stop()
            return
        self._kill_everything()
        assert error is not None
        error.add_note(self.tail())

    @property
    def environ(self) -> dict[str, str]:
        """The environment of the node, and of the command line that talks to it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMESH_")}
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
        return {**kept, "PYTHONPATH": path, MARK: self.mark, **self._extra_env}

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process and do not wait for it to be ready."""
        assert self._process is None or self._process.poll() is not None, "it runs already"
        files = ["--config", "config.yaml", "--cookbook", "cookbook.yaml"]
        command = [sys.executable, "-m", "mesh", "serve", *files, *self.flags]
        with (self.directory / "stdout").open("ab") as out, (self.directory / "stderr").open("ab") as err:
            self._process = subprocess.Popen(
                command, cwd=self.directory, env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self.running[:] = [node for node in self.running if node.process.poll() is None] + [self]
        return self._process

    def start(self) -> Self:
        """Start the process and wait until it answers /readyz: with 200, or why it has nothing to serve."""
        process = self.spawn()
        deadline = time.monotonic() + START_S
        while not self._is_up():
            assert process.poll() is None, f"the node ended with status {process.returncode}\n{self.tail()}"
            assert time.monotonic() < deadline, f"the node is not up after {START_S:g} s\n{self.tail()}"
            time.sleep(0.05)
        return self

    def _is_up(self) -> bool:
        try:
            response = self.http.get("/readyz")
        except httpx.TransportError:
            return False
        return response.status_code in (200, 503)

    def run_to_end(self, *, within_s: float = START_S) -> tuple[int, str]:
        """Start a node that cannot start; return its status and what it said on stderr."""
        process = self.spawn()
        try:
            return process.wait(within_s), self.stderr()
        finally:
            self._kill_everything()

    def stop(self) -> None:
        """SIGTERM, a clean end, and nothing left."""
        process = self.process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._kill_everything()
            raise AssertionError(f"the node did not stop within {STOP_S:g} s of SIGTERM\n{self.tail()}") from None
        self._close_client()
        assert status == 0, f"the node ended with status {status}\n{self.tail()}"
        self.assert_nothing_left()

    def assert_nothing_left(self, *, within_s: float = 5.0) -> None:
        """No process, no port, no lock, no traceback."""
        eventually(lambda: not self.marked(), within_s=within_s, what=f"all processes end: {self.marked()}")
        assert is_free(self.port), f"port {self.port} is still taken"
        lock = Path(str(self.config["metrics_path"]) + ".lock")
        if lock.exists():
            with lock.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "Traceback" not in self.stderr() + self.stdout(), self.tail(60)

    def sigkill(self) -> None:
        """End the node as the kernel's OOM killer would, and reap it."""
        self.process.kill()
        self.process.wait(STOP_S)
        self._close_client()

    def _kill_everything(self) -> None:
        self._close_client()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(STOP_S)
        for process in self.marked():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    # -- what it runs

    def marked(self) -> list[psutil.Process]:
        """Return every live process of this node, orphans included; a zombie is dead."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def servers(self) -> list[psutil.Process]:
        """Return its llama-server processes."""
        return [psutil.Process(pid) for pid in self.server_pids()]

    def server_pids(self) -> list[int]:
        """Return the process ids of the children that the node says it has and that live."""
        return [i["pid"] for i in self.instances() if i["pid"] and psutil.pid_exists(i["pid"])]

    def open_files(self) -> int:
        """Return how many descriptors the node holds."""
        return int(psutil.Process(self.pid).num_fds())

    # -- what it says

    @property
    def http(self) -> httpx.Client:
        """A client of the node, kept open."""
        if self._client is None:
            headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)
        return self._client

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def chat(self, model: str, text: str = "hi", **keys: Any) -> httpx.Response:
        """Ask for a short answer, not streamed."""
        messages = [{"role": "user", "content": text}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16, **keys}
        return self.http.post(CHAT, json=body)

    def say(self, model: str, **keys: Any) -> str:
        """Return what *model* answers."""
        response = self.chat(model, **keys)
        assert response.status_code == 200, response.text
        content = response.json()["choices"][0]["message"]["content"]
        assert isinstance(content, str)
        return content

    def status(self) -> dict[str, Any]:
        """Return /admin/instances."""
        result: dict[str, Any] = self.http.get("/admin/instances").raise_for_status().json()
        return result

    def instances(self, model: str | None = None, state: str | None = None) -> list[dict[str, Any]]:
        """Return the instances, of one model or in one state if asked for."""
        return [
            i
            for i in self.status()["instances"]
            if (model is None or model in (i["model_id"], i["key"], i["key"].partition(":")[0]))
            and (state is None or i["state"] == state)
        ]

    def instance(self, model: str) -> dict[str, Any]:
        """Return the only instance of *model*."""
        (found,) = self.instances(model)
        return found

    def prewarm(self, model: str) -> dict[str, Any]:
        """Load *model* and return its instance."""
        response = self.http.post("/admin/prewarm", json={"model": model, "timeout_s": 60})
        assert response.status_code == 200, response.text
        instance: dict[str, Any] = response.json()["instance"]
        return instance

    def unload(self, model: str | None = None) -> int:
        """Tell the instances of *model*, or all, to end; return how many."""
        body = {"all": True} if model is None else {"model": model}
        count: int = self.http.post("/admin/unload", json=body).raise_for_status().json()["unloaded"]
        return count

    def metric(self, name: str) -> float:
        """Return the sum of a Prometheus metric over its labels."""
        lines = self.http.get("/metrics").raise_for_status().text.splitlines()
        values = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        found = [float(value) for key, value in values if key.partition("{")[0] == name]
        assert found, f"no metric {name} in /metrics"
        return sum(found)

    def stdout(self) -> str:
        return self._read("stdout")

    def stderr(self) -> str:
        return self._read("stderr")

    def _read(self, name: str) -> str:
        path = self.directory / name
        return path.read_text(errors="replace") if path.exists() else ""

    def log(self, containing: str = "") -> list[dict[str, Any]]:
        """Return the node's log lines so far, those with a text in them if asked for."""
        lines = [line for line in self.stdout().splitlines() if line.startswith("{") and containing in line]
        return [json.loads(line) for line in lines]

    def wait_log(self, containing: str, *, count: int = 1, within_s: float = 15.0) -> list[dict[str, Any]]:
        """Wait until the log has *count* lines with that text."""

        def lines() -> list[dict[str, Any]]:
            found = self.log(containing)
            return found if len(found) >= count else []

        return eventually(lines, within_s=within_s, what=f"{count} log lines with {containing!r}")

    def tail(self, count: int = 25) -> str:
        """Return the last lines of both outputs, for an assertion's message."""
        out, err = self.stdout().splitlines()[-count:], self.stderr().splitlines()[-count:]
        return "\n".join(["--- node stdout", *out, "--- node stderr", *err])

    # -- other ways in

    def cli(self, *arguments: str, within_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run ``llama-mesh ...`` against this node."""
        command = [sys.executable, "-m", "mesh", *arguments]
        env = {**self.environ, "LLAMESH_URL": self.url, "COLUMNS": "200"}
        if self.key is not None:
            env["LLAMESH_API_KEY"] = self.key
        return subprocess.run(
            command, cwd=self.directory, env=env, capture_output=True, text=True, timeout=within_s, check=False
        )

    def cli_json(self, *arguments: str) -> Any:
        """Run ``llama-mesh ... --json`` and return what it printed."""
        result = self.cli(*arguments, "--json")
        assert result.returncode == 0, result
        return json.loads(result.stdout)

    @contextmanager
    def connection(self, *, timeout_s: float = 30.0) -> Iterator[RawConnection]:
        """Open a raw connection to the node."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as sock:
            yield RawConnection(sock)

    def rewrite_cookbook(self, text: str) -> None:
        """Replace the cookbook as editors do: a new file, renamed over the old one."""
        fresh = self.cookbook_path.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.cookbook_path)
