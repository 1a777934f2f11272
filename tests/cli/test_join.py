"""`join`: against a real node's links on loopback, and every way in which that fails."""

from __future__ import annotations

import getpass
import io
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.cli import parser
from mesh.cli.failure import CliError
from mesh.cli.join import Greeting, join
from mesh.cli.main import run
from mesh.config.settings import Noise
from mesh.core.node_state import PeerIdentity, PeerKey
from mesh.errors import LinkError
from mesh.net import known_peers
from mesh.net.keys import fingerprint, key_text, load_identity
from tests.cli.cluster import TOKEN, OtherNode, other_node, plain_server


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLAMESH_NODE_ID", "here")
    for name in ("CLUSTER_TOKEN", "NODE_PRIVATE_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".llama-mesh"


@pytest.fixture
def other(tmp_path: Path) -> Iterator[OtherNode]:
    with other_node(tmp_path / "other") as node:
        yield node


def peers(home: Path) -> str:
    path = home / "peers"
    return path.read_text() if path.exists() else ""


def names(directory: Path) -> list[str]:
    return list(known_peers.read(directory / "known_peers")[0].by_name)


# --- it works


def test_both_sides_know_each_other_afterwards(
    other: OtherNode, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["join", other.address, "--token", TOKEN]) == 0
    said = capsys.readouterr()
    assert "node         other, llama-mesh 9.8.7" in said.out
    assert f"{fingerprint(other.key)} (first contact, remembered)" in said.out
    assert "cluster.enabled is false" in said.err
    assert "LLAMESH_CLUSTER__ENABLED=true" in said.err
    assert "0.0.0.0 lets them" in said.err
    assert peers(home) == f"{other.address}\n"
    assert (home / "cluster.token").read_text() == f"{TOKEN}\n"
    assert names(home) == ["other"]
    assert other.trust.known.by_name["here"].key == load_identity(Noise(), {}).key


def test_joining_again(other: OtherNode, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["join", other.address, "--token", TOKEN])
    capsys.readouterr()
    assert run(["join", other.address]) == 0
    said = capsys.readouterr()
    assert "(was noted already)" in said.out
    assert "known since 20" in said.out
    assert "restart" not in said.err
    assert peers(home) == f"{other.address}\n"


def test_json_and_a_finished_configuration(
    other: OtherNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLUSTER_TOKEN", TOKEN)
    (tmp_path / "config.yaml").write_text("listen_addr: 0.0.0.0:8080\ncluster: {enabled: true}\n")
    assert run(["join", other.address, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {
        "address": other.address,
        "added": True,
        "node_id": "other",
        "version": "9.8.7",
        "key": key_text(other.key),
        "fingerprint": fingerprint(other.key),
        "known_since": None,
        "first_contact": True,
        "remarks": [],
    }


def test_the_token_from_stdin(
    other: OtherNode, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in no argument list then (trap 101)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TOKEN}\n"))
    assert run(["join", other.address, "--token", "-"]) == 0
    assert (home / "cluster.token").read_text() == f"{TOKEN}\n"
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert "'ps'" not in said.err


def test_the_token_from_a_terminal_is_not_echoed(
    other: OtherNode, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: TOKEN)
    assert run(["join", other.address, "--token", "-"]) == 0
    assert (home / "cluster.token").read_text() == f"{TOKEN}\n"


def test_a_token_in_the_arguments_works_and_draws_a_warning(
    other: OtherNode, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trap 101."""
    assert run(["join", other.address, "--token", TOKEN]) == 0
    said = capsys.readouterr()
    assert "others can see a token in the arguments of a command, with 'ps'" in said.err
    assert TOKEN not in said.out + said.err


def test_a_token_that_can_be_guessed_draws_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLUSTER_TOKEN", "homelab-cluster-1")
    with other_node(tmp_path / "other", token="homelab-cluster-1") as other:
        assert run(["join", other.address, "--json"]) == 0
    assert "does not look random" in " ".join(json.loads(capsys.readouterr().out)["remarks"])


def test_two_nodes_of_one_name(
    other: OtherNode, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMESH_NODE_ID", "other")
    assert run(["join", other.address, "--token", TOKEN]) == 1
    assert "this node is called 'other', too: give one of them another node_id" in capsys.readouterr().err
    assert peers(home) == ""


def test_a_key_that_cannot_be_kept_is_told(other: OtherNode, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "known_peers.lock").mkdir(parents=True)
    assert run(["join", other.address, "--token", TOKEN]) == 0
    assert "the key is not kept: " in capsys.readouterr().err


# --- it does not


def test_a_wrong_token(other: OtherNode, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not kept, and neither side learns anything."""
    assert run(["join", other.address, "--token", "another token, long enough"]) == 1
    error = capsys.readouterr().err
    assert "The tokens differ: run 'llama-mesh token show' there" in error
    assert "--token -' here" in error
    assert not (home / "cluster.token").exists()
    assert peers(home) == ""
    assert names(home) == []
    assert names(tmp_path / "other") == []


def test_no_token_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["join", "gpu1"]) == 1
    assert "this box has no cluster token yet" in capsys.readouterr().err


def test_another_token_here(
    other: OtherNode, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["token", "new"])
    capsys.readouterr()
    assert run(["join", other.address, "--token", TOKEN]) == 1
    assert "Use --force to replace it" in capsys.readouterr().err
    assert run(["join", other.address, "--token", TOKEN, "--force"]) == 0
    assert (home / "cluster.token").read_text() == f"{TOKEN}\n"
    monkeypatch.setenv("CLUSTER_TOKEN", "another token, long enough")
    assert run(["join", other.address, "--token", TOKEN, "--force"]) == 1
    assert "CLUSTER_TOKEN in the environment wins" in capsys.readouterr().err


def test_a_token_that_is_too_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["join", "gpu1", "--token", "short"]) == 1
    assert "--token: the cluster token has 5 characters" in capsys.readouterr().err


def test_another_key_than_the_known_one(other: OtherNode, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["keys", "trust", "other", key_text(PeerKey(b"k" * 32))])
    assert run(["join", other.address, "--token", TOKEN]) == 1
    assert f"llama-mesh keys trust other {key_text(other.key)}" in capsys.readouterr().err
    assert peers(home) == ""


def test_a_node_that_does_not_trust_us(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with other_node(tmp_path / "other", tofu=False) as other:
        assert run(["join", other.address, "--token", TOKEN]) == 1
        own = key_text(load_identity(Noise(), {}).key)
        assert f"run there: llama-mesh keys trust here {own}" in capsys.readouterr().err


def test_this_very_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NODE_PRIVATE_KEY", b"o".hex() * 32)
    with other_node(tmp_path / "other") as other:
        assert run(["join", other.address, "--token", TOKEN]) == 1
        assert "the node itself" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b""])
def test_what_is_no_node(answer: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with plain_server(answer) as port:
        assert run(["join", f"127.0.0.1:{port}", "--token", TOKEN]) == 1
    assert "Is this the port of a llama-mesh node" in capsys.readouterr().err


def test_nothing_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert run(["join", f"127.0.0.1:{bound.getsockname()[1]}", "--token", TOKEN]) == 1
    assert "Nothing listens there: is the node running" in capsys.readouterr().err


def test_no_such_host(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert run(["join", "gpu1.invalid", "--token", TOKEN]) == 1
    error = capsys.readouterr().err
    assert "gpu1.invalid: there is no such host" in error
    assert "typing error" in error


def test_a_host_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 56. The listener accepts by itself and nobody speaks."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert run(["join", address, "--token", TOKEN, "--timeout", "0.05"]) == 1
    assert "Is this the port of a llama-mesh node" in capsys.readouterr().err


# --- what is dialled


@pytest.mark.parametrize(
    ("given", "config", "dialled"),
    [
        ("gpu1", "", ("gpu1", 8080)),
        ("GPU1.example.org", "listen_addr: 0.0.0.0:9000", ("gpu1.example.org", 9000)),
        ("gpu1", "listen_addr: 0.0.0.0:0", ("gpu1", 8080)),
        ("gpu1:1234", "listen_addr: 0.0.0.0:9000", ("gpu1", 1234)),
        ("::1", "", ("::1", 8080)),
        ("[::1]", "", ("::1", 8080)),
        ("[fd00::20]:1234", "", ("fd00::20", 1234)),
        ("http://gpu1:1234/", "", ("gpu1", 1234)),
    ],
)
def test_host_and_port(tmp_path: Path, home: Path, given: str, config: str, dialled: tuple[str, int]) -> None:
    """Trap 68."""
    (tmp_path / "config.yaml").write_text(config)
    greetings: list[Greeting] = []

    def probe(greeting: Greeting) -> PeerIdentity:
        greetings.append(greeting)
        return PeerIdentity(PeerKey(b"k" * 32), "other", "1.0")

    assert join(parser.parse(["join", given, "--token", TOKEN]), probe) == 0
    assert (greetings[0].host, greetings[0].port) == dialled
    assert greetings[0].timeout_s == 10.0
    host = f"[{dialled[0]}]" if ":" in dialled[0] else dialled[0]
    assert peers(home) == f"{host}:{dialled[1]}\n"


@pytest.mark.parametrize("given", ["gpu1:x", "gpu1:0", "", "gpu1:99999", "a b", ":8080", "a" * 64 + ".local"])
def test_what_is_no_address(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["join", given, "--token", TOKEN]) == 2
    assert "Write it like gpu1" in capsys.readouterr().err


def test_a_name_that_the_resolver_cannot_spell() -> None:
    def probe(greeting: Greeting) -> PeerIdentity:
        raise UnicodeError("label empty or too long")

    with pytest.raises(CliError, match="'gpu1' is no address of a node"):
        join(parser.parse(["join", "gpu1", "--token", TOKEN]), probe)


def test_an_error_without_advice_stays_as_it_is() -> None:
    def probe(greeting: Greeting) -> PeerIdentity:
        raise LinkError("token:8080: something new")

    with pytest.raises(CliError, match="something new") as caught:
        join(parser.parse(["join", "token", "--token", TOKEN]), probe)
    assert caught.value.fix is None


# --- and taken away again


def test_remove(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir(mode=0o700)
    (home / "peers").write_text("# mine\ngpu1:8080\ngpu1:9000\ngpu2:8080\n")
    (tmp_path / "config.yaml").write_text("cluster: {peers: ['gpu2:8080']}\n")
    assert run(["join", "--remove", "gpu1:9000"]) == 0
    assert peers(home) == "# mine\ngpu1:8080\ngpu2:8080\n"
    assert run(["join", "gpu1", "--remove"]) == 0
    assert peers(home) == "# mine\ngpu2:8080\n"
    assert "gpu1:8080 is not dialled any more" in capsys.readouterr().out
    assert run(["join", "--remove", "gpu1"]) == 1
    assert "It has gpu2:8080." in capsys.readouterr().err
    assert run(["join", "--remove", "gpu2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": ["gpu2:8080"], "in_config": ["gpu2:8080"]}
