"""`llama-mesh keys`: this node's key, and the others that it trusts. It edits files, which a running node re-reads."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import Any

from mesh.cli.cluster_files import ClusterHere, cluster_here, write_errors_explained
from mesh.cli.failure import OK, USAGE, CliError
from mesh.cli.output import print_json, print_table, print_warnings, stderr_console, stdout_console
from mesh.core.node_state import PeerKey
from mesh.net import known_peers
from mesh.net.keys import (
    KEY_VARIABLE,
    fingerprint,
    key_text,
    load_identity,
    looks_like_key,
    parse_key,
    rotate_key,
    rotated_from,
)
from mesh.net.known_peers import NAMELESS, Change, Entry, KnownPeers, Standing, decode_name, encode_name
from mesh.net.trust import allowed_keys, today


def show(arguments: argparse.Namespace) -> int:
    """Print this node's key, made now if there was none, and what is known of others."""
    here = cluster_here(arguments)
    noise = here.settings.cluster.noise
    identity = load_identity(noise, os.environ)
    old = rotated_from(identity.rotation, identity.key) if identity.rotation else None
    entries = known_peers.read(here.files.known_peers)[0].entries
    result = {
        "node_id": here.settings.node_id,
        "key": key_text(identity.key),
        "fingerprint": fingerprint(identity.key),
        "source": _source(here),
        "replaces": key_text(old) if old else None,
        "tofu": noise.tofu,
        "allowed_keys": sorted(map(key_text, allowed_keys(noise))),
        "known_peers": str(here.files.known_peers),
        "peers": [_as_json(entry) for entry in entries],
    }
    if arguments.json:
        print_json(result)
    else:
        _print(result, entries)
    return OK


def trust(arguments: argparse.Namespace) -> int:
    """Accept a key for a node, from now on."""
    here = cluster_here(arguments)
    node_id = _name(arguments.node)
    key = _key(arguments.key, known_peers.read(here.files.known_peers)[0])
    known = _update(here, partial(known_peers.trust, node_id=node_id, key=key, today=today()))
    allowed = allowed_keys(here.settings.cluster.noise)
    remark = None
    if allowed and key not in allowed:
        remark = "cluster.noise.allowed_keys is set and has other keys only: add this one there, too, or it is refused"
    _report(arguments, here, known.by_key[key], "is trusted", remark)
    return OK


def revoke(arguments: argparse.Namespace) -> int:
    """Refuse a key, from now on."""
    here = cluster_here(arguments)
    known, _ = known_peers.read(here.files.known_peers)
    key = _find(known, arguments.target)
    known = _update(here, partial(known_peers.revoke, key=key, today=today()))
    remark = "this holds for this node only: run it on every other one, too"
    successor = known.by_key[key].successor
    if successor is not None and not known.refused(successor):
        remark += f"; the key that took its place, {fingerprint(successor)}, is another one and stays trusted"
    _report(arguments, here, known.by_key[key], "is revoked here; a running node drops its links", remark)
    return OK


def rotate(arguments: argparse.Namespace) -> int:
    """Give this node a new key that its old one vouches for."""
    here = cluster_here(arguments)
    if os.environ.get(KEY_VARIABLE, "").strip():
        raise CliError(
            f"this node's key comes from {KEY_VARIABLE}, not from a file",
            fix=f"Unset {KEY_VARIABLE} to use the file, or put the new key there and the old one into"
            f" {here.files.previous_key}.",
        )
    load_identity(here.settings.cluster.noise, os.environ)  # makes the first one
    old, new = rotate_key(here.files, force=arguments.force)
    if arguments.json:
        print_json({"key": key_text(new), "fingerprint": fingerprint(new), "replaces": key_text(old),
                    "path": str(here.files.key), "previous_path": str(here.files.previous_key)})  # fmt: skip
        return OK
    console = stdout_console()
    console.print(f"new key   {key_text(new)}  {fingerprint(new)}", markup=False)
    console.print(f"replaces  {key_text(old)}  {fingerprint(old)}", markup=False)
    stderr_console().print(
        f"Restart the node to use it. Keep {here.files.previous_key} until all others have met the new key, then remove"
        " it. Where this node is in cluster.noise.allowed_keys, the old key may stay; put the new one in at leisure.",
        markup=False,
        soft_wrap=True,
    )
    return OK


