"""What the children of all engines have in common: their environment, and where they listen."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from mesh.config.llama_args import flag_value
from mesh.config.profile import Profile
from mesh.engine.assignment import VISIBLE_VARIABLES, Assignment
from mesh.engine.kind import UNASSIGNED
from mesh.errors import ConfigError

LOOPBACK = "127.0.0.1"  # never "localhost", which may mean ::1 first (trap 21)
#: of this process's environment, never for a child: the node's own settings and keys, and a stray child key (trap 101)
_WITHHELD = re.compile(r"LLAMESH_|(LLAMA_API_KEY|CLUSTER_TOKEN|NODE_PRIVATE_KEY)$")


def fixed_port(profile: Profile) -> int | None:
    """Return the port that the profile's arguments ask for; None lets the node choose."""
    text = flag_value(profile.args, ("--port",))
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,5}", text) or not 0 < int(text) < 65536:
        raise ConfigError(f"profile {profile.key}: --port {text} is not a port; use 1-65535, or leave --port out")
    return int(text)


def files_root(profile: Profile) -> Path | None:
    """Return where the profile's arguments want the files of its conversions; None leaves it to the node."""
    text = flag_value(profile.args, ("--tmp-dir",)) if profile.convert else None
    return Path(os.path.abspath(os.path.expanduser(text))) if text else None


def own_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what any child may have of *environ*: not the node's own settings, and no keys."""
    return {name: value for name, value in environ.items() if not _WITHHELD.match(name)}


def child_env(profile: Profile, environ: Mapping[str, str], assignment: Assignment = UNASSIGNED) -> dict[str, str]:
    """Return the environment of *profile*'s child, on the basis of this process's *environ*."""
    env = own_env(environ)
    # OpenMP threads spin at their barriers by default: beside other load that costs up to 90 times the speed
    env.setdefault("OMP_WAIT_POLICY", "passive")
    if profile.devices:
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the numbers that nvidia-smi shows
        env["CUDA_VISIBLE_DEVICES"] = ",".join(_device(name) for name in profile.devices)
    if assignment.gpus is not None:
        env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    given = ordered(assignment, profile).environment(profile.args, env | dict(profile.env))
    if "HIP_VISIBLE_DEVICES" in given:
        env.pop("ROCR_VISIBLE_DEVICES", None)  # HIP counts within it, and we count all
    env |= given
    return env | dict(profile.env)


def reachable(profile: Profile, host: str) -> str:
    """Return the address at which a child that listens on *host* (possibly a list) answers this node."""
    for address in host.split(","):
        if address.endswith(".sock"):
            continue
        return {"0.0.0.0": LOOPBACK, "::": "::1", "localhost": LOOPBACK, "*": LOOPBACK}.get(address, address)
    raise ConfigError(f"profile {profile.key}: --host {host} is no TCP address; use 127.0.0.1, or leave --host out")


def ordered(assignment: Assignment, profile: Profile) -> Assignment:
    """Return *assignment* in the order in which the user lists the GPUs, who may count on it."""
    own = next((profile.env[name] for name in VISIBLE_VARIABLES if name in profile.env), None)
    return assignment.in_order_of(profile.devices if own is None else own.split(","))


def _device(name: str) -> str:
    """``"gpu1"``, ``"CUDA1"`` and ``"1"`` are the same device; anything else (a GPU-… UUID) stays as it is."""
    match = re.fullmatch(r"(?:gpu|cuda)?(\d+)", name, re.IGNORECASE)
    return match[1] if match else name
