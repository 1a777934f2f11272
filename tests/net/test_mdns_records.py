"""What goes into mDNS, and how little of what comes out of it is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import ServiceInfo

from mesh.config.address import split_address
from mesh.net.addresses import LocalAddress
from mesh.net.mdns_records import Announcement, Reach, believable, plan_reach, service_type

TYPE = "_llama-mesh._tcp.local."
OWN = Announcement("me", "own-key", "1.0", 8080)

LO = LocalAddress("lo", "127.0.0.1", 1, multicast=False)
LO6 = LocalAddress("lo", "::1", 1, multicast=False)
LAN4, LAN6, LINK6 = (LocalAddress("eth0", ip, 2) for ip in ("192.168.1.5", "2001:db8::5", "fe80::5"))
SECOND4 = LocalAddress("eth0", "192.168.1.6", 2)
WIFI4 = LocalAddress("wlan0", "10.1.1.5", 3)
DOCKER4 = LocalAddress("docker0", "172.17.0.1", 4)
TUNNEL4 = LocalAddress("tun0", "10.8.0.2", 5, multicast=False)


class TestLabel:
    def test_names_that_must_coexist(self) -> None:
        """trap 54: one name may begin another, hold DNS's own words, dots, spaces, UTF-8, or be too long for DNS."""
        names = [
            "tcp",
            "node",
            "node1",
            "node.1",
            "node 1",
            "_tcp.local.",
            "größe",
            "größen",
            "機械",
            "",
            "a" * 64,
            "a" * 65,
        ]
        labels = {Announcement(name, f"key of {name}", "1", 1).label for name in names}
        assert len(labels) == len(names)

    def test_two_nodes_of_one_name(self) -> None:
        """The key is the identity: two machines that are both called "gpu" do not fight over it."""
        first, second = (Announcement("gpu", key, "1", 1).label for key in ("k1", "k2"))
        assert first != second
        assert first.startswith("gpu-")

    @given(st.text(max_size=300), st.text(min_size=1, max_size=300), st.text(max_size=300), st.integers(1, 65535))
    def test_any_name_becomes_one_legal_label(self, node_id: str, key: str, version: str, port: int) -> None:
        """zeroconf takes it, it is one label of at most 63 bytes, and TXT survives its way through the wire format."""
        own = Announcement(node_id, key, version, port)
        assert own.label.isascii()
        assert len(own.label) <= 63
        assert "." not in own.label
        info = ServiceInfo(TYPE, f"{own.label}.{TYPE}", port=port, properties=own.txt)
        assert info.properties[b"id"] == own.txt["id"].encode()
        assert node_id.encode(errors="replace").startswith(own.txt["id"].encode())
        assert all(len(f"{name}={value}".encode()) <= 255 for name, value in own.txt.items())
        assert believable(port, ["10.0.0.1"], info.properties, own, loopback=False) == ()

    def test_nothing_secret_is_announced(self) -> None:
        """trap 101"""
        assert OWN.txt == {"id": "me", "key": "own-key", "protocol": "1", "version": "1.0"}


@pytest.mark.parametrize("name", ["_llama-mesh._tcp.local", TYPE, " _llama-mesh._tcp.local. ", "_a1._udp.local"])
def test_service_types(name: str) -> None:
    assert service_type(name) == name.strip().rstrip(".") + "."


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "llama-mesh",
        "_llama-mesh._tcp",
        "llama-mesh._tcp.local",
        "_a.b._tcp.local",
        "_-a._tcp.local",
        "_a-._tcp.local",
        "_a--b._tcp.local",
        "_1._tcp.local",
        "_" + "a" * 16 + "._tcp.local",
        "_a._tcp.example.com",
    ],
)
def test_what_is_no_service_type(name: str) -> None:
    with pytest.raises(ValueError):
        service_type(name)


@given(st.from_regex(r"_[a-z0-9-]{1,17}\._(tcp|udp)\.local\.?", fullmatch=True))
def test_what_we_accept_zeroconf_accepts(name: str) -> None:
    try:
        full = service_type(name)
    except ValueError:
        return
    ServiceInfo(full, f"{OWN.label}.{full}", port=1)


