"""The lab itself: hosts reach each other, trouble is silent, and nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.harness import eventually
from tests.multihost.lab import ROOT, Host, Lab, LabUnavailable

SILENCE_S = 0.7  # how long is waited for what must not come; longer than any answer within one machine

DISCOVERY = """
import asyncio, sys
from mesh.config.settings import Cluster
from mesh.net.discovery import Discovery

async def main(name, listen_host, goodbye):
    found = Discovery(
        Cluster(), node_id=name, fingerprint="key of " + name, version="1.0", listen_host=listen_host, port=8080,
        on_found=lambda address: print(address, flush=True), read_peers=tuple,
    )
    await found.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    print("contacts", *found.contacts(), flush=True)
    await found.close()

asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.contextmanager
def listening(host: Host, address: str, port: int = 9000) -> Iterator[socket.socket]:
    with host.new_socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen()
        sock.settimeout(5)
        yield sock


@contextlib.contextmanager
def connected(one: Host, other: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    with listening(other, other.address) as listener, one.connect(other.address, 9000) as near:
        far, _ = listener.accept()
        with far:
            yield near, far


def hears(sock: socket.socket, within_s: float = 5.0) -> bytes | None:
    """Return what comes, ``b""`` for an end; None for silence. A reset raises."""
    sock.settimeout(within_s)
    try:
        return sock.recv(100)
    except TimeoutError:
        return None


@pytest.mark.parametrize("attribute", ["address", "address6"])
def test_hosts_reach_each_other(lab: Lab, attribute: str) -> None:
    """Over IPv4 and IPv6, at once: nothing waits for duplicate addresses. And each sees who calls."""
    for here in lab.hosts.values():
        for there in lab.hosts.values():
            address = getattr(there, attribute)
            with listening(there, address) as listener, here.connect(address, 9000, SILENCE_S) as near:
                far, caller = listener.accept()
                with far:
                    assert caller[0] == getattr(here, attribute)
                    near.sendall(b"hello")
                    assert hears(far) == b"hello"


def test_hosts_are_apart(lab: Lab) -> None:
    """The same port on every host, each with its own loopback, and no way out of the lab."""
    with contextlib.ExitStack() as stack:
        for host in lab.hosts.values():
            stack.enter_context(listening(host, "0.0.0.0", 8080))
            stack.enter_context(host.connect("127.0.0.1", 8080))
    with pytest.raises(OSError, match="unreachable"):
        lab.host("a").connect("192.0.2.1", 80)
    out = lab.host("b").run([sys.executable, "-c", "import psutil; print(sorted(psutil.net_if_addrs()))"])
    assert out.stdout.strip().startswith("['eth0', ")
    assert "'lo'" in out.stdout


def test_a_partition_is_silence(lab: Lab) -> None:
    """Both ways nothing arrives, and nobody is told: no reset, no "no route to host". Healed, the rest arrives."""
    a, b, c = lab.hosts.values()
    with connected(a, b) as (near, far), connected(b, c) as (near2, far2):
        lab.partition({"a"}, {"b", "c"})
        near.sendall(b"lost?")
        far.sendall(b"lost too?")
        assert hears(far, SILENCE_S) is None
        assert hears(near, SILENCE_S) is None
        near2.sendall(b"same side")
        assert hears(far2) == b"same side"
        with pytest.raises(TimeoutError):
            a.connect(b.address, 9000, SILENCE_S)
        lab.heal()
        assert hears(far) == b"lost?"  # TCP sends it again
        assert hears(near) == b"lost too?"
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_a_host_that_is_not_named_is_on_the_other_side(lab: Lab) -> None:
    a, b, c = lab.hosts.values()
    lab.partition({"b"})
    with listening(c, c.address):
        a.connect(c.address, 9000).close()
        with pytest.raises(TimeoutError):
            b.connect(c.address, 9000, SILENCE_S)


def test_a_cable_is_pulled_out(lab: Lab) -> None:
    """Only that host is gone, in silence, and it has its carrier back after it was healed."""
    a, b, c = lab.hosts.values()
    with connected(a, b) as (near, far):
        lab.cut("a")
        near.sendall(b"lost?")
        assert hears(far, SILENCE_S) is None
        with listening(c, c.address):
            b.connect(c.address, 9000).close()
        lab.heal()
        assert hears(far) == b"lost?"


def test_the_power_is_cut(lab: Lab) -> None:
    """All programs of the host are gone, and no reset reaches those that spoke with them."""
    a, b, _ = lab.hosts.values()
    code = "import socket; s = socket.create_server(('', 9000)); c = s.accept()[0]; c.send(b'hi'); input()"
    with a.python(code, stdin=subprocess.PIPE) as process:
        eventually(lambda: _accepts(a, 9000), what="it listens")
        with b.new_socket() as near:
            near.settimeout(5)
            near.connect((a.address, 9000))
            lab.kill("a")
            process.wait(10)
            assert process.returncode == -signal.SIGKILL
            assert hears(near, SILENCE_S) is None
    assert a.processes() == []


def _accepts(host: Host, port: int) -> bool:
    try:
        host.connect("127.0.0.1", port).close()
    except ConnectionRefusedError:
        return False
    return True


def test_http_into_a_host(lab: Lab, tmp_path: Path) -> None:
    """httpx in the test speaks to a server in the host, keeps its connections, and fails as it does elsewhere."""
    (tmp_path / "x").write_text("from inside")
    b = lab.host("b")
    process = b.popen(
        [sys.executable, "-m", "http.server", "-d", tmp_path, "8080"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with b.http() as here, lab.host("a").http(f"http://{b.address}:8080", timeout=SILENCE_S) as there:
        eventually(lambda: _accepts(b, 8080), what="it listens")
        assert here.get("/x").text == there.get("/x").text == "from inside"
        lab.partition({"a"}, {"b"})
        with pytest.raises(httpx.ConnectTimeout):
            there.get("/x")
        assert here.get("/x").text == "from inside"
        process.kill()
        process.wait(10)
        with pytest.raises(httpx.ConnectError):
            here.get("/x")


def test_environment_and_input(lab: Lab) -> None:
    out = lab.host("c").run([sys.executable, "-c", "import os; print(os.environ['X'])"], env={**os.environ, "X": "y"})
    assert (out.returncode, out.stdout.strip()) == (0, "y")
    assert lab.host("c").run(["false"]).returncode == 1


def test_delay_and_loss(lab: Lab) -> None:
    """Where the kernel has netem."""
    try:
        lab.shape("a", delay_ms=200)
    except LabUnavailable as error:
        pytest.skip(f"no delay and loss in labs here: {error}")
    with connected(lab.host("a"), lab.host("b")) as (near, far):
        near.sendall(b"late")
        assert hears(far, 0.05) is None
        assert hears(far) == b"late"


@pytest.mark.parametrize("listen_host", ["0.0.0.0", "::"])
def test_nodes_find_each_other_by_multicast(lab: Lab, listen_host: str) -> None:
    """mDNS as in a real network: found, named by reachable addresses, and gone with a goodbye."""
    a, b = lab.host("a"), lab.host("b")
    with contextlib.ExitStack() as stack:
        nodes = {}
        for host in (a, b):
            argv = [sys.executable, "-u", "-c", DISCOVERY, host.name, listen_host, ""]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            nodes[host.name] = stack.enter_context(host.popen(argv, env=env, **pipes))
            stack.callback(host.kill)
        seen = {name: node.stdout.readline().strip() for name, node in nodes.items() if node.stdout}
        assert seen == {"a": f"{b.address}:8080", "b": f"{a.address}:8080"}
        last = {}
        for name, node in nodes.items():
            out, err = node.communicate("\n", timeout=20)
            assert node.returncode == 0, err
            assert err == ""
            last[name] = out.splitlines()
        everywhere = " ".join(last["a"])
        assert ("[fd77::2]:8080" in everywhere) == (listen_host == "::")
        assert last["b"][-1] == "contacts"  # a had left when b was asked


def test_nothing_is_left() -> None:
    """No process, namespace, descriptor or thread, and the machine's own network as it was."""
    interfaces, descriptors = psutil.net_if_addrs(), psutil.Process().num_fds()
    with Lab(hosts=2) as lab:
        child = lab.host("a").popen(["sleep", "600"])
        own = os.stat("/proc/self/ns/net").st_ino
        inside = eventually(lambda: _namespace(child.pid) not in (0, own) and _namespace(child.pid))
        assert psutil.net_if_addrs() == interfaces
    assert child.wait(5) == -signal.SIGKILL
    assert not [pid for pid in psutil.pids() if _namespace(pid) == inside]
    assert (psutil.net_if_addrs(), psutil.Process().num_fds()) == (interfaces, descriptors)
    assert threading.active_count() == 1


def test_nothing_is_left_of_a_test_run_that_was_killed() -> None:
    """The whole lab goes with it, down to the programs in its hosts."""
    code = """
import time
from tests.multihost.lab import Lab
with Lab(hosts=2) as lab:
    child = lab.host("b").popen(["sleep", "600"])
    print(child.pid, lab._holder.pid, flush=True)
    time.sleep(600)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        process.kill()
    eventually(lambda: not any(_alive(pid) for pid in pids), what="the lab is gone")


def _namespace(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
