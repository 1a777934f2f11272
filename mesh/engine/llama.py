"""From a profile to the command line, environment and address of its llama-server. Starts nothing.

Secrets never stand in an argument list, which every user of the machine can read: ``--api-key`` and ``--hf-token``
become the environment variables that llama.cpp knows for them (trap 101).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mesh.config.llama_args import (
    ADDRESS_FLAGS,
    FIT_FLAGS,
    HF_FLAGS,
    MODEL_FLAGS,
    OTHER_SOURCE_FLAGS,
    flag_value,
    has_flag,
    launch_args,
    without_flags,
)
from mesh.config.profile import Engine, Profile
from mesh.engine import flags
from mesh.engine.assignment import VISIBLE_VARIABLES, Assignment
from mesh.engine.locate import EngineBinary
from mesh.errors import ConfigError

LOOPBACK = "127.0.0.1"  # never "localhost", which may mean ::1 first (trap 21)
API_KEY_FLAGS = ("--api-key",)
API_KEY_FILE_FLAGS = ("--api-key-file",)
HF_TOKEN_FLAGS = ("-hft", "--hf-token")
API_KEY_VARIABLE = "LLAMA_API_KEY"
HF_TOKEN_VARIABLE = "HF_TOKEN"
#: variables by which llama-server learns of a model without an argument
MODEL_VARIABLES = ("LLAMA_ARG_MODEL", "LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODEL_URL", "LLAMA_ARG_DOCKER_REPO")
#: of this process's environment, never for a child: the node's own settings and keys, and a stray child key (trap 101)
_WITHHELD = re.compile(r"LLAMESH_|(LLAMA_API_KEY|CLUSTER_TOKEN|NODE_PRIVATE_KEY)$")

UNASSIGNED = Assignment()


@dataclass(frozen=True, slots=True)
class Command:
    """Everything that starting one instance needs."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    host: str  #: where it can be reached
    port: int
    api_key: str | None = field(repr=False)


def fixed_port(profile: Profile) -> int | None:
    """Return the port that the profile's arguments ask for; None lets the node choose."""
    text = flag_value(profile.args, ("--port",))
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,5}", text) or not 0 < int(text) < 65536:
        raise ConfigError(f"profile {profile.key}: --port {text} is not a port; use 1-65535, or leave --port out")
    return int(text)


def command(
    profile: Profile,
    engine: EngineBinary,
    port: int,
    environ: Mapping[str, str] | None = None,
    assignment: Assignment = UNASSIGNED,
) -> Command:
    """Return how to start *profile* on *port*. Raise ``ConfigError`` for what can only be wrong (trap 30)."""
    if profile.engine is not Engine.LLAMA:
        raise ConfigError(f"profile {profile.key}: engine {profile.engine} cannot be run by this version")
    args = launch_args(profile.args, profile.model_path, profile.hf_repo, profile.hf_file)
    if not has_flag(profile.args, FIT_FLAGS) and flags.lacks(engine, FIT_FLAGS[0]):
        args = without_flags(args, FIT_FLAGS)  # an older llama.cpp, which does not resize itself
    if not has_flag(args, MODEL_FLAGS + HF_FLAGS + OTHER_SOURCE_FLAGS) and not set(MODEL_VARIABLES) & set(profile.env):
        raise ConfigError(f"profile {profile.key} names no model; give it model_path, hf_repo or -m in its arguments")
    host = flag_value(args, ("--host",)) or LOOPBACK
    key = _api_key(profile, args)
    env = child_env(profile, os.environ if environ is None else environ, assignment)
    if (keys := flag_value(args, API_KEY_FLAGS)) is not None:
        env[API_KEY_VARIABLE] = keys
    if (token := flag_value(args, HF_TOKEN_FLAGS)) is not None:
        env[HF_TOKEN_VARIABLE] = token
    open_args = without_flags(args, ADDRESS_FLAGS + API_KEY_FLAGS + HF_TOKEN_FLAGS)
    chosen = _ordered(assignment, profile).arguments(args, env)
    argv = (*engine.argv, *open_args, *chosen, "--host", host, "--port", str(port))
    return Command(argv, env, _reachable(profile, host), port, key)


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
    given = _ordered(assignment, profile).environment(profile.args, env | dict(profile.env))
    if "HIP_VISIBLE_DEVICES" in given:
        env.pop("ROCR_VISIBLE_DEVICES", None)  # HIP counts within it, and we count all
    env |= given
    return env | dict(profile.env)


def expected_model(profile: Profile) -> str | None:
    """Return the model file that the child must have loaded; None if it is not given by a path."""
    return flag_value(launch_args(profile.args, profile.model_path, profile.hf_repo, profile.hf_file), MODEL_FLAGS)


def _api_key(profile: Profile, args: tuple[str, ...]) -> str | None:
    """Return a key that the child accepts: of its arguments, its key file or its environment."""
    listed = flag_value(args, API_KEY_FLAGS) or profile.env.get(API_KEY_VARIABLE)
    if listed is not None:
        return next((key.strip() for key in listed.split(",") if key.strip()), None)
    file = flag_value(args, API_KEY_FILE_FLAGS)
    if file is None:
        return None
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {profile.key}: cannot read --api-key-file {file}: {error}") from error
    return next((line.strip() for line in lines if line.strip()), None)


def _reachable(profile: Profile, host: str) -> str:
    """Return the address at which a child that listens on *host* (possibly a list) answers this node."""
    for address in host.split(","):
        if address.endswith(".sock"):
            continue
        return {"0.0.0.0": LOOPBACK, "::": "::1", "localhost": LOOPBACK, "*": LOOPBACK}.get(address, address)
    raise ConfigError(f"profile {profile.key}: --host {host} is no TCP address; use 127.0.0.1, or leave --host out")


def _ordered(assignment: Assignment, profile: Profile) -> Assignment:
    """Return *assignment* in the order in which the user lists the GPUs, who may count on it."""
    own = next((profile.env[name] for name in VISIBLE_VARIABLES if name in profile.env), None)
    return assignment.in_order_of(profile.devices if own is None else own.split(","))


def _device(name: str) -> str:
    """``"gpu1"``, ``"CUDA1"`` and ``"1"`` are the same device; anything else (a GPU-… UUID) stays as it is."""
    match = re.fullmatch(r"(?:gpu|cuda)?(\d+)", name, re.IGNORECASE)
    return match[1] if match else name