def _source(here: ClusterHere) -> str:
    return KEY_VARIABLE if os.environ.get(KEY_VARIABLE, "").strip() else str(here.files.key)


def _update(here: ClusterHere, change: Change) -> KnownPeers:
    with write_errors_explained(here.files.known_peers):
        return known_peers.update(here.files.known_peers, change)[0]


def _name(text: str) -> str:
    try:
        name = decode_name(text)
    except ValueError as error:
        raise CliError(str(error), exit_code=USAGE) from error
    if looks_like_key(name):
        raise CliError(
            "the node comes first, then its key; a node is not called like a key or a fingerprint",
            fix="llama-mesh keys trust NODE KEY",
            exit_code=USAGE,
        )
    return name


def _key(text: str, known: KnownPeers) -> PeerKey:
    """Return the key that *text* spells, or whose fingerprint it is."""
    found = [entry.key for entry in known.entries if fingerprint(entry.key) == text.strip().lower()]
    if len(found) == 1:
        return found[0]
    try:
        return parse_key(text)
    except ValueError as error:
        raise CliError(f"KEY {error}", exit_code=USAGE) from error


def _find(known: KnownPeers, target: str) -> PeerKey:
    """Return the key that *target* means: a key itself or a fingerprint, else the trusted key of the node, or its only.

    What looks like a key is never taken for a name: others choose their names.
    """
    if looks_like_key(target):
        return _key(target, known)
    name = _name(target)
    if name in known.by_name:
        return known.by_name[name].key
    found = [entry for entry in known.entries if entry.node_id == name and name != NAMELESS]
    if len(found) > 1:
        keys = ", ".join(f"{fingerprint(entry.key)} ({entry.standing})" for entry in found)
        raise CliError(
            f"'{encode_name(name)}' has several keys, none of them trusted: {keys}",
            fix="Say which one is meant: 'llama-mesh keys revoke FINGERPRINT'.",
            exit_code=USAGE,
        )
    if found:
        return found[0].key
    names = ", ".join(sorted(map(encode_name, known.by_name))) or "none"
    raise CliError(f"no node '{encode_name(name)}' is known here; known are: {names}",
                   fix="Give its key instead: 'llama-mesh keys revoke ed25519:...'.")  # fmt: skip


def _report(arguments: argparse.Namespace, here: ClusterHere, entry: Entry, what: str, remark: str | None) -> None:
    if arguments.json:
        print_json({**_as_json(entry), "known_peers": str(here.files.known_peers), "remark": remark})
        return
    console = stdout_console()
    console.print(f"{encode_name(entry.node_id)}  {fingerprint(entry.key)}  {what}", markup=False)
    if remark:
        print_warnings(stderr_console(), [remark])


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "node_id": entry.node_id,
        "key": key_text(entry.key),
        "fingerprint": fingerprint(entry.key),
        "state": str(entry.standing),
        "since": entry.since or None,
        "replaced_by": key_text(entry.successor) if entry.successor else None,
    }


def _print(result: dict[str, Any], entries: tuple[Entry, ...]) -> None:
    console = stdout_console()
    console.print(f"node         {encode_name(result['node_id'])}", markup=False)
    console.print(f"key          {result['key']}", markup=False)
    console.print(f"fingerprint  {result['fingerprint']}", markup=False)
    console.print(f"from         {result['source']}", markup=False)
    if result["replaces"]:
        console.print(f"replaces     {result['replaces']}", markup=False)
    if result["allowed_keys"]:
        console.print(f"allowed      the {len(result['allowed_keys'])} of cluster.noise.allowed_keys", markup=False)
    elif not result["tofu"]:
        console.print("allowed      the trusted ones below only: cluster.noise.tofu is false", markup=False)
    console.print()
    if not entries:
        print(f"No other node's key is known yet ({result['known_peers']}).")
        return
    order = sorted(entries, key=lambda entry: (entry.standing is not Standing.TRUSTED, entry.node_id))
    rows = [
        [
            encode_name(entry.node_id),
            str(entry.standing),
            fingerprint(entry.key),
            entry.since or "-",
            key_text(entry.key),
        ]
        for entry in order
    ]
    print_table(["NODE", "STATE", "FINGERPRINT", "SINCE", "KEY"], rows, optional=["KEY", "SINCE"])
