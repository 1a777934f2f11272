"""A real node in a host of the lab: ``tests.e2e.harness.Node``, listening on 0.0.0.0:8080 of a network of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.harness import Node, eventually
from tests.e2e.wire import CHAT, RawConnection
from tests.multihost.lab import Host

PORT = 8080
TOKEN = "the token of every lab"


class MeshNode(Node):
    """``with MeshNode(host, directory, cookbook(...)) as node``; its node_id is the name of its host.

    *cluster* is laid over the cluster section. *token* None: the node is given none and makes one of its own.
    """

    def __init__(
        self,
        host: Host,
        directory: Path,
        cookbook_text: str,
        config: Mapping[str, Any] | None = None,
        *,
        cluster: Mapping[str, Any] | None = None,
        token: str | None = TOKEN,
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self.host = host
        section = {
            "enabled": True,
            "gossip_interval_seconds": 1,
            "noise": {"config_dir": str(directory / "keys")},
            **(cluster or {}),
        }
        settings = {"node_id": host.name, "listen_addr": f"0.0.0.0:{PORT}", "cluster": section, **(config or {})}
        secret = {} if token is None else {"CLUSTER_TOKEN": token}
        super().__init__(directory, cookbook_text, settings, env={**secret, **(env or {})}, flags=flags)
        self.port = PORT
        self.url = f"http://127.0.0.1:{PORT}"

    @property
    def node_id(self) -> str:
        return str(self.config["node_id"])

    @property
    def environ(self) -> dict[str, str]:
        """Without what the developer's own shell says of a cluster."""
        kept = super().environ
        if "CLUSTER_TOKEN" not in self._extra_env:
            kept.pop("CLUSTER_TOKEN", None)
        return {**kept, "HOME": str(self.directory)}

    # -- life

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process in its host and do not wait for it to be ready."""
        assert self._process is None or self._process.poll() is not None, "it runs already"
        files = ["--config", "config.yaml", "--cookbook", "cookbook.yaml"]
        command = [sys.executable, "-m", "mesh", "serve", *files, *self.flags]
        with (self.directory / "stdout").open("ab") as out, (self.directory / "stderr").open("ab") as err:
            self._process = self.host.popen(command, cwd=self.directory, env=self.environ, stdout=out, stderr=err)
        self.running[:] = [node for node in self.running if node.process.poll() is None] + [self]
        return self._process

    def assert_nothing_left(self, *, within_s: float = 5.0) -> None:
        """No process with the node's mark or in its host, nobody on its port, no traceback."""
        eventually(lambda: not self.marked(), within_s=within_s, what=f"all processes end: {self.marked()}")
        with self.host.new_socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", PORT))
        assert "Traceback" not in self.stderr() + self.stdout(), self.tail(60)

    def power_off(self) -> None:
        """Cut the power of its host: the node, its children, and the network, without a word to anybody."""
        self.host.lab.kill(self.host.name)
        self.process.wait(10)
        self._close_client()

    # -- what it says

    @property
    def http(self) -> httpx.Client:
        """A client on the node's own host, kept open."""
        if self._client is None:
            self._client = self.host.http(self.url, timeout=60)
        return self._client

    def http_from(self, other: Host, **options: Any) -> httpx.Client:
        """Return a client of this node on another host."""
        return other.http(f"http://{self.host.address}:{PORT}", **options)

    @contextmanager
    def stream(self, model: str, text: str = "hi", **keys: Any) -> Iterator[httpx.Response]:
        """Ask for an answer in pieces; closing it early is a client that went away."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True, "temperature": 0}
        with self.host.http(self.url, timeout=60) as client, client.stream("POST", CHAT, json=body | keys) as response:
            yield response

    @contextmanager
    def connection(self, *, timeout_s: float = 30.0) -> Iterator[RawConnection]:
        """Open a raw connection to the node."""
        with self.host.connect("127.0.0.1", PORT, timeout_s) as sock:
            yield RawConnection(sock)

    def cluster(self) -> dict[str, Any]:
        """Return the nodes that it knows, by their names; itself too."""
        nodes: dict[str, Any] = self.http.get("/cluster/nodes").raise_for_status().json()["nodes"]
        return nodes

    def wait_for(self, *names: str, within_s: float = 20.0) -> None:
        """Wait until exactly these nodes, and itself, are in its mesh."""
        wanted = {self.node_id, *names}

        def known() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return set(self.cluster()) == wanted
            return False

        eventually(known, within_s=within_s, what=f"{self.node_id} knows {sorted(wanted)}\n{self.tail()}")

    # -- other ways in

    def cli(self, *arguments: str, within_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run ``llama-mesh ...`` on the node's host, against this node."""
        command = [sys.executable, "-m", "mesh", *arguments]
        env = {**self.environ, "LLAMESH_URL": self.url, "COLUMNS": "200"}
        return self.host.run(command, within_s=within_s, cwd=self.directory, env=env)
