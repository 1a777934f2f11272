"""What is compared: no proxy at all, nginx, and our node. Each is started with its own mock upstream, and stopped."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import procfs
from benchmarks.load import API_KEY, Load
from benchmarks.native import BenchmarkError, compiled

ROOT = Path(__file__).parent.parent
READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 15
ASK_TIMEOUT_S = 20
LAST_LINES, LAST_LINE_CHARACTERS = 10, 600
#: profiles of the nodes' cookbook: name -> arguments of the mock
MODELS = {"mock": "-np 64", "mock-few-slots": "-np 8", "mock-like-llama-server": "-np 64 --mock-keepalive-max 100"}


@dataclass(slots=True)
class Candidate:
    """Something that listens. ``pids`` are the processes whose CPU and memory count as its own."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    pids: tuple[int, ...] = ()
    helpers: list[Candidate] = field(default_factory=list)

    def wait_ready(self, models: Sequence[str] = ("mock",)) -> None:
        """Return when it has answered a chat request for each of *models*; raise with its last lines if it does not."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        for model in models:
            while (trouble := _ask(self.port, model)) is not None:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise BenchmarkError(f"{self.name} does not serve {model}: {trouble}\n{self._last_lines()}")
                time.sleep(0.1)

    def pin(self, core: int) -> None:
        """Let the measured processes run on *core* only."""
        for pid in self.pids:
            procfs.pin(pid, core)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                print(
                    f"warning: {self.name} did not stop within {STOP_TIMEOUT_S} s of SIGTERM; killed", file=sys.stderr
                )
                self.process.kill()
                self.process.wait()
        for helper in self.helpers:
            helper.stop()

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join(line[-LAST_LINE_CHARACTERS:] for line in lines)


def direct(directory: Path) -> Candidate:
    """The mock upstream itself."""
    port = free_port()
    command = [str(compiled("mock_upstream")), "--port", str(port), "-np", "64", "-m", "mock.gguf"]
    process, log = _start(command, directory, "mock")
    return Candidate("direct", port, process, log, pids=(process.pid,))


def nginx(directory: Path) -> Candidate:
    """nginx with one worker and a kept-alive upstream; the worker is what is measured."""
    upstream = direct(directory)
    port = free_port()
    config = directory / "nginx.conf"
    config.write_text(_nginx_config(directory, port, upstream.port))
    executable = find_nginx()
    assert executable is not None
    command = [executable, "-p", str(directory), "-c", str(config), "-e", str(directory / "nginx-error.log")]
    process, log = _start(command, directory, "nginx")
    candidate = Candidate("nginx", port, process, log, helpers=[upstream])
    candidate.wait_ready()
    candidate.pids = tuple(procfs.children(process.pid))
    return candidate


def mesh(
    directory: Path, name: str, *, root: Path = ROOT, max_concurrent: int | None = 0, program: str = "mesh"
) -> Candidate:
    """Our node, from the working tree *root*, started as users start it. It spawns its mocks itself.

    *max_concurrent* 0 lets an instance have any number of requests, ``None`` as many as it has slots.
    """
    port = free_port()
    config, cookbook = _node_files(directory, port, max_concurrent)
    command = [sys.executable, "-m", program, "serve", "--config", str(config), "--cookbook", str(cookbook)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLAMESH_")}
    environment |= {"PYTHONPATH": str(root), "HOME": str(directory)}
    process, log = _start(command, directory, name, environment)
    candidate = Candidate(name, port, process, log, pids=(process.pid,))
    candidate.wait_ready(tuple(MODELS))
    return candidate


def two_nodes(directory: Path) -> Candidate:
    """Two of our nodes with a link between them: the first has no model, so each request crosses the link.

    The CPU of both counts, and is told for each by ``pids``: the one that clients talk to comes first.
    """
    ports = {"entry": free_port(), "server": free_port()}
    processes = {}
    for name, port in ports.items():
        place = directory / name
        place.mkdir()
        config, cookbook = _node_files(place, port, 0, models=MODELS if name == "server" else {})
        other = next(p for n, p in ports.items() if n != name)
        _put_in_cluster(config, name, other, place)
        command = [sys.executable, "-m", "mesh", "serve", "--config", str(config), "--cookbook", str(cookbook)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LLAMESH_")}
        environment |= {"PYTHONPATH": str(ROOT), "HOME": str(place), "CLUSTER_TOKEN": "a token for benchmarks only"}
        processes[name] = _start(command, directory, f"two-nodes-{name}", environment)
    (server, server_log), (entry, entry_log) = processes["server"], processes["entry"]
    helper = Candidate("two-nodes-server", ports["server"], server, server_log)
    candidate = Candidate("two-nodes", ports["entry"], entry, entry_log, (entry.pid, server.pid), [helper])
    try:
        helper.wait_ready(tuple(MODELS))
    except BenchmarkError:
        candidate.stop()
        raise
    candidate.wait_ready(tuple(MODELS))
    return candidate


def _put_in_cluster(config: Path, name: str, other_port: int, place: Path) -> None:
    content = json.loads(config.read_text())
    content |= {
        "node_id": name,
        "cluster": {
            "enabled": True,
            "peers": [f"127.0.0.1:{other_port}"],
            "discovery": {"mdns": False},
            "noise": {"config_dir": str(place / "keys")},
        },
    }
    config.write_text(json.dumps(content, indent=2))


def find_nginx() -> str | None:
    """Debian keeps nginx in /usr/sbin, which is not on every user's PATH."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")


