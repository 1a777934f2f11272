"""`llama-mesh join`: greets another node, so that both know each other's keys, and notes its address."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mesh import __version__
from mesh.cli.cluster_files import ClusterHere, cluster_here, write_errors_explained
from mesh.cli.failure import OK, USAGE, CliError
from mesh.cli.output import print_json, print_warnings, stderr_console, stdout_console
from mesh.cli.token import store
from mesh.config.address import join_address, split_address
from mesh.config.settings import Settings
from mesh.core.node_state import PeerIdentity
from mesh.errors import LinkError, UntrustedPeerError
from mesh.net.keys import Identity, fingerprint, key_text, load_identity, psk_of
from mesh.net.known_peers import Entry, encode_name
from mesh.net.links import Links
from mesh.net.peers_file import add_peer, normal_address, read_peers, remove_peers
from mesh.net.token import TOKEN_VARIABLE, FoundToken, Token, find_token, parse_token, weakness
from mesh.net.trust import Trust, load_trust, trust_command

DEFAULT_PORT = 8080
_GOODBYE_S = 1.0


@dataclass(frozen=True, slots=True)
class Greeting:
    """Whom to greet, and as whom."""

    host: str
    port: int
    timeout_s: float
    identity: Identity
    psk: bytes
    trust: Trust
    node_id: str


Probe = Callable[[Greeting], PeerIdentity]


def greet(greeting: Greeting) -> PeerIdentity:
    """Return who is there, proven and trusted, and remembered by both sides. Raise ``LinkError``."""
    return asyncio.run(_greet(greeting))


async def _greet(greeting: Greeting) -> PeerIdentity:
    links = Links(
        identity=greeting.identity,
        psk=greeting.psk,
        trust=greeting.trust,
        node_id=greeting.node_id,
        version=__version__,
        serve=asyncio.Protocol,
    )
    try:
        link, _ = await links.dial(greeting.host, greeting.port, asyncio.Protocol, timeout_s=greeting.timeout_s)
        return link.peer
    finally:
        await links.close(grace_s=_GOODBYE_S)
        await greeting.trust.close()


def join(arguments: argparse.Namespace, probe: Probe = greet) -> int:
    """Greet the node at HOST, and note what is needed to find it again."""
    here = cluster_here(arguments)
    host, port = _target(arguments.host, here.settings)
    if arguments.remove:
        return _remove(arguments, here, host, port)
    if arguments.token not in (None, "-"):
        seen = "others can see a token in the arguments of a command, with 'ps'; '--token -' asks for it instead"
        print_warnings(stderr_console(), [seen])
    token, is_new = _token(arguments, here)
    identity = load_identity(here.settings.cluster.noise, os.environ)
    trust = load_trust(here.settings.cluster.noise, node_id=here.settings.node_id, key=identity.key)
    address = join_address(host, port)
    known_before = trust.known.by_key
    greeting = Greeting(host, port, arguments.timeout, identity, psk_of(token), trust, here.settings.node_id)
    try:
        with stderr_console().status(f"greeting {address} …"):
            peer = probe(greeting)
    except LinkError as error:
        raise _explained(error, arguments.host, greeting) from error
    except UnicodeError as error:  # the resolver's way to say that no host can be called that
        raise _no_address(arguments.host, "it is not the name of a host") from error
    if is_new:
        store(here, token, force=True)
    with write_errors_explained(here.files.peers):
        added = add_peer(here.files.peers, address)
    weak = weakness(token)
    remarks = [
        *_remarks(here, is_new),
        *([weak] if weak else []),
        *([f"the key is not kept: {trust.unsaved}"] if trust.unsaved else []),
    ]
    _report(arguments, peer, address, known_before.get(peer.key), added, remarks)
    return OK


def _target(text: str, settings: Settings) -> tuple[str, int]:
    """Return the host and port that *text* means; the port is ours if none is given."""
    word = text.strip().removeprefix("http://").removeprefix("https://").rstrip("/")
    default = settings.listen[1] or DEFAULT_PORT
    if word.count(":") > 1 and not word.startswith("["):
        word = f"[{word}]"
    try:
        host, port = split_address(word if ":" in word.rpartition("]")[2] else f"{word}:{default}")
        return split_address(normal_address(join_address(host, port)))
    except ValueError as error:
        raise _no_address(text, str(error)) from error


def _no_address(text: str, reason: str) -> CliError:
    fix = "Write it like gpu1, 192.168.1.20:8080 or [fd00::20]:8080."
    return CliError(f"'{text}' is no address of a node: {reason}", fix=fix, exit_code=USAGE)


def _remove(arguments: argparse.Namespace, here: ClusterHere, host: str, port: int) -> int:
    """Forget one address, or all of a host if no port was given."""
    with write_errors_explained(here.files.peers):
        given = _has_port(arguments.host)
        known = [split_address(address) for address in read_peers(here.files.peers)]
        gone = [join_address(*each) for each in known if each[0] == host and (not given or each[1] == port)]
        remove_peers(here.files.peers, gone)
    if not gone:
        raise CliError(f"'{arguments.host}' is not in {here.files.peers}", fix=_known_addresses(here))
    configured = [address for address in gone if address in here.settings.cluster.peers]
    if arguments.json:
        print_json({"removed": gone, "in_config": configured})
        return OK
    for address in gone:
        print(f"{address} is not dialled any more")
    remarks = [f"{address} is in cluster.peers of the configuration, too" for address in configured]
    print_warnings(stderr_console(), remarks)
    return OK


def _has_port(text: str) -> bool:
    rest = text.strip().rpartition("]")[2].removeprefix("http://").removeprefix("https://")
    return rest.count(":") == 1


def _known_addresses(here: ClusterHere) -> str:
    addresses = read_peers(here.files.peers)
    return f"It has {', '.join(addresses)}." if addresses else "It has no addresses."


def _token(arguments: argparse.Namespace, here: ClusterHere) -> tuple[Token, bool]:
    """Return the token to use, and whether it is to be kept: only once it has proven to be right."""
    found = find_token(here.settings.cluster.noise, os.environ)
    if arguments.token is None:
        if found is None:
            raise CliError(
                "this box has no cluster token yet",
                fix="Run 'llama-mesh token show' on the other box and give it here: 'llama-mesh join HOST --token -'"
                " reads it from stdin. The first box makes one with 'llama-mesh token new'.",
            )
        return found.token, False
    given = parse_token(os.fsencode(_read_line() if arguments.token == "-" else arguments.token), "--token")
    if found is None:
        return given, True
    if secrets.compare_digest(found.token, given):
        return given, False
    return given, _may_replace(found, force=arguments.force)


def _may_replace(found: FoundToken, *, force: bool) -> bool:
    if found.source == TOKEN_VARIABLE:
        fix = f"{TOKEN_VARIABLE} in the environment wins over the file: change or unset it."
        raise CliError(f"{TOKEN_VARIABLE} has another cluster token than --token", fix=fix)
    if not force:
        fix = "Use --force to replace it; this box leaves the mesh that it was in."
        raise CliError(f"this box has another cluster token already, in {found.source}", fix=fix)
    return True


def _read_line() -> str:
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass("token: ")
    return sys.stdin.readline()


def _explained(error: LinkError, host: str, greeting: Greeting) -> CliError:
    """Return what went wrong as people see it, with the next thing to try."""
    cause: BaseException | None = error
    causes = []
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    message = error.message
    fix: str | None = None
    if isinstance(error, UntrustedPeerError):  # says itself what to run
        pass
    elif any(isinstance(each, socket.gaierror) for each in causes):
        message, fix = f"{host}: there is no such host", "Look for a typing error, or give its IP address."
    elif any(isinstance(each, ConnectionRefusedError) for each in causes):
        fix = "Nothing listens there: is the node running, on this port, and is its listen_addr not 127.0.0.1?"
    elif "cluster token" in message:
        fix = (
            "The tokens differ: run 'llama-mesh token show' there and"
            f" 'llama-mesh join {host} --token -' here (with --force if another one is here)."
        )
    elif "refused this node" in message:
        own = trust_command(greeting.node_id, greeting.identity.key)
        fix = f"If it does not know this node's key yet, run there: {own}"
    elif "not the handshake" in message or "at its beginning" in message or "does not speak" in message:
        fix = "Is this the port of a llama-mesh node, and does it have cluster.enabled and a token?"
    elif "cannot be reached" in message:
        fix = "Is the address right, and does no firewall stand in between?"
    return CliError(message, fix=fix)


def _remarks(here: ClusterHere, token_is_new: bool) -> list[str]:
    """Return what else is needed before a node here is a member."""
    remarks = []
    settings = here.settings
    if not settings.cluster.enabled:
        file = here.config_path or "./config.yaml"
        remarks.append(
            "cluster.enabled is false, so a node here joins nobody; add the line 'cluster: {enabled: true}' to"
            f" {file}, or set LLAMESH_CLUSTER__ENABLED=true"
        )
    if not settings.cluster.noise.enabled:
        remarks.append("cluster.noise.enabled is false; nodes that want encryption, the default, refuse this one")
    host = settings.listen[0]
    if host in ("localhost", "::1") or host.startswith("127."):
        remarks.append(f"listen_addr is {settings.listen_addr}: others cannot reach this box; 0.0.0.0 lets them")
    if token_is_new:
        remarks.append("a node that runs here already needs a restart to use the token")
    return remarks


def _report(
    arguments: argparse.Namespace,
    peer: PeerIdentity,
    address: str,
    known: Entry | None,
    added: bool,
    remarks: list[str],
) -> None:
    result: dict[str, Any] = {
        "address": address,
        "added": added,
        "node_id": peer.node_id,
        "version": peer.version,
        "key": key_text(peer.key),
        "fingerprint": fingerprint(peer.key),
        "known_since": (known.since or None) if known else None,
        "first_contact": known is None,
        "remarks": remarks,
    }
    if arguments.json:
        print_json(result)
        return
    console = stdout_console()
    console.print(f"node         {encode_name(peer.node_id)}, llama-mesh {encode_name(peer.version)}", markup=False)
    console.print(f"address      {address}{'' if added else ' (was noted already)'}", markup=False)
    console.print(f"key          {result['key']}", markup=False)
    when = "first contact, remembered" if known is None else f"known since {known.since or 'before'}"
    console.print(f"fingerprint  {result['fingerprint']} ({when})", markup=False)
    print_warnings(stderr_console(), remarks)
