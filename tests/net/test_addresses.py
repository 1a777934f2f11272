"""Which addresses a node gives to others, which lead back to it, and what people may write."""

from __future__ import annotations

import ipaddress
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config.address import split_address
from mesh.net.addresses import (
    LocalAddress,
    Ourselves,
    choose_own,
    contact_address,
    heard_addresses,
    local_addresses,
    own_addresses,
)

LO4, LO6 = LocalAddress("lo", "127.0.0.1", 1, multicast=False), LocalAddress("lo", "::1", 1, multicast=False)
LAN4, LAN6 = LocalAddress("eth0", "192.168.1.5", 2), LocalAddress("eth0", "2001:db8::5", 2)
LINK6 = LocalAddress("eth0", "fe80::5", 2)
CABLE4 = LocalAddress("eth1", "169.254.3.4", 3)
DOCKER4 = LocalAddress("docker0", "172.17.0.1", 4)
ALL = (LO4, LO6, DOCKER4, LINK6, LAN6, LAN4, CABLE4)


@pytest.mark.parametrize(
    ("listen", "local", "expected"),
    [
        ("0.0.0.0", ALL, ("192.168.1.5:8080", "172.17.0.1:8080")),  # nobody listens on IPv6
        ("::", ALL, ("192.168.1.5:8080", "[2001:db8::5]:8080", "172.17.0.1:8080")),
        ("0.0.0.0", (LO4, LO6, CABLE4), ("169.254.3.4:8080",)),
        ("0.0.0.0", (LO4, LO6), ("127.0.0.1:8080",)),
        ("::", (LO4, LO6), ("127.0.0.1:8080", "[::1]:8080")),
        ("::", (), ()),
        ("127.0.0.1", ALL, ("127.0.0.1:8080",)),
        ("192.168.1.5", ALL, ("192.168.1.5:8080",)),
        ("2001:db8::5", ALL, ("[2001:db8::5]:8080",)),
        ("gpu1.example.com", ALL, ("gpu1.example.com:8080",)),
    ],
)
def test_own_addresses(listen: str, local: tuple[LocalAddress, ...], expected: tuple[str, ...]) -> None:
    """IPv4 first, virtual bridges last, loopback only without anything else (trap 68)."""
    assert choose_own(listen, 8080, None, local) == expected


@pytest.mark.parametrize(
    ("url", "first"),
    [
        ("http://203.0.113.5:9000", "203.0.113.5:9000"),
        ("https://gpu.example.com/mesh/", "gpu.example.com:8080"),  # 443 belongs to a web server, which passes no Noise
        ("http://[2001:db8::7]:81", "[2001:db8::7]:81"),
        ("http://192.168.1.5:8080", "192.168.1.5:8080"),
    ],
)
def test_the_public_url_comes_first(url: str, first: str) -> None:
    found = choose_own("0.0.0.0", 8080, url, (LAN4,))
    assert found == tuple(dict.fromkeys([first, "192.168.1.5:8080"]))


@pytest.mark.parametrize("url", [None, "", "nonsense", "http://", "http://host:99999", "http://[::1"])
def test_a_public_url_that_says_nothing(url: str | None) -> None:
    assert choose_own("127.0.0.1", 1, url, ()) == ("127.0.0.1:1",)


ips = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6, network="2000::/3"), st.ip_addresses(v=6)).map(str)
ips = ips.filter(lambda ip: not ip.startswith("::ffff:") and ip not in ("::", "0.0.0.0"))  # no interface has these
locals_ = st.lists(
    st.builds(LocalAddress, st.sampled_from(["lo", "eth0", "br-1", "wlan0"]), ips, st.integers(0, 9)), max_size=40
)


@given(st.one_of(ips, st.sampled_from(["0.0.0.0", "::"])), st.integers(1, 65535), locals_)
def test_what_is_given_out_can_be_dialed(listen: str, port: int, local: list[LocalAddress]) -> None:
    """Whatever the interfaces: few, none twice, readable by ``split_address``, all of them our own (trap 68)."""
    found = choose_own(listen, port, None, local)
    assert len(found) <= 16
    assert len(set(found)) == len(found)
    ourselves = Ourselves([listen], port, local)
    for text in found:
        host, its_port = split_address(text)
        assert its_port == port
        if listen in ("0.0.0.0", "::"):
            assert host in {here.ip for here in local}
            assert text in ourselves