class TestReach:
    @pytest.mark.parametrize(
        ("listening", "expected"),
        [
            (["0.0.0.0"], Reach(("192.168.1.5", "10.1.1.5", "172.17.0.1"), ())),
            (["::"], Reach(("192.168.1.5", "10.1.1.5", 2, "172.17.0.1"), ())),
            (["10.1.1.5"], Reach(("10.1.1.5",), ("10.1.1.5",))),
            (["2001:db8::5"], Reach((2,), ("2001:db8::5",))),
            (["fe80::5%eth0"], Reach((2,), ("fe80::5",))),
            (["127.0.0.1"], Reach(("127.0.0.1",), ("127.0.0.1",), loopback=True)),
            (["127.0.0.1", "::1"], Reach(("127.0.0.1",), ("127.0.0.1", "::1"), loopback=True)),
            (["10.99.99.99"], None),
            ([], None),
        ],
    )
    def test_interfaces(self, listening: list[str], expected: Reach | None) -> None:
        """A node that listens on one address speaks mDNS there only, and once per interface."""
        found = plan_reach(listening, (LO, LO6, DOCKER4, TUNNEL4, LINK6, LAN6, LAN4, SECOND4, WIFI4))
        assert found == expected or (found is not None and expected is not None and not expected.addresses)
        if found is not None and expected is not None:
            assert (found.interfaces, found.loopback) == (expected.interfaces, expected.loopback)

    def test_what_is_announced(self) -> None:
        found = plan_reach(["::"], (LO, LO6, DOCKER4, LINK6, LAN6, LAN4))
        assert found is not None
        assert found.addresses == ("192.168.1.5", "2001:db8::5", "fe80::5", "172.17.0.1")

    def test_only_loopback(self) -> None:
        """No network at all: nodes of this machine may still find each other."""
        assert plan_reach(["0.0.0.0"], (LO, LO6)) == Reach(("127.0.0.1",), ("127.0.0.1",), loopback=True)
        assert plan_reach(["0.0.0.0"], ()) is None

    def test_many_interfaces(self) -> None:
        """Linux lets a socket join 20 groups; the real interfaces are not crowded out by those of containers."""
        bridges = [LocalAddress(f"br-{n}", f"172.18.{n}.1", 10 + n) for n in range(100)]
        found = plan_reach(["::"], (*bridges, LAN4, LAN6))
        assert found is not None
        assert len(found.interfaces) == len(found.addresses) == 16
        assert found.interfaces[:2] == ("192.168.1.5", 2)


class TestBelief:
    def test_a_node(self) -> None:
        addresses = ["fe80::9%2", "2001:db8::9", "192.168.1.9"]
        assert believable(9000, addresses, {b"key": b"other"}, OWN, loopback=False) == (
            "192.168.1.9:9000",
            "[2001:db8::9]:9000",
            "[fe80::9%2]:9000",
        )

    @pytest.mark.parametrize("port", [None, 0, -1, 65536])
    def test_ports(self, port: int | None) -> None:
        assert believable(port, ["192.168.1.9"], {}, OWN, loopback=False) == ()

    @pytest.mark.parametrize(
        "address",
        [
            "127.0.0.1",
            "::1",
            "::ffff:127.0.0.1",
            "0.0.0.0",
            "::",
            "224.0.0.251",
            "ff02::fb",
            "255.255.255.255",
            "fe80::9",
            "",
            "nonsense",
            "gpu1.example.com",
            "1.2.3.4:5",
        ],
    )
    def test_addresses_that_lead_nowhere(self, address: str) -> None:
        """Loopback from a remote host would mean ourselves; a link-local address without its scope means nothing."""
        assert believable(9000, [address], {}, OWN, loopback=False) == ()

    def test_loopback_among_the_nodes_of_one_machine(self) -> None:
        assert believable(9000, ["127.0.0.1", "::1"], {}, OWN, loopback=True) == ("127.0.0.1:9000", "[::1]:9000")

    def test_ourselves(self) -> None:
        """By the key in TXT, at whatever address it says."""
        assert believable(9000, ["192.168.1.9"], {b"key": b"own-key"}, OWN, loopback=False) == ()

    @given(st.integers() | st.none(), st.lists(st.text() | st.ip_addresses().map(str), max_size=50), st.booleans())
    def test_anything(self, port: int | None, addresses: list[str], loopback: bool) -> None:
        """Whatever was sent: a few sound contacts or none."""
        found = believable(port, addresses, {b"": None, b"key": None}, OWN, loopback=loopback)
        assert len(found) <= 16
        for contact in found:
            assert split_address(contact)[1] == port
