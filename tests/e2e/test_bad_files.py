"""Ports, files, engines and disks that are not as they should be: one clear error each; everything else goes on."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.e2e.conftest import StartNode
from tests.e2e.harness import TINY_ARGS, Models, Node, cookbook, eventually, free_port, profile


def test_a_model_works_once_its_file_is_there(models: Models, start_node: StartNode, tmp_path: Path) -> None:
    """Trap 24: the next request retries, without a restart."""
    path = tmp_path / "later.gguf"
    node = start_node(cookbook({"later": profile(path)}))
    assert node.chat("later").status_code == 503
    shutil.copy(models.beta, path)
    assert node.say("later") == "I am beta"
    assert node.status()["failures"] == {}


class TestPorts:
    def test_the_nodes_own_port_is_taken(self, models: Models, start_node: StartNode, tmp_path: Path) -> None:
        """Trap 28."""
        first = start_node(cookbook({"alpha": profile(models.alpha)}))
        second = Node(tmp_path / "second", cookbook({}), {"listen_addr": f"127.0.0.1:{first.port}"})
        status, said = second.run_to_end()
        assert status == 1
        assert f"{first.port}" in said
        assert "another process uses the port; stop it or choose another" in said
        assert "Traceback" not in said
        assert first.say("alpha") == "I am alpha"

    def test_the_state_of_another_node(self, models: Models, start_node: StartNode, tmp_path: Path) -> None:
        """Trap 28."""
        first = start_node(cookbook({"alpha": profile(models.alpha)}))
        second = Node(tmp_path / "second", cookbook({}), {"metrics_path": first.config["metrics_path"]})
        status, said = second.run_to_end()
        assert (status, "another llama-mesh node" in said) == (1, True), said
        assert first.say("alpha") == "I am alpha"

    def test_the_port_of_a_profile_is_taken(self, models: Models, start_node: StartNode) -> None:
        with socket.create_server(("127.0.0.1", free_port())) as foreign:
            port = foreign.getsockname()[1]
            text = cookbook(
                {"alpha": profile(models.alpha), "beta": profile(models.beta, f"{TINY_ARGS} --port {port}")}
            )
            node = start_node(text)
            response = node.chat("beta")
            assert response.status_code == 503
            assert f"{port}" in response.text
            assert "in use" in response.text
            assert node.say("alpha") == "I am alpha"

    def test_a_foreign_server_on_the_port_cannot_pass_for_ours(self, models: Models, start_node: StartNode) -> None:
        """Trap 26: two profiles that ask for one port never answer for each other."""
        args = f"{TINY_ARGS} --port {free_port()}"
        node = start_node(cookbook({"alpha": profile(models.alpha, args), "beta": profile(models.beta, args)}))
        assert node.say("alpha") == "I am alpha"
        response = node.chat("beta")
        assert (response.status_code, "in use by another instance" in response.text) == (503, True), response.text
        node.unload("alpha")
        eventually(lambda: not node.instances("alpha"))
        eventually(lambda: node.chat("beta").status_code == 200, within_s=20, every_s=0.5)
        assert node.say("beta") == "I am beta"


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("models: [", "cookbook.yaml:"),
            ("models:\n - name: a\n   profiles:\n    - modle_path: x\n", "did you mean 'model_path'"),
            ("\x00\x01\xff", "cookbook.yaml"),
            ("models:\n - name: a\n   profiles: [{id: x}]\n", "model_path"),
            (
                'models:\n - {name: a, profiles: [{model_path: x, llama_server_args: "-c \'unclosed"}]}\n',
                "llama_server_args",
            ),
        ],
        ids=["no YAML", "typo", "binary", "no source", "open quote"],
    )
    def test_a_cookbook_that_cannot_be_used_at_start(self, tmp_path: Path, text: str, says: str) -> None:
        status, said = Node(tmp_path / "n", text).run_to_end()
        assert (status, says in said) == (1, True), said
        assert "Traceback" not in said

    def test_a_cookbook_that_cannot_be_read_at_start(self, tmp_path: Path) -> None:
        node = Node(tmp_path / "n", "")
        node.cookbook_path.unlink()
        status, said = node.run_to_end()
        assert (status, "cookbook.yaml" in said, "does not exist" in said) == (1, True, True), said
        node.cookbook_path.mkdir()
        status, said = node.run_to_end()
        assert (status, "cookbook.yaml" in said, "directory" in said) == (1, True, True), said

    def test_a_cookbook_that_cannot_be_read_any_more(self, models: Models, start_node: StartNode) -> None:
        """Traps 12, 84: deleted, a directory, a link to nowhere; each is logged once, and the old one stays."""
        good = cookbook({"alpha": profile(models.alpha)})
        node = start_node(good)
        pid = node.prewarm("alpha")["pid"]
        node.cookbook_path.unlink()
        node.wait_log("cookbook_reload_failed", count=1)
        node.cookbook_path.mkdir()
        node.wait_log("cookbook_reload_failed", count=2)
        node.cookbook_path.rmdir()
        node.cookbook_path.symlink_to("nowhere.yaml")
        node.wait_log("cookbook_reload_failed", count=3)
        assert node.say("alpha") == "I am alpha"
        node.cookbook_path.unlink()
        node.rewrite_cookbook(cookbook({"alpha": profile(models.alpha), "beta": profile(models.beta)}))
        node.wait_log("cookbook reloaded")
        assert node.say("beta") == "I am beta"
        assert node.instance("alpha")["pid"] == pid

    def test_an_engine_that_is_not_there(self, models: Models, start_node: StartNode) -> None:
        node = start_node(
            cookbook({"alpha": profile(models.alpha)}), {"llama_cpp": {"binary_path": "/nowhere/llama-server"}}
        )
        assert node.http.get("/readyz").status_code == 503
        error = node.chat("alpha").json()["error"]
        assert (error["type"], error["source"]) == ("engine_missing", "mesh")
        assert "/nowhere/llama-server" in error["message"]
        (line,) = [line for line in node.log("no model can be started") if line["level"] == "ERROR"]
        assert "llama_cpp.binary_path /nowhere/llama-server does not exist" in line["fields"]["reason"]

    def test_an_engine_that_cannot_run(self, models: Models, start_node: StartNode, tmp_path: Path) -> None:
        binary = tmp_path / "llama-server"
        binary.write_bytes(b"\x7fELF not really")
        binary.chmod(0o755)
        node = start_node(cookbook({"alpha": profile(models.alpha)}), {"llama_cpp": {"binary_path": str(binary)}})
        response = node.chat("alpha")
        assert response.status_code == 503
        assert str(binary) in response.text


class TestFullDisk:
    CONFIG: ClassVar[dict[str, Any]] = {"logging": {"enabled": True, "filename": "node.log"}}

    def test_a_log_file_that_takes_nothing(self, models: Models, start_node: StartNode, tmp_path: Path) -> None:
        """/dev/full fails every write as a full disk does."""
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "node.log").symlink_to("/dev/full")
        logging = {**self.CONFIG["logging"], "directory": str(tmp_path / "logs")}
        node = start_node(cookbook({"alpha": profile(models.alpha)}), {"logging": logging})
        for _ in range(5):
            assert node.say("alpha") == "I am alpha"
            time.sleep(0.15)  # each in a batch of its own
        assert node.stderr().count("cannot write the log file") == 1, "said once"
        assert "No space left" in node.stderr()
        assert len(node.wait_log('"message":"request"', count=5)) >= 5, "stdout still has the lines"

    def test_counters_that_cannot_be_saved(self, models: Models, start_node: StartNode, tmp_path: Path) -> None:
        """Every save fails, because its scratch file cannot be written; it is said once."""
        state = tmp_path / "state"
        (state / "metrics.json.tmp").mkdir(parents=True)
        node = start_node(cookbook({"alpha": profile(models.alpha)}), {"metrics_path": str(state / "metrics.json")})
        assert node.say("alpha") == "I am alpha"
        node.stop()
        warnings = [line for line in node.log("metrics") if line["level"] == "WARNING"]
        assert len(warnings) == 1, node.tail()
        assert "metrics.json" in str(warnings[0])

    def test_a_disk_that_is_really_full(self, models: Models, start_node: StartNode, tmp_path: Path) -> None:
        """Logs and counters on a tiny file system, filled to the last byte; freed again, both go on."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"this user may not mount: {mounted.stderr.decode().strip()}")
        try:
            node = start_node(
                cookbook({"alpha": profile(models.alpha)}),
                {
                    "logging": {**self.CONFIG["logging"], "directory": str(disk / "logs")},
                    "metrics_path": str(disk / "metrics.json"),
                },
            )
            assert node.say("alpha") == "I am alpha"
            eventually(lambda: (disk / "logs" / "node.log").exists())
            fill(disk / "ballast")
            for _ in range(40):
                assert node.say("alpha") == "I am alpha"
            eventually(lambda: "cannot write the log file" in node.stderr(), within_s=5)
            (disk / "ballast").unlink()
            written = (disk / "logs" / "node.log").stat().st_size
            assert node.say("alpha") == "I am alpha"
            eventually(lambda: (disk / "logs" / "node.log").stat().st_size > written, within_s=5)
            node.stop()
            assert json.loads((disk / "metrics.json").read_text())["requests_total"] == 42
            assert node.stderr().count("cannot write the log file") == 1
        finally:
            eventually(lambda: subprocess.run(["umount", str(disk)], capture_output=True, check=False).returncode == 0)


def fill(path: Path) -> None:
    """Write to *path* until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
