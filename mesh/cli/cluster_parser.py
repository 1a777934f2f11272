"""The arguments of the commands that are about several nodes, and their help."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from mesh.cli.arguments import Commands, Parser, add_command, add_settings, seconds

_TOKEN = """\
examples:
  llama-mesh token new                          make the secret that all your boxes share; on the first box
  llama-mesh token show                         print it, to bring it to the others
  llama-mesh token show | ssh gpu2 llama-mesh join gpu1 --token -
  llama-mesh token show --json | jq -r .source  where it comes from

It is kept in <cluster.noise.config_dir>/cluster.token, which is ~/.llama-mesh/cluster.token if not configured.
CLUSTER_TOKEN in the environment wins over the file.
"""

_TOKEN_SHOW = """\
examples:
  llama-mesh token show
  llama-mesh token show | ssh gpu2 llama-mesh join gpu1 --token -
"""

_TOKEN_NEW = """\
examples:
  llama-mesh token new
  llama-mesh token new --force      replace it; boxes with the old one are no longer let in once this node restarts
"""

_KEYS = """\
examples:
  llama-mesh keys show                          this node's key, and the keys that it trusts
  llama-mesh keys show --json | jq -r .key      to put into cluster.noise.allowed_keys of others
  llama-mesh keys trust gpu2 ed25519:AAAA...    accept another key of gpu2
  llama-mesh keys revoke gpu2                   refuse its key from now on, and drop its links
  llama-mesh keys rotate                        get a new key, which the others accept because the old one signs it

They work on files, which a running node reads again within seconds. By default the first key that a node shows is
remembered and then the only one accepted for it (cluster.noise.tofu).
"""

_KEYS_SHOW = """\
examples:
  llama-mesh keys show
  llama-mesh keys show --json | jq -r '.peers[] | select(.state == "trusted") | .node_id'
"""

_KEYS_TRUST = """\
examples:
  llama-mesh keys trust gpu2 ed25519:q5wPgyjEEPTYnR0RWB+2vVpPvbwsMcWf53UpyCtg6M4=

Compare the key with what 'llama-mesh keys show' prints on that box. Another key that was known for it is revoked.
"""

_KEYS_REVOKE = """\
examples:
  llama-mesh keys revoke gpu2
  llama-mesh keys revoke ed25519:q5wPgyjEEPTYnR0RWB+2vVpPvbwsMcWf53UpyCtg6M4=
  llama-mesh keys revoke zs3pd-7tq4n-h6yzx-2m5ka       a fingerprint will do, if it is known here

Each node has its own list: a key is revoked on each node on which this is run, so run it on all of them. The name of a
revoked key stays its own, but whoever has the token can make a new key and another name: if a box is lost, change the
token, too. A revoked key is refused even if it is in cluster.noise.allowed_keys. A key that took its place
('keys rotate') is another one. 'llama-mesh keys trust' takes it back.
"""

_KEYS_ROTATE = """\
examples:
  llama-mesh keys rotate
  llama-mesh keys rotate --force                although the key before the last is still there

The old key is kept beside the new one (node.key.previous) and signs it. Keep it until every other node has met the
new key, then remove it. While it is there, another rotation is refused: a node that misses two in a row refuses this
one until somebody runs 'llama-mesh keys trust' there. Restart the node to use the new key.
"""

_JOIN = """\
examples:
  llama-mesh join 192.168.1.20                  greet the node there, remember its key and its address
  llama-mesh join gpu1.example.org:9000
  llama-mesh join gpu1 --token -                asks for the token
  ssh gpu1 llama-mesh token show | llama-mesh join gpu1 --token -      without showing it to anybody
  llama-mesh join --remove gpu1                 forget the address; 'llama-mesh keys revoke' is for its key

The port is that of the local listen_addr if none is given. In one network nodes find each other by themselves once
they have the same token; join is for all others, and to see whether it works. A running node notices the new address
within seconds.
"""


def add_commands(commands: Commands) -> None:
    """Add all of them."""
    _add_token(commands)
    _add_keys(commands)
    _add_join(commands)


def _late(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """Return the command, imported when it is called: no other command pays for the cryptography."""

    def command(arguments: argparse.Namespace) -> int:
        status: int = getattr(importlib.import_module(f"mesh.cli.{module}"), function)(arguments)
        return status

    return command


def _add_group(commands: Commands, name: str, summary: str, epilog: str) -> Commands:
    group = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
    return group.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _leaf(group: Commands, name: str, summary: str, epilog: str, command: Callable[..., int]) -> Parser:
    leaf = add_command(group, name, summary, epilog)
    add_settings(leaf)
    leaf.set_defaults(command=command)
    return leaf


def _add_token(commands: Commands) -> None:
    group = _add_group(commands, "token", "show or make the secret that the nodes of a mesh share", _TOKEN)
    _leaf(group, "show", "print the token", _TOKEN_SHOW, _late("token", "show"))
    new = _leaf(group, "new", "make a token", _TOKEN_NEW, _late("token", "new"))
    new.add_argument("--force", action="store_true", help="replace the token that is there")


def _add_keys(commands: Commands) -> None:
    group = _add_group(commands, "keys", "show this node's key, and say which others to trust", _KEYS)
    _leaf(group, "show", "print this node's key and those that it knows", _KEYS_SHOW, _late("keys", "show"))
    trust = _leaf(group, "trust", "accept a key for a node", _KEYS_TRUST, _late("keys", "trust"))
    trust.add_argument("node", metavar="NODE", help="its node_id")
    trust.add_argument(
        "key",
        metavar="KEY",
        help="ed25519:..., as 'llama-mesh keys show' prints it there; or the fingerprint of one that is known here",
    )
    revoke = _leaf(group, "revoke", "refuse a key from now on", _KEYS_REVOKE, _late("keys", "revoke"))
    revoke.add_argument("target", metavar="NODE|KEY", help="a node_id, a key or a fingerprint")
    rotate = _leaf(group, "rotate", "replace this node's key by a new one", _KEYS_ROTATE, _late("keys", "rotate"))
    rotate.add_argument("--force", action="store_true", help="even if not all others may know of the last rotation")


def _add_join(commands: Commands) -> None:
    join = _leaf(commands, "join", "make this node and another known to each other", _JOIN, _late("join", "join"))
    join.add_argument("host", metavar="HOST[:PORT]", help="where the other node listens; IPv6 as [::1]:8080")
    join.add_argument(
        "--token",
        metavar="-",
        help="take the cluster's token from stdin, or ask for it; it is kept if it is right. The token itself instead"
        " of the - works, too, but shows in 'ps'",
    )
    join.add_argument("--force", action="store_true", help="let --token replace another one that is here")
    join.add_argument("--remove", action="store_true", help="forget the address instead")
    join.add_argument("--timeout", type=seconds, default=10.0, metavar="S", help="give up after (default: 10 s)")
