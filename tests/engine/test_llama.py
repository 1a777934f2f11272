"""Command line, environment and address of a child."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh.config.profile import Profile
from mesh.core.devices import Gpu
from mesh.engine import llama
from mesh.engine.assignment import Assignment
from mesh.engine.children import child_env, fixed_port
from mesh.engine.locate import EngineBinary
from mesh.errors import ConfigError

ENGINE = EngineBinary(("/opt/llama-server",), None, "configured")


GPUS = tuple(Gpu(f"gpu{i}", f"GPU-{i}", "A100", 80_000, 0, index=i) for i in range(3))


def profile(*args: str, model_path: str | None = "/m/a.gguf", **fields: Any) -> Profile:
    return Profile(key="a:default", id="a", model="a", profile="default", args=args, model_path=model_path, **fields)


def test_the_defaults_surround_the_users_arguments() -> None:
    command = llama.command(profile("-ngl", "99", "--threads=2"), ENGINE, 10001, {})
    assert command.argv == (
        *("/opt/llama-server", "-ngl", "99", "--threads", "2", "-m", "/m/a.gguf", "-c", "0", "--fit", "off"),
        *("--host", "127.0.0.1", "--port", "10001"),
    )
    assert (command.host, command.port, command.api_key) == ("127.0.0.1", 10001, None)


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("::", "::1"),
        ("10.0.0.5", "10.0.0.5"),
        ("a.sock,::1", "::1"),
    ],
)
def test_the_users_own_address_is_kept_and_reached_from_here(host: str, reached: str) -> None:
    """trap 21"""
    users = profile(f"--host={host}", "--port", "9999")
    assert fixed_port(users) == 9999
    command = llama.command(users, ENGINE, 9999, {})
    assert command.argv[-4:] == ("--host", host, "--port", "9999")
    assert command.argv.count("--host") == command.argv.count("--port") == 1
    assert command.host == reached


def test_no_port_of_the_users_leaves_the_choice_to_the_node() -> None:
    assert fixed_port(profile("-np", "2")) is None


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match="is not a port"):
        fixed_port(profile("--port", port))


def test_a_socket_file_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="no TCP address"):
        llama.command(profile("--host", "/tmp/a.sock"), ENGINE, 1, {})


def test_secrets_travel_in_the_environment_and_never_in_the_arguments() -> None:
    """trap 101"""
    args = ("--api-key", "secret1,secret2", "--hf-token=hf_secret", "-np", "1")
    command = llama.command(profile(*args), ENGINE, 10001, {})
    assert "secret" not in " ".join(command.argv)
    assert "secret" not in repr(command)
    assert command.env["LLAMA_API_KEY"] == "secret1,secret2"
    assert command.env["HF_TOKEN"] == "hf_secret"
    assert command.api_key == "secret1"


def test_the_key_may_come_from_the_profiles_environment_or_a_file(tmp_path: Path) -> None:
    assert llama.command(profile(env={"LLAMA_API_KEY": "k"}), ENGINE, 1, {}).api_key == "k"
    (tmp_path / "keys").write_text("\nfirst\nsecond\n")
    assert llama.command(profile("--api-key-file", str(tmp_path / "keys")), ENGINE, 1, {}).api_key == "first"
    with pytest.raises(ConfigError, match="cannot read --api-key-file"):
        llama.command(profile("--api-key-file", str(tmp_path / "none")), ENGINE, 1, {})


def test_the_environment_of_the_node_without_its_own_secrets() -> None:
    """trap 101"""
    own = {"CLUSTER_TOKEN": "t", "NODE_PRIVATE_KEY": "k", "LLAMESH_AUTH__ALLOWED_KEYS": "top", "LLAMA_API_KEY": "stray"}
    node = {"PATH": "/bin", "LLAMA_ARG_THREADS": "2", **own}
    env = child_env(profile(env={"A": "b"}), node)
    assert env == {"PATH": "/bin", "LLAMA_ARG_THREADS": "2", "OMP_WAIT_POLICY": "passive", "A": "b"}


def test_openmp_waits_passively_unless_somebody_decided_otherwise() -> None:
    assert child_env(profile(), {"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "active"
    assert child_env(profile(env={"OMP_WAIT_POLICY": "x"}), {})["OMP_WAIT_POLICY"] == "x"


def test_devices_become_what_cuda_understands() -> None:
    env = child_env(profile(devices=("gpu1", "0", "GPU-8f1c")), {})
    assert env["CUDA_VISIBLE_DEVICES"] == "1,0,GPU-8f1c"
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_profile_without_a_model_is_refused_before_anything_starts() -> None:
    """trap 30: llama-server without a model would be a router of its own."""
    with pytest.raises(ConfigError, match="names no model"):
        llama.command(profile(model_path=None), ENGINE, 1, {})
    for fields in ({"hf_repo": "a/b"}, {"env": {"LLAMA_ARG_MODEL": "/m"}}):
        llama.command(profile(model_path=None, **fields), ENGINE, 1, {})
    llama.command(profile("-hf", "a/b", model_path=None), ENGINE, 1, {})


def test_the_model_that_must_be_loaded() -> None:
    assert llama.expected_model(profile()) == "/m/a.gguf"
    assert llama.expected_model(profile("-m", "/m/b.gguf")) == "/m/b.gguf"
    assert llama.expected_model(profile(model_path=None, hf_repo="a/b")) is None


def test_what_the_node_decided_stands_before_the_address() -> None:
    command = llama.command(profile(), ENGINE, 10001, {}, Assignment(GPUS[:2], (300, 100), 64))
    assert command.env["LLAMA_ARG_CACHE_RAM"] == "64", "an old llama-server would die of the flag"
    assert command.argv[-6:] == (
        *("--tensor-split", "300,100"),
        *("--host", "127.0.0.1", "--port", "10001"),
    )
    assert command.env["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert command.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_an_assignment_narrows_the_profiles_devices_in_their_order() -> None:
    command = llama.command(profile(devices=("2", "0")), ENGINE, 1, {}, Assignment(GPUS[::2], (100, 300)))
    assert command.env["CUDA_VISIBLE_DEVICES"] == "GPU-2,GPU-0"
    assert command.argv[command.argv.index("--tensor-split") + 1] == "300,100"


def test_the_profiles_own_variables_outrank_an_assignment() -> None:
    users = profile(env={"CUDA_VISIBLE_DEVICES": "1,0", "LLAMA_ARG_CACHE_RAM": "1"})
    command = llama.command(users, ENGINE, 1, {}, Assignment(GPUS[:2], (100, 300), 64))
    assert command.env["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert command.argv[command.argv.index("--tensor-split") + 1] == "300,100", "in the order that the child sees"
    assert command.env["LLAMA_ARG_CACHE_RAM"] == "1"


def test_an_assignment_outranks_the_nodes_own_variables() -> None:
    command = llama.command(profile(), ENGINE, 1, {"CUDA_VISIBLE_DEVICES": "0,1"}, Assignment(GPUS[1:2], (9,)))
    assert command.env["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    counted = llama.command(profile("-ts", "1,1"), ENGINE, 1, {"CUDA_VISIBLE_DEVICES": "0,1"}, Assignment(GPUS[1:2]))
    assert counted.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    inherited = llama.command(profile(), ENGINE, 1, {"LLAMA_ARG_TENSOR_SPLIT": "1,2"}, Assignment(GPUS[:2], (1, 1)))
    assert "--tensor-split" not in inherited.argv
