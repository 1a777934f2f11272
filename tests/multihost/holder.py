"""The process that holds a lab's network: one namespace for the switch, one for each host, wired as it is told.

``python -m tests.multihost.holder PARENT CONTROL_FD HOSTS``. The namespaces have no names; they are gone when this
process and those inside them are, whatever happens to the tests. One JSON message asks, one answers. A process of its
own since it may have to make a user namespace first, which one with threads cannot.

Every host has a cable to the switch. The switch is one bridge for each side of a partition, and a cable is put into
another bridge to move its host to another side: what is then sent across is lost without a word to anybody. For that
the hosts know each other's hardware addresses; with ARP, a partition would be answered with "no route to host".
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from tests.multihost.enter import CLONE_NEWNET, CLONE_NEWUSER, PR_SET_PDEATHSIG

DEVICE = "eth0"
_PERMANENT = 0x80  # a neighbour that is never asked for
_NO_DAD = 0x02  # an IPv6 address that may be used at once
_FORWARDING = 3  # BR_STATE_FORWARDING
_PORTS_UP_S = 10.0
_MOST = 65536
_libc = ctypes.CDLL(None, use_errno=True)


def address(number: int) -> str:
    return f"10.77.0.{number}"


def address6(number: int) -> str:
    return f"fd77::{number:x}"


def _hardware(number: int) -> str:
    return f"02:77:00:00:00:{number:02x}"


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class Namespace:
    """A network namespace, made by entering it; ``netlink`` speaks to it from anywhere."""

    def __init__(self) -> None:
        _checked(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
        self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.netlink = IPRoute()
        for setting in ("accept_dad", "dad_transmits"):
            with contextlib.suppress(OSError):  # /proc/sys is read-only in some containers
                Path(f"/proc/sys/net/ipv6/conf/default/{setting}").write_text("0")
        self.netlink.link("set", index=self.index("lo"), state="up")

    def enter(self) -> None:
        _checked(_libc.setns(self.fd, CLONE_NEWNET), "setns")

    def index(self, name: str) -> int:
        return int(self.netlink.link_lookup(ifname=name)[0])


class Network:
    """The switch and the hosts; the methods that are public are what a test can ask for."""

    def __init__(self, names: Sequence[str]) -> None:
        self.switch = Namespace()
        self.hosts = {name: Namespace() for name in names}
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        self._bridges: list[int] = []
        for name in names:
            self._plug_in(name)
        self.wire([list(names)])

    def _plug_in(self, name: str) -> None:
        number, host = self._numbers[name], self.hosts[name]
        peer = {"ifname": DEVICE, "net_ns_fd": host.fd, "address": _hardware(number)}
        self.switch.netlink.link("add", ifname=name, kind="veth", peer=peer)
        device, link = host.index(DEVICE), host.netlink
        link.addr("add", index=device, address=address(number), prefixlen=24)
        with contextlib.suppress(NetlinkError):  # a kernel without IPv6
            link.addr("add", index=device, address=address6(number), prefixlen=64, flags=_NO_DAD)
        link.link("set", index=device, state="up")
        link.route("add", dst="224.0.0.0/4", oif=device, scope="link")
        for other in self._numbers.values():
            if other != number:
                self._introduce(link, device, address(other), _hardware(other))
                with contextlib.suppress(NetlinkError):
                    self._introduce(link, device, address6(other), _hardware(other))

    def _introduce(self, link: Any, device: int, where: str, hardware: str) -> None:
        link.neigh("add", dst=where, lladdr=hardware, ifindex=device, state=_PERMANENT)

    def wire(self, groups: list[list[str]]) -> None:
        """Let the hosts of a group reach each other, and nobody else."""
        while len(self._bridges) < len(groups):
            name = f"bridge{len(self._bridges)}"
            self.switch.netlink.link("add", ifname=name, kind="bridge", br_mcast_snooping=0, br_stp_state=0)
            self._bridges.append(self.switch.index(name))
            self.switch.netlink.link("set", index=self._bridges[-1], state="up")
        for bridge, group in zip(self._bridges, groups, strict=False):
            for name in group:
                self.switch.netlink.link("set", index=self.switch.index(name), master=bridge, state="up")
        self._wait_for_ports([name for group in groups for name in group])

    def _wait_for_ports(self, names: Sequence[str]) -> None:
        """The kernel notices a carrier up to a second late; until then, a port drops everything."""
        deadline = time.monotonic() + _PORTS_UP_S
        for name in names:
            while self._port_state(name) != _FORWARDING:
                if time.monotonic() > deadline:
                    raise OSError(f"the cable of host {name} does not come up")
                time.sleep(0.002)

    def _port_state(self, name: str) -> int | None:
        (link,) = self.switch.netlink.get_links(self.switch.index(name))
        state = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_STATE")
        return None if state is None else int(state)

    def cut(self, host: str) -> None:
        """Take the carrier away, as a cable that is pulled out does."""
        self.switch.netlink.link("set", index=self.switch.index(host), state="down")

    def shape(self, host: str, delay_ms: float, loss_percent: float) -> None:
        """Delay and lose what *host* sends."""
        link, device = self.hosts[host].netlink, self.hosts[host].index(DEVICE)
        link.tc("replace", "netem", device, "1:", delay=int(delay_ms * 1000), loss=loss_percent)

    def socket(self, host: str, family: int, kind: int) -> socket.socket:
        """Return a socket that belongs to *host*, whoever uses it."""
        self.hosts[host].enter()
        try:
            return socket.socket(family, kind)
        finally:
            self.switch.enter()


def _become_root() -> bool:
    """Make a user namespace where we may do everything, if we may not make network namespaces as we are."""
    if _libc.unshare(CLONE_NEWNET) == 0:
        return False
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(CLONE_NEWUSER), "not permitted; nor is unshare(CLONE_NEWUSER)")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return True


def _serve(control: socket.socket, network: Network) -> None:
    while message := control.recv(_MOST):
        request = json.loads(message)
        files: list[int] = []
        made: socket.socket | None = None
        try:
            made = getattr(network, request.pop("do"))(**request)
        except (OSError, NetlinkError) as error:
            answer = {"error": str(error)}
        else:
            answer = {}
            files = [made.fileno()] if made is not None else []
        socket.send_fds(control, [json.dumps(answer).encode()], files)
        if made is not None:
            made.close()


def main(parent: int, control_fd: int, names: list[str]) -> None:
    _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then clean up
    control = socket.socket(fileno=control_fd)
    try:
        in_user_namespace = _become_root()
        _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # the user namespace took it back
        network = Network(names)
    except (OSError, NetlinkError) as error:
        control.send(json.dumps({"error": str(error)}).encode())
        return
    ready = {"user": in_user_namespace, "namespaces": {name: host.fd for name, host in network.hosts.items()}}
    control.send(json.dumps(ready).encode())
    _serve(control, network)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","))