def nginx_version() -> str | None:
    executable = find_nginx()
    if executable is None:
        return None
    result = subprocess.run([executable, "-v"], capture_output=True, text=True, timeout=10, check=False)
    found = re.search(r"nginx/(\S+)", result.stderr)
    return found[1] if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    command: Sequence[str], directory: Path, name: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Path]:
    log = directory / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    return process, log


def _ask(port: int, model: str) -> str | None:
    """Send one chat request; ``None`` if the answer is right, else what was wrong with it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ASK_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", Load(1, 1, model).body(), headers)
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
    finally:
        connection.close()
    return None if response.status == 200 else f"{response.status} {content[:500]!r}"


def _node_files(
    directory: Path, port: int, max_concurrent: int | None, *, models: Mapping[str, str] = MODELS
) -> tuple[Path, Path]:
    """Write both files as JSON, which is YAML. Auth, access log, metrics and request ids are on."""
    model_file = directory / "mock.gguf"
    model_file.write_bytes(b"GGUF" + bytes(60))
    defaults = {} if max_concurrent is None else {"max_concurrent_requests_per_instance": max_concurrent}
    config = {
        "listen_addr": f"127.0.0.1:{port}",
        "metrics_path": str(directory / "node-metrics.json"),
        "shutdown_grace_period_seconds": 2,
        "model_defaults": defaults,
        "llama_cpp": {"binary_path": str(compiled("mock_upstream"))},
        "auth": {"enabled": True, "allowed_keys": ["sk-another-key-of-this-node-0123456789abcdef", API_KEY]},
    }
    cookbook = {
        "models": [
            {
                "name": name,
                "profiles": [
                    {
                        "id": "default",
                        "model_path": str(model_file),
                        "idle_timeout_seconds": 3600,
                        "llama_server_args": arguments,
                    }
                ],
            }
            for name, arguments in models.items()
        ]
    }
    paths = directory / "config.yaml", directory / "cookbook.yaml"
    for path, content in zip(paths, (config, cookbook), strict=True):
        path.write_text(json.dumps(content, indent=2))
    return paths


def _nginx_config(directory: Path, port: int, upstream_port: int) -> str:
    """The cheapest nginx that does the job: buffered log (our node batches its own too), bodies kept in memory."""
    temporary = "\n".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # as root nginx gives its worker to www-data, which may not enter our directory
    user = "user root;" if os.geteuid() == 0 else ""
    return f"""
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log warn;
events {{ worker_connections 8192; }}
http {{
    {temporary}
    access_log {directory}/nginx-access.log combined buffer=64k flush=100ms;
    keepalive_requests 1000000000;
    client_max_body_size 64m;
    client_body_buffer_size 1m;
    map_hash_bucket_size 256;
    map $http_authorization $allowed {{ default 0; "Bearer {API_KEY}" 1; }}
    upstream mock {{ server 127.0.0.1:{upstream_port}; keepalive 256; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            if ($allowed = 0) {{ return 401; }}
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 1h;
        }}
    }}
}}
"""
