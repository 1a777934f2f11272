"""`fit`: of a running node, of files, and "what if"; as people and as programs read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh.cli.main import run
from mesh.engine.locate import _embedded_wheel
from mesh.host.devices import DeviceReader
from tests.cli.fake_node import FakeNode
from tests.synthetic_models import write as write_synthetic
from tests.tiny_models import write_chat
from tests.tiny_whisper import write_whisper

NO_NODE = "http://127.0.0.1:1"
PARTS = ("weights", "kv", "recurrent", "compute", "output", "draft", "projector")


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "model": "qwen3",
        "key": "qwen3:default",
        "fit": "now",
        "source": "estimated",
        "problem": None,
        "failure": None,
        "need_mib": {"ram": 400, "vram": 19000},
        "placement_mib": {"ram": 400, "gpu1": 19000, "vram": 19000},
        "evict": [],
        "weights": {"gpu": 17000.25, "cpu": 300.0},
        "kv": {"gpu": 1024.0, "cpu": 0.0},
        "recurrent": {"gpu": 1.0, "cpu": 0.0},
        "compute": {"gpu": 300.0, "cpu": 20.0},
        "output": {"gpu": 0.0, "cpu": 2.0},
        "draft": {"gpu": 4.0, "cpu": 0.0},
        "projector": {"gpu": 0.0, "cpu": 0.0},
        "total": {"gpu": 18329.25, "cpu": 322.0},
        "context": 32768,
        "slots": 4,
        "notes": [],
        **changes,
    }


NOTHING = {**dict.fromkeys((*PARTS, "total", "context", "slots")), "placement_mib": None}
GPU0 = {
    "kind": "gpu0", "name": "A", "uuid": "GPU-a", "vendor": "nvidia", "index": 0,
    "total_mib": 24000, "used_mib": 9000, "unified": False,
}  # fmt: skip
HOLDER = {
    "instance": "i-7", "key": "bge:default", "model": "bge", "state": "ready", "evictable": True,
    "memory_mib": {"ram": 100, "gpu0": 23500, "vram": 23500}, "live_mib": None, "source": "learned",
    "active": 0, "pinned": False,
}  # fmt: skip
BUDGET = {
    "node_id": "gpu1",
    "memory": {
        "gpu0": {"capacity_mib": 24000, "used_mib": 23500, "foreign_mib": 0, "free_mib": 500},
        "ram": {"capacity_mib": None, "used_mib": 100, "foreign_mib": 0, "free_mib": None},
        "vram": {"capacity_mib": 24000, "used_mib": 23500, "foreign_mib": 0, "free_mib": 500},
    },
    "held_by": [HOLDER],
    "devices": {
        "telemetry": "nvml", "ram_total_mib": 64000, "ram_available_mib": 60000, "gpus": [GPU0], "problems": [],
    },
    "sampled_s_ago": 1.0,
}  # fmt: skip


def answer(node: FakeNode, *entries: dict[str, Any]) -> None:
    node.answers["GET /modelFits"] = (200, {"node_id": "gpu1", "models": list(entries)})
    node.answers["GET /admin/budget"] = (200, BUDGET)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A real model file, named as people name them."""
    path = tmp_path / "tiny chat.gguf"
    write_chat(path)
    return path


