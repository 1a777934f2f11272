"""Who may be in the mesh, and whose clock is right: nobody's needs to be."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, Models, cookbook, eventually, profile
from tests.multihost.lab import Lab
from tests.multihost.nodes import MeshNode
from tests.multihost.test_mesh import LONG, PATIENT

#: What Python runs first in a node whose clock is wrong: its wall clock is shifted before anybody asks it.
SKEWED = """
import os, time
_time, _shift = time.time, float(os.environ["TEST_CLOCK_SHIFT_S"])
time.time = lambda: _time() + _shift
import mesh.tasks
_wall_time = mesh.tasks.wall_time
mesh.tasks.wall_time = lambda: _wall_time() + _shift
"""


def test_another_token(lab: Lab, models: Models, tmp_path: Path) -> None:
    """c has another token: it learns nothing, serves nobody, and is told of once, not with every try."""
    text = cookbook({"alpha": profile(models.alpha)})
    with (
        MeshNode(lab.host("a"), tmp_path / "a", text) as a,
        MeshNode(lab.host("b"), tmp_path / "b", cookbook({})) as b,
        MeshNode(lab.host("c"), tmp_path / "c", cookbook({}), token="quite another token") as c,
    ):
        a.wait_for("b")
        c.wait_log("token", within_s=20)
        assert b.say("alpha") == "I am alpha"
        assert set(c.cluster()) == {"c"}
        assert c.chat("alpha").status_code == 404
        assert set(a.cluster()) == {"a", "b"}
        assert len(a.log("cluster token")) <= 3, a.log("cluster token")


def test_a_key_that_is_not_on_the_list(lab: Lab, tmp_path: Path) -> None:
    """With allowed_keys even the right token is not enough."""
    with MeshNode(lab.host("b"), tmp_path / "b", cookbook({})) as b, ExitStack() as stack:
        key = b.cli_json("keys", "show")["key"]
        pinned = {"noise": {"config_dir": str(tmp_path / "a" / "keys"), "allowed_keys": [key]}}
        a = stack.enter_context(MeshNode(lab.host("a"), tmp_path / "a", cookbook({}), cluster=pinned))
        c = stack.enter_context(MeshNode(lab.host("c"), tmp_path / "c", cookbook({})))
        a.wait_for("b")
        b.wait_for("a", "c")  # they trust on first use
        a.wait_log("allowed_keys", within_s=20)
        assert set(a.cluster()) == {"a", "b"}
        assert "a" in b.cluster()
        assert c.cluster()


def test_a_revoked_node_is_cut_off(lab: Lab, models: Models, tmp_path: Path) -> None:
    """Also the link that carries an answer right now; nothing but the file says so."""
    text = cookbook({"alpha": profile(models.alpha, PATIENT)})
    with (
        MeshNode(lab.host("a"), tmp_path / "a", cookbook({})) as a,
        MeshNode(lab.host("b"), tmp_path / "b", text) as b,
    ):
        a.wait_for("b")
        b.wait_for("a")
        with a.connection() as client:
            assert client.start_stream("alpha", **LONG) == 200
            assert a.cli("keys", "revoke", "b").returncode == 0
            assert b"[DONE]" not in client.rest()
        a.wait_for()
        assert a.chat("alpha").status_code == 503
        fingerprint = b.cli_json("keys", "show")["key"]
        assert a.cli("keys", "trust", "b", fingerprint).returncode == 0
        a.wait_for("b")
        assert a.say("alpha") == "I am alpha"


def test_a_rotated_key_is_followed(lab: Lab, models: Models, tmp_path: Path) -> None:
    """b gets a new key while nobody listens; a accepts it by what the old one signed, with no hand of ours."""
    text = cookbook({"alpha": profile(models.alpha)})
    with MeshNode(lab.host("a"), tmp_path / "a", cookbook({})) as a:
        with MeshNode(lab.host("b"), tmp_path / "b", text) as b:
            a.wait_for("b")
            before = a.cluster()["b"]["fingerprint"]
            assert b.cli("keys", "rotate").returncode == 0
        a.wait_for()
        with MeshNode(lab.host("b"), tmp_path / "b", text):
            a.wait_for("b")
            assert a.cluster()["b"]["fingerprint"] != before
            assert a.say("alpha") == "I am alpha"


@pytest.mark.parametrize("shift_s", [-400 * 86400, 400 * 86400])
def test_a_clock_that_is_wrong_by_a_year(lab: Lab, models: Models, tmp_path: Path, shift_s: int) -> None:
    """c joins, is served and serves, and joins again after a restart with its clock put right."""
    place = tmp_path / "skew"
    place.mkdir()
    (place / "sitecustomize.py").write_text(SKEWED)
    text = cookbook({"alpha": profile(models.alpha)})
    wrong = {"PYTHONPATH": f"{place}:{ROOT}", "TEST_CLOCK_SHIFT_S": str(shift_s)}
    with (
        MeshNode(lab.host("a"), tmp_path / "a", cookbook({})) as a,
        MeshNode(lab.host("b"), tmp_path / "b", cookbook({})) as b,
    ):
        wrong_c = MeshNode(lab.host("c"), tmp_path / "c", text, env=wrong).start()
        a.wait_for("b", "c")
        wrong_c.wait_for("a", "b")
        assert a.say("alpha") == "I am alpha"
        wrong_c.sigkill()
        with MeshNode(lab.host("c"), tmp_path / "c", text):
            eventually(lambda: a.cluster().get("c", {}).get("status") == "alive", within_s=30, what="c is back")
            assert b.say("alpha") == "I am alpha"
            assert not a.log("copy of this node's key")


def test_join_by_address_without_multicast(lab: Lab, models: Models, tmp_path: Path) -> None:
    """``llama-mesh token`` and ``join`` are all that it takes where mDNS does not reach."""
    quiet = {"discovery": {"mdns": False}}
    text = cookbook({"alpha": profile(models.alpha)})
    first = MeshNode(lab.host("a"), tmp_path / "a", text, cluster=quiet, token=None)
    second = MeshNode(lab.host("b"), tmp_path / "b", cookbook({}), cluster=quiet, token=None)
    made = first.cli("token", "new")
    assert made.returncode == 0, made
    token = first.cli_json("token", "show")["token"]
    with first as a:
        refused = second.cli("join", a.host.address, "--token", "not the right token at all")
        assert refused.returncode == 1
        assert "token" in refused.stderr
        joined = second.cli("join", a.host.address, "--token", token)
        assert joined.returncode == 0, joined
        with second as b:
            b.wait_for("a", within_s=10)
            a.wait_for("b", within_s=10)
            assert b.say("alpha") == "I am alpha"