@given(locals_)
def test_loopback_is_the_last_resort(local: list[LocalAddress]) -> None:
    hosts = [ipaddress.ip_address(split_address(text)[0]) for text in choose_own("::", 1, None, local)]
    assert len({host.is_loopback for host in hosts}) <= 1


class TestOurselves:
    def test_a_wildcard_is_every_local_address(self) -> None:
        """A node never dials itself."""
        ourselves = Ourselves(["::"], 8080, ALL)
        for text in ("192.168.1.5:8080", "[2001:db8::5]:8080", "127.0.0.1:8080", "127.9.9.9:8080", "[::1]:8080"):
            assert text in ourselves
        assert "[fe80::5%eth0]:8080" in ourselves
        assert "[fe80::5%3]:8080" in ourselves
        assert "[::ffff:127.0.0.1]:8080" in ourselves

    def test_others_are_not_us(self) -> None:
        ourselves = Ourselves(["0.0.0.0"], 8080, ALL)
        for text in ("192.168.1.6:8080", "192.168.1.5:8081", "127.0.0.1:8081", "[::1]:8080", "gpu1.example.com:8080"):
            assert text not in ourselves

    def test_another_node_on_another_address_of_this_machine(self) -> None:
        assert "127.0.0.1:8080" not in Ourselves(["192.168.1.5"], 8080, ALL)
        assert "192.168.1.5:8080" not in Ourselves(["127.0.0.1"], 8080, ALL)
        assert "127.0.0.2:8080" not in Ourselves(["127.0.0.1"], 8080, ALL)
        assert "127.0.0.2:8080" in Ourselves(["127.0.0.2"], 8080, ALL)

    def test_names_are_not_known(self) -> None:
        assert "localhost:8080" not in Ourselves([], 8080, ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu1", "gpu1:8080"),
        (" GPU1.Example.com:9000 ", "gpu1.example.com:9000"),
        ("10.0.0.7", "10.0.0.7:8080"),
        ("10.0.0.7:1", "10.0.0.7:1"),
        ("2001:db8::7", "[2001:db8::7]:8080"),
        ("[2001:DB8:0::7]", "[2001:db8::7]:8080"),
        ("[2001:db8::7]:81", "[2001:db8::7]:81"),
        ("[::ffff:10.0.0.7]:81", "10.0.0.7:81"),
        ("[fe80::1%eth0]:81", "[fe80::1%eth0]:81"),
        ("fe80::1%eth0", "[fe80::1%eth0]:8080"),
    ],
)
def test_contacts_as_people_write_them(text: str, expected: str) -> None:
    """trap 68"""
    assert contact_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":80",
        "a:b",
        "a:0",
        "a:65536",
        "[::1",
        "::1]:1",
        "1:2:3",
        "0.0.0.0:1",
        "[::]:1",
        "224.0.0.1",
        "a b:1",
        "x" * 300,
        "http://gpu1:8080",
        "gpu1:8080/",
        "1.2.3:4",
    ],
)
def test_what_is_no_contact(text: str) -> None:
    with pytest.raises(ValueError):
        contact_address(text)


@given(st.one_of(st.text(), st.text(alphabet="0123456789abcdef:.[]%", max_size=40)))
def test_any_text_is_a_contact_or_an_error(text: str) -> None:
    try:
        found = contact_address(text)
    except ValueError:
        return
    assert contact_address(found) == found


def test_a_specific_address_that_is_gone() -> None:
    assert heard_addresses("10.9.9.9", ALL) == ()
    assert heard_addresses("a-name", ALL) == ()


def test_interfaces_that_are_down_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop's Ethernet without a cable; and an interface that came between the two questions."""
    address = SimpleNamespace(family=2, address="10.0.0.1")
    names = ("up", "down", "new")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {name: [address] for name in names})
    stats = {"up": SimpleNamespace(isup=True, flags="up,multicast"), "down": SimpleNamespace(isup=False, flags="")}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: stats)
    assert local_addresses() == (LocalAddress("up", "10.0.0.1", 0, multicast=True),)


def test_this_machine() -> None:
    """Real interfaces: loopback is there, and what is given out parses."""
    assert any(here.parsed.is_loopback for here in local_addresses())
    assert own_addresses("0.0.0.0", 8080, None)
    for text in own_addresses("::", 8080, None):
        assert split_address(text)[1] == 8080