def out(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# -- a running node


def test_the_table_of_a_node(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    answer(
        node,
        entry(fit="after_eviction", evict=[{"instance": "i-7", "model": "bge"}, {"instance": "i-8", "model": None}]),
        entry(model="cpu:small", total={"gpu": 0.0, "cpu": 99.6}, need_mib={"ram": 170}, placement_mib={"ram": 170}),
        entry(model="book", source="cookbook", fit="never", need_mib={"vram": 99000}, **NOTHING),
        entry(model="gone", source="unknown", fit="unknown", problem="no such file: [x]", need_mib=None, **NOTHING),
    )
    assert run(["fit"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[:7] == [
        ["MODEL", "MEMORY", "WEIGHTS", "KV", "COMPUTE", "OTHER", "TOTAL", "CHARGED", "SOURCE", "FITS"],
        ["qwen3", "GPU", "17,000", "1,024", "300", "5", "18,329", "19,000", "estimated", "yes", "(gpu1", "19,000",
         "MiB),", "after", "bge,", "i-8", "stop"],
        ["RAM", "300", "-", "20", "2", "322", "400"],
        ["cpu:small", "RAM", "300", "-", "20", "2", "100", "170", "estimated", "yes"],
        ["book", "GPU", "-", "-", "-", "-", "-", "99,000", "cookbook", "no:", "more", "than", "the", "whole", "budget"],
        ["gone", "RAM", "-", "-", "-", "-", "-", "-", "unknown", "no:", "see", "below"],
        ["gone:", "no", "such", "file:", "[x]"],
    ]  # fmt: skip
    assert lines[7:] == [
        ["budget"],
        ["ram", "100", "MiB", "used,", "not", "limited"],
        ["vram", "23,500", "used,", "500", "free", "of", "24,000", "MiB"],
        ["gpu0", "23,500", "used,", "500", "free", "of", "24,000", "MiB"],
        ["all", "in", "MiB,", "for", "node", node.url],
        [
            "it",
            "has",
            "64,000",
            "MiB",
            "RAM",
            "of",
            "which",
            "60,000",
            "are",
            "available,",
            "gpu0",
            "A",
            "24,000",
            "MiB",
        ],
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fit": "now"}, "yes (gpu1 19,000 MiB)"),
        ({"fit": "now", "placement_mib": {"vram": 5}}, "yes"),
        ({"fit": "loaded"}, "loaded (gpu1 19,000 MiB)"),
        ({"fit": "after_eviction", "evict": [{"instance": "i", "model": "m"}]}, "yes (gpu1 19,000 MiB), after m stops"),
        ({"fit": "waits", "evict": [{"instance": "i", "model": "m"}]}, "not now: m in the way"),
        ({"fit": "waits"}, "not now: the memory is not free yet"),
        ({"failure": "bad flag"}, "fails to start: see below"),
        ({"failure": "crashed", "fit": "loaded"}, "loaded (gpu1 19,000 MiB)"),  # before: an instance of it is there
        ({"fit": "unknown"}, "unknown"),
        ({"fit": "now", "source": "unknown", "need_mib": {}}, "unknown"),
        ({"fit": "loaded", "source": "unknown", "need_mib": {}}, "loaded (gpu1 19,000 MiB)"),
        ({"fit": "a later version's word"}, "unknown"),
    ],
)
def test_verdicts(node: FakeNode, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer(node, entry(**changes))
    assert run(["fit", "qwen3"]) == 0
    assert capsys.readouterr().out.splitlines()[1].rstrip().endswith(f"{changes.get('source', 'estimated')}  {said}")
    assert node.asked[-1].query == {"model": ["qwen3"]}


HELD = {"bge": HOLDER, "pin": {**HOLDER, "instance": "i-8", "model": "pin", "pinned": True, "evictable": False},
        "work": {**HOLDER, "instance": "i-9", "model": "work", "active": 2, "evictable": False},
        "new": {**HOLDER, "instance": "i-10", "model": "new", "state": "spawning", "evictable": False}}  # fmt: skip


@pytest.mark.parametrize(
    ("evict", "foreign_mib", "said"),
    [
        (["pin"], 0, "not now: pin is pinned"),
        (["pin"], 9000, "not now: pin is pinned"),  # others use memory too, and are not the reason
        (["bge", "work", "pin"], 0, "not now: work is busy, pin is pinned"),  # bge would go at once
        (["new"], 0, "not now: new is loading"),
        (["bge"], 0, "not now: bge in the way"),
        ([], 9000, "not now: other programs use the memory"),
        ([], 0, "not now: the memory is not free yet"),
    ],
)
def test_who_is_in_the_way(
    node: FakeNode, evict: list[str], foreign_mib: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator who unpins a model, or stops a program, must stop the right one."""
    victims = [{"instance": HELD[name]["instance"], "model": name} for name in evict]
    answer(node, entry(fit="waits", evict=victims))
    figures = {"capacity_mib": 24000, "used_mib": 0, "foreign_mib": foreign_mib, "free_mib": 0}
    budget = {**BUDGET, "memory": {"gpu0": figures}, "held_by": list(HELD.values())}
    node.answers["GET /admin/budget"] = (200, budget)
    assert run(["fit", "qwen3"]) == 0
    assert capsys.readouterr().out.splitlines()[1].rstrip().endswith(f"estimated  {said}")


def test_a_loaded_model_shows_what_it_holds(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    """What one more would be charged is another figure."""
    mine = {**HOLDER, "key": "qwen3:default", "model": "qwen3", "memory_mib": {"ram": 700, "gpu0": 6000, "vram": 6000}}
    going = {**mine, "instance": "i-9", "state": "draining"}
    answer(node, entry(fit="loaded", placement_mib={"ram": 700, "gpu0": 6000, "vram": 6000}))
    node.answers["GET /admin/budget"] = (200, {**BUDGET, "held_by": [mine, going]})

    def told() -> list[list[str]]:
        assert run(["fit", "qwen3"]) == 0
        return [line.split()[-6:] for line in capsys.readouterr().out.splitlines()[1:3]]

    gpu, ram = told()
    assert gpu == ["6,000", "estimated", "loaded", "(gpu0", "6,000", "MiB)"]
    assert ram[-1] == "700"
    second = {**mine, "instance": "i-10", "state": "spawning", "memory_mib": {"ram": 1, "gpu1": 500, "vram": 500}}
    node.answers["GET /admin/budget"] = (200, {**BUDGET, "held_by": [mine, going, second]})
    gpu, ram = told()
    assert ram[-1] == "701"
    assert run(["fit", "qwen3"]) == 0
    assert "6,500  estimated  loaded 2 times (gpu0 6,000 MiB, gpu1 500 MiB)" in capsys.readouterr().out
    node.answers["GET /admin/budget"] = node.error(403, "permission_error", "this route needs one of auth.admin_keys")
    gpu, ram = told()
    assert (gpu[0], ram[-1]) == ("6,000", "700")


def test_why_a_model_fails_to_start(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    answer(node, entry(failure="invalid argument: --contxt"))
    assert run(["fit", "qwen3"]) == 0
    assert "\nqwen3: fails to start: invalid argument: --contxt\n" in capsys.readouterr().out
    older = entry()
    del older["failure"]
    answer(node, older)
    assert run(["fit", "qwen3"]) == 0


def test_notes_are_told_once(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    cache = "includes 360 MiB of prompt cache; set -cram to change that"
    answer(node, entry(notes=[cache, "a guess"]), entry(model="bge", notes=[cache]))
    assert run(["fit"]) == 0
    text = capsys.readouterr().out
    assert f"\nqwen3, bge: {cache}\nqwen3: a guess\n" in text


def test_one_model_as_json_is_one_object(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    """`jq '.kv.gpu + .kv.cpu'` is how the issue measures us."""
    answer(node, entry())
    assert run(["fit", "qwen3", "--json"]) == 0
    assert out(capsys) == entry()
    assert run(["fit", "--json"]) == 0
    assert out(capsys) == {"node": node.url, "models": [entry()], "budget": BUDGET}
    assert run(["fit", "qwen3", "qwen3:fast", "--json"]) == 0
    assert len(out(capsys)["models"]) == 2


def test_without_an_admin_key_the_models_are_told_all_the_same(
    node: FakeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(node, entry())
    node.answers["GET /admin/budget"] = node.error(403, "permission_error", "this route needs one of auth.admin_keys")
    assert run(["fit"]) == 0
    text = capsys.readouterr().out
    assert "qwen3" in text
    assert "budget" not in text
    assert f"for node {node.url}" in text
    assert "needs an admin key (--key)" in text


def test_without_an_admin_key_what_is_worked_out_here_is_not_said_to_be_of_the_node(
    node: FakeNode, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(node, entry())
    node.answers["GET /admin/budget"] = node.error(403, "permission_error", "this route needs one of auth.admin_keys")
    assert run(["fit", str(model)]) == 0
    text = capsys.readouterr().out
    assert "node http" not in text
    assert "for this machine as if it ran nothing" in text
    assert "judged as if this machine ran nothing: what a node holds needs an admin key" in text
    assert run(["fit", str(model), "--json"]) == 0
    assert "judged as if this machine ran nothing" in out(capsys)["notes"][-1]
    assert run(["fit", "qwen3", str(model), "--json"]) == 0
    theirs, own = out(capsys)["models"]
    assert theirs["notes"] == []
    assert own["notes"]


def test_a_node_that_lets_nobody_in_is_not_passed_over(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["GET /admin/budget"] = node.error(401, "authentication_error", "Unauthorized")
    assert run(["fit"]) == 1
    assert "--key" in capsys.readouterr().err


def test_something_else_at_the_named_place(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["GET /admin/budget"] = (200, ["hello"])
    assert run(["fit"]) == 1
    assert "does not answer like a llama-mesh node" in capsys.readouterr().err


def test_a_node_that_was_named_must_answer(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", str(model), "--url", NO_NODE]) == 1
    assert "no node answers at" in capsys.readouterr().err


def test_a_model_that_the_node_cannot_size_is_a_failure(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    broken = entry(model="gone", problem="/m/x.gguf is truncated", fit="unknown", need_mib=None, **NOTHING)
    answer(node, broken)
    assert run(["fit", "gone", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["error"]["message"] == "/m/x.gguf is truncated"
    assert run(["fit", "--json"]) == 0  # nobody asked for this one
    assert out(capsys)["models"] == [broken]


def test_more_ram_than_the_machine_has_is_remarked(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    answer(node, entry(need_mib={"ram": 65000}))
    assert run(["fit", "qwen3", "--json"]) == 0
    told = out(capsys)
    assert told["notes"] == ["it needs 65,000 MiB of main memory and the machine has 64,000 MiB"]
    assert told["fit"] == "now"  # no budget forbids it
    assert run(["fit", "qwen3"]) == 0
    text = capsys.readouterr().out
    assert "  no: the machine has 64,000 MiB of RAM" in text
    assert "yes" not in text
    answer(node, entry(need_mib={"ram": 64000}))
    assert run(["fit", "qwen3"]) == 0
    assert "  yes" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["qwen3", "nope"], ["nope", "qwen3", "nope"]])
def test_names_that_the_node_does_not_know_do_not_hide_the_others(
    node: FakeNode, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = node.error(404, "model_not_found", "Model 'nope' not found in local cookbook or any peer")

    class Answers(dict[str, tuple[int, Any]]):
        def get(self, asked: str, default: Any = None) -> Any:
            return unknown if node.asked[-1].query == {"model": ["nope"]} else super().get(asked, default)

    node.answers = Answers()
    answer(node, entry())
    assert run(["fit", *names]) == 1
    text = capsys.readouterr().out
    assert "  yes (gpu1 19,000 MiB)" in text
    assert "nope: Model 'nope' not found" in text
    assert run(["fit", "nope"]) == 1
    assert "'llama-mesh models' lists the names" in capsys.readouterr().err


def test_a_file_is_judged_by_the_memory_of_the_node(
    node: FakeNode, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that idles there would have to go; with it busy one would have to wait."""
    Path("config.yaml").write_text(f"llama_cpp: {{binary_path: {sys.executable}}}")  # the embedded one uses no GPU
    answer(node, entry())
    node.answers["GET /admin/budget"] = (200, BUDGET)
    assert run(["fit", str(model), "qwen3", "--json"]) == 0
    own, theirs = out(capsys)["models"]
    assert theirs == entry()
    assert (own["fit"], own["evict"]) == ("after_eviction", [{"instance": "i-7", "model": "bge"}])
    assert own["placement_mib"]["gpu0"] >= own["total"]["gpu"] > 0


@pytest.mark.parametrize(
    ("change", "fit"),
    [
        ({}, "after_eviction"),
        ({"held_by": [{**HOLDER, "active": 1, "evictable": False}]}, "waits"),
        ({"held_by": [{**HOLDER, "pinned": True, "evictable": False}]}, "waits"),
        ({"held_by": [{**HOLDER, "state": "stopping", "evictable": False}]}, "now"),  # nobody else has to go
        ({"gpu0": {"capacity_mib": 24000, "used_mib": 23500, "foreign_mib": 23500, "free_mib": 0}}, "waits"),
        ({"gpu0": {"capacity_mib": 100, "used_mib": 0, "foreign_mib": 0, "free_mib": 100}}, "never"),
        ({"gpu0": {"capacity_mib": 24000, "used_mib": 0, "foreign_mib": 0, "free_mib": 24000}, "held_by": []}, "now"),
    ],
)
def test_verdicts_that_are_made_here(
    node: FakeNode, model: Path, change: dict[str, Any], fit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """trap 42: what others use is never evictable; nor is what is busy or pinned."""
    Path("config.yaml").write_text(f"llama_cpp: {{binary_path: {sys.executable}}}")
    gpu0 = change.get("gpu0", BUDGET["memory"]["gpu0"])  # type: ignore[index]
    memory = {"gpu0": gpu0, "vram": gpu0}
    node.answers["GET /admin/budget"] = (
        200,
        {**BUDGET, "memory": memory, "held_by": change.get("held_by", BUDGET["held_by"])},
    )
    assert run(["fit", str(model), "--json"]) == 0
    assert out(capsys)["fit"] == fit


# -- worked out here


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No node runs here."""
    (tmp_path / "config.yaml").write_text("{listen_addr: '127.0.0.1:1', metrics_path: state/metrics.json}")


@pytest.mark.usefixtures("alone")
def test_a_file_without_node_and_cookbook(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cookbook.yaml").write_text("models: {broken: yes}\n")  # must not get in the way
    assert run(["fit", model.name, "--args", "-c 8192 -np 1", "--json"]) == 0
    told = out(capsys)
    assert (told["model"], told["fit"], told["source"], told["problem"]) == (model.name, "now", "estimated", None)
    assert (told["context"], told["slots"]) == (8192, 1)
    assert told["need_mib"]["ram"] > told["total"]["cpu"] > 0
    assert told["kv"]["gpu"] + told["kv"]["cpu"] > 0
    sides = {side: sum(told[part][side] for part in PARTS) for side in ("gpu", "cpu")}
    assert sides == pytest.approx(told["total"], abs=0.01)


@pytest.mark.usefixtures("alone")
def test_other_arguments_change_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """trap 45: a q8_0 cache takes 17/32 of an f16 one, half the context half of it."""
    model = write_synthetic("gqa", tmp_path / "m.gguf")

    def cache(args: str) -> float:
        assert run(["fit", str(model), "--args", args, "--json"]) == 0
        kv = out(capsys)["kv"]
        return float(kv["gpu"] + kv["cpu"])

    whole = cache("-c 32768")
    assert cache("-c 16384") == pytest.approx(whole / 2, rel=0.001)
    assert cache("-c 32768 -ctk q8_0 -ctv q8_0") == pytest.approx(whole * 17 / 32, rel=0.001)


@pytest.mark.usefixtures("alone")
def test_imagined_gpus(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", str(model), "--gpus", "24GB,16384", "--json"]) == 0
    told = out(capsys)
    assert told["fit"] == "now"
    assert "gpu1" in told["placement_mib"]  # best fit: the smaller one
    assert told["total"]["gpu"] > 0
    assert run(["fit", str(model), "--gpus", "100", "--json"]) == 0
    assert out(capsys)["fit"] == "never"
    assert run(["fit", str(model), "--gpus", "0", "--json"]) == 0
    assert out(capsys)["total"]["gpu"] == 0


@pytest.mark.usefixtures("alone")
def test_imagined_gpus_are_shared_out_as_the_configuration_says(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(setting: str) -> str:
        Path("config.yaml").write_text(f"{{listen_addr: '127.0.0.1:1', max_vram_mb: {setting}}}")
        assert run(["fit", str(model), "--gpus", "10000"]) == 0
        return capsys.readouterr().out

    text = told("auto")
    assert "gpu0  0 used, 9,500 free of 9,500 MiB" in text
    assert "of each of these GPUs 95% is for models" in text
    text = told("null")
    assert "gpu0  0 used, 10,000 free of 10,000 MiB" in text
    assert "all of each of these GPUs is counted" in text
    assert "of 10,000 MiB" in told("20")  # which is said of the GPUs that are here
    assert "with these GPUs, empty" in text


@pytest.mark.usefixtures("alone")
def test_auto_without_gpus_is_remarked(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("config.yaml").open("a") as file:
        file.truncate(0)
        file.write("{listen_addr: '127.0.0.1:1', max_vram_mb: auto}")
    assert run(["fit", str(model)]) == 0
    remarked = "max_vram_mb is auto, but no GPU can be read here" in capsys.readouterr().out
    assert remarked == (not DeviceReader().read().budgeted)


#: llama.cpp itself, as it comes with the package
EMBEDDED = pytest.mark.skipif(
    _embedded_wheel() is None, reason="needs the engine extra: pip install 'llama-mesh[engine]'"
)


@EMBEDDED
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--contxt 4096", "llama-server b11549 (build default) does not know --contxt"),
        ("--no-mmap", "use --load-mode none"),
        ("-c abc", "-c"),
        ("-ctk q9_9", "q9_9"),
        ("-c", "-c"),
        ("-dev CUDA7", "CUDA7"),
        ("--port x", "--port x is not a port"),
    ],
)
def test_arguments_that_llama_server_refuses(
    model: Path, args: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would change no figure, and "yes" would be wrong: nothing could be started."""
    assert run(["fit", str(model), "--args", args]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert "yes" not in captured.out
    Path("cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": [{"model_path": str(model)}]}]}))
    assert run(["fit", "m", str(model), "--args", args, "--json"]) == 1
    assert all(said in entry["problem"] for entry in out(capsys)["models"])


@EMBEDDED
@pytest.mark.usefixtures("alone")
def test_devices_of_another_machine_are_not_for_this_engine_to_judge(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["fit", str(model), "--gpus", "24GB", "--args", "-dev CUDA0 -ot blk=CUDA0", "--json"]) == 0
    assert out(capsys)["fit"] == "now"
    assert run(["fit", str(model), "--gpus", "24GB", "--args", "-dev CUDA0 --contxt 1"]) == 1
    assert "--contxt" in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_without_an_engine_the_arguments_are_said_to_be_unchecked(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text("{listen_addr: '127.0.0.1:1', llama_cpp: {binary_path: /nowhere/llama-server}}")
    assert run(["fit", str(model), "--args", "-c 512", "--json"]) == 0
    assert out(capsys)["notes"] == ["its arguments were not checked: there is no llama-server here to ask"]
    assert run(["fit", str(model), "--json"]) == 0
    assert out(capsys)["notes"] == []  # there were none


@pytest.mark.usefixtures("alone")
def test_the_cookbook_without_a_node(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cookbook = {
        "models": [
            {"name": "tiny", "profiles": [{"model_path": str(model), "llama_server_args": "-c 4096 -np 1"}]},
            {"name": "said", "profiles": [{"model_path": str(model), "estimated_sysmem_mb": 777}]},
            {"name": "lost", "profiles": [{"model_path": "/nowhere/x.gguf"}]},
            {"name": "far", "profiles": [{"hf_repo": "org/far"}]},
        ]
    }
    Path("cookbook.yaml").write_text(json.dumps(cookbook))
    assert run(["fit", "--json"]) == 0
    told = out(capsys)
    tiny, said, lost, far = told["models"]
    assert (told["node"], told["budget"]["held_by"]) == (None, [])
    assert (tiny["source"], tiny["context"]) == ("estimated", 4096)
    assert (said["source"], said["need_mib"]["ram"]) == ("cookbook", 777)
    assert "/nowhere/x.gguf" in lost["problem"]
    assert lost["need_mib"] is None
    assert (far["fit"], far["source"], far["problem"]) == ("unknown", "unknown", None)  # not there yet, nothing wrong
    assert run(["fit", "said", "--args", "-c 512", "--json"]) == 0
    assert out(capsys)["source"] == "estimated"  # what the cookbook says is of other arguments
    assert run(["fit", "tiny", "lost"]) == 1
    text = capsys.readouterr().out
    assert "no running node was asked" in text
    assert "lost: " in text
    assert "no: see below" in text
    assert run(["fit", "nope"]) == 1
    assert "has tiny, said, lost, far; or give" in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_sized_does_not_hide_the_rest(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("some").mkdir()
    for name in ("a.gguf", "ggml-tiny.bin", "pytorch_model.bin"):
        Path("some", name).touch()
    broken = {"gone.gguf": "there is no such file", "nope": "not found", "some": "is a directory"}
    assert run(["fit", *broken, model.name]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith(model.name)
    assert lines[4].rstrip().endswith("yes")
    for line, (name, said) in zip(lines[5:], broken.items(), strict=False):
        assert line.startswith(f"{name}: ")
        assert said in line
    assert run(["fit", *broken, model.name, "--json"]) == 1
    told = out(capsys)["models"]
    assert [entry["problem"] is None for entry in told] == [False, False, False, True]
    assert told[0].keys() == told[3].keys()
    assert run(["fit", "some"]) == 1
    assert "Name a model file in it: a.gguf, ggml-tiny.bin." in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_a_file_goes_to_the_engine_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    write_whisper(Path("speech.bin"))
    assert run(["fit", "speech.bin", "--gpus", "24GB", "--json"]) == 0
    told = out(capsys)
    assert (told["fit"], told["source"], told["problem"]) == ("now", "estimated", None)
    assert run(["fit", "speech.bin", "--args=-ng", "--gpus", "24GB", "--json"]) == 0
    assert "gpu0" not in out(capsys)["placement_mib"], "an argument of whisper-server's"


@pytest.mark.usefixtures("alone")
def test_a_directory_with_the_name_of_a_model_is_not_in_its_way(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("m").mkdir()
    Path("cookbook.yaml").write_text(json.dumps({"models": [{"name": "m", "profiles": [{"model_path": str(model)}]}]}))
    assert run(["fit", "m", "--json"]) == 0
    assert out(capsys)["fit"] == "now"


@pytest.mark.usefixtures("alone")
def test_a_budget_that_is_too_small(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text("{listen_addr: '127.0.0.1:1', max_sysmem_mb: 20}")
    assert run(["fit", str(model), "--json"]) == 0
    assert out(capsys)["fit"] == "never"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no such file"), (b"", "x.gguf"), (b"GGUF", "truncated"), (b"<html>", "no GGUF file")],
)
def test_files_that_are_no_models(content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """trap 48"""
    if content is not None:
        Path("x.gguf").write_bytes(content)
    assert run(["fit", "x.gguf"]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


@pytest.mark.usefixtures("alone")
def test_a_truncated_download_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) - 1000])
    assert run(["fit", str(model), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is the download complete?" in json.loads(captured.err)["error"]["message"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--args", "-c 1"], "--args needs a MODEL"),
        (["m", "--args", "-c '1"], "--args:"),
        (["m", "--gpus", "24 apples"], "Write it like --gpus 24GB"),
        (["m", "--gpus", "1,,2"], "Write it like --gpus 24GB"),
    ],
)
def test_wrong_usage(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_an_unknown_name_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fit", "qwen3"]) == 1
    assert "Model 'qwen3' not found" in capsys.readouterr().err


def test_other_commands_do_not_pay_for_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, mesh.cli.parser; print('mesh.engine.footprints' in sys.modules)"],
        capture_output=True, text=True, timeout=30, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout == "False\n"
