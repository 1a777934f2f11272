"""Real nodes in the hosts of a lab: started, asked, frozen, killed; and that they find each other at all."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.e2e.harness import Models, cookbook, eventually, profile
from tests.multihost.lab import Lab
from tests.multihost.nodes import MeshNode


def test_a_node_in_a_host(lab: Lab, models: Models, tmp_path: Path) -> None:
    """It serves there with a real llama-server, can be reached from other hosts, and leaves nothing."""
    with MeshNode(lab.host("b"), tmp_path / "b", cookbook({"alpha": profile(models.alpha)})) as node:
        assert node.say("alpha") == "I am alpha"
        with node.stream("alpha") as response:
            assert "data: [DONE]" in list(response.iter_lines())
        with node.http_from(lab.host("a")) as client:
            assert client.get("/readyz").status_code == 200
        assert node.cli_json("ps")
        assert set(node.cluster()) == {"b"}
        children = node.server_pids()
        assert children
        assert {process.pid for process in node.host.processes()} >= {node.pid, *children}
        node.process.send_signal(signal.SIGSTOP)
        eventually(lambda: psutil.Process(node.pid).status() == psutil.STATUS_STOPPED)
        node.process.send_signal(signal.SIGCONT)
        assert node.say("alpha") == "I am alpha"


def test_the_power_of_a_node_is_cut(lab: Lab, models: Models, tmp_path: Path) -> None:
    """Its children are gone with it, and it can be started again."""
    with MeshNode(lab.host("a"), tmp_path / "a", cookbook({"alpha": profile(models.alpha)})) as node:
        node.prewarm("alpha")
        node.power_off()
        assert node.host.processes() == []
        assert node.marked() == []
        lab.heal()
        node.start()
        assert node.say("alpha") == "I am alpha"


@pytest.mark.parametrize("listen", ["0.0.0.0", "[::]"])
def test_nodes_meet_by_multicast(lab: Lab, tmp_path: Path, listen: str) -> None:
    """``cluster: {enabled: true}`` and the same token is all that it takes; one that stops is gone from the others."""
    nodes = [
        MeshNode(host, tmp_path / host.name, cookbook({}), {"listen_addr": f"{listen}:8080"})
        for host in lab.hosts.values()
    ]
    with nodes[0] as a, nodes[1] as b:
        with nodes[2]:
            a.wait_for("b", "c")
            b.wait_for("a", "c")
        a.wait_for("b")
