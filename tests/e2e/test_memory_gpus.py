"""GPU memory end to end: real nodes and real llama-servers on a machine whose NVIDIA driver plays a script.

What is checked is what the node does with the driver's figures and what it tells its children. That the driver is read
right is checked in ``tests/host``; that llama-server does as it is told needs a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.gpus import Machine, gpu_profile
from tests.e2e.harness import Models, Node, cookbook, eventually, profile
from tests.e2e.memory import budget, fits, on_gpus, wait_learned
from tests.fake_nvml.build import library_dir

#: Another set of arguments, and with it another learned figure, for one more profile of a model.
OTHER_ARGS = "-t 1 -tb 1 -c 8192 -np 2 --no-warmup"
#: The driver gives memory back this long after a process is gone.
LINGER_S = 1.5
MIB = 1 << 20

StartMachine = Callable[..., tuple[Machine, Node]]


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake driver's library, compiled once."""
    return library_dir(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def start_machine(tmp_path: Path, nvml_library: Path) -> Iterator[StartMachine]:
    """Start a node on a machine with GPUs of these sizes, for a cookbook; it is looked after at the end of the test."""
    with ExitStack() as stack:

        def start(
            gpus_mib: tuple[int, ...], models: Mapping[str, Any], *script: str, **config: Any
        ) -> tuple[Machine, Node]:
            machine = Machine(tmp_path / "machine", *gpus_mib, library=nvml_library)
            machine.driver.add(*(script or ("consumers 0",)))
            return machine, stack.enter_context(machine.node(cookbook(models), config))

        yield start


def logged_at(line: Mapping[str, Any]) -> float:
    """Return when *line* was logged."""
    return datetime.fromisoformat(line["timestamp"]).timestamp()


class TestPlacement:
    def test_each_goes_where_it_fits_best(self, models: Models, start_machine: StartMachine) -> None:
        """One GPU if one is enough, and of those the fuller one; what the driver shows becomes the learned figure."""
        machine, node = start_machine(
            (24576, 12288),
            {
                "small": gpu_profile(models.alpha, 6000),
                "large": gpu_profile(models.beta, 16000),
                "bound": gpu_profile(models.gamma, 3000, devices=["0"]),
            },
            max_vram_mb="auto",
        )
        assert {kind: of["capacity_mib"] for kind, of in budget(node)["memory"].items()} == {
            "gpu0": int(24576 * 0.95),
            "gpu1": int(12288 * 0.95),
            "vram": int(24576 * 0.95) + int(12288 * 0.95),
        }
        assert on_gpus(fits(node)["small"]["placement_mib"]) == {"gpu1": 6000}
        for model, place in {"small": 1, "large": 0, "bound": 0}.items():
            assert node.say(model)
            pid = node.instance(model)["pid"]
            assert machine.was_told(pid, "CUDA_VISIBLE_DEVICES") == machine.uuids[place]
            assert machine.argument(pid, "--tensor-split") is None
        assert node.metric("llama_mesh_instance_evictions_total") == 0

        expected = {"small": {"gpu1": 6000}, "large": {"gpu0": 16000}, "bound": {"gpu0": 3000}}

        for model in expected:
            wait_learned(node, model)
        assert {i["model_id"]: on_gpus(i["memory"]) for i in node.instances()} == expected
        assert {i["model_id"]: on_gpus(i["live"]) for i in node.instances()} == expected
        self.check_metrics(node)

        told = {line.split()[0]: line for line in node.cli("ps").stdout.splitlines() if line.split()}
        assert told["gpu0"].split(None, 1)[1] == "19,000 used, 4,347 free of 23,347 MiB"
        assert "gpu1 6,000 MiB" in told["small"]

    def check_metrics(self, node: Node) -> None:
        """The figures above, as Prometheus and llamesh's JSON have them."""
        lines = node.http.get("/metrics").text.splitlines()
        told = dict(line.rsplit(" ", 1) for line in lines if line.startswith("llama_mesh_gpu_memory_"))
        assert {name.removeprefix("llama_mesh_gpu_memory_"): float(value) / MIB for name, value in told.items()} == {
            'used_bytes{kind="gpu0"}': 19000,
            'used_bytes{kind="gpu1"}': 6000,
            'total_bytes{kind="gpu0"}': 24576,
            'total_bytes{kind="gpu1"}': 12288,
        }
        told = node.http.get("/metrics/json").json()["node_resources"]
        assert told["gpu_telemetry_available"] is True
        assert (told["device_vram_used_mb"], told["device_vram_total_mb"]) == (25000, 36864)
        assert (told["llamesh_vram_mb"], told["external_vram_mb"], told["max_vram_mb"]) == (25000, 0, 35020)

    def test_one_that_is_larger_than_any_gpu_is_divided(self, models: Models, start_machine: StartMachine) -> None:
        """In the proportion of the room on each, which is also what is charged; an operator's limits are kept."""
        machine, node = start_machine(
            (24576, 12288),
            {"small": gpu_profile(models.alpha, 4000), "huge": gpu_profile(models.gamma, 27000)},
            max_vram_mb_per_gpu={"0": "20GB", "1": 9000},
        )
        assert {k: of["capacity_mib"] for k, of in budget(node)["memory"].items()} == {"gpu0": 20480, "gpu1": 9000}
        idle = node.prewarm("small")
        assert on_gpus(idle["memory"]) == {"gpu1": 4000}
        assert node.say("huge") == "I am gamma"
        assert idle["pid"] not in node.server_pids()
        huge = node.instance("huge")
        assert machine.was_told(huge["pid"], "CUDA_VISIBLE_DEVICES") == ",".join(machine.uuids)
        charged = on_gpus(huge["memory"])
        assert sum(charged.values()) >= 27000
        assert charged["gpu0"] <= 20480
        assert charged["gpu1"] <= 9000
        split = machine.argument(huge["pid"], "--tensor-split")
        assert split is not None
        shares = [int(share) for share in split.split(",")]
        # the rest of what is charged, the context and the buffers, is there on each of the two
        assert charged["gpu0"] - shares[0] == charged["gpu1"] - shares[1] > 0

        live = eventually(lambda: on_gpus(node.instance("huge")["live"]), what="a sample")
        assert live["gpu0"] / live["gpu1"] == pytest.approx(shares[0] / shares[1], rel=0.001)
        assert max(live["gpu0"] - 20480, live["gpu1"] - 9000) <= 0

    def test_what_is_seen_counts_from_then_on(self, models: Models, start_machine: StartMachine) -> None:
        """A cookbook that says too little is not believed twice, not even after a restart (trap 47)."""
        text = {"modest": gpu_profile(models.alpha, 4000, uses_mib=9000)}
        machine, node = start_machine((12288, 24576), text)
        assert on_gpus(fits(node)["modest"]["placement_mib"]) == {"gpu0": 4000}
        assert node.say("modest")
        pid = node.instance("modest")["pid"]
        wait_learned(node, "modest")
        seen = node.instance("modest")
        assert (seen["pid"], on_gpus(seen["memory"])) == (pid, {"gpu0": 9000})
        node.stop()
        with machine.node(cookbook(text)) as again:
            known = fits(again)["modest"]
            assert (known["source"], known["need_mib"]["vram"]) == ("learned", 9000)

    def test_the_embedded_engine_gets_none(self, models: Models, start_machine: StartMachine) -> None:
        """It is built for CPUs: what it takes is main memory, whatever GPUs there are."""
        _, node = start_machine((24576,), {"alpha": profile(models.alpha)}, llama_cpp={})
        assert node.say("alpha") == "I am alpha"
        assert on_gpus(node.instance("alpha")["memory"]) == {}
        assert fits(node)["alpha"]["need_mib"].keys() == {"ram"}


class TestForeign:
    def test_it_is_waited_for_and_never_evicted(self, models: Models, start_machine: StartMachine) -> None:
        """Trap 42."""
        hog = f"process 0 {os.getpid()} 20000"
        machine, node = start_machine(
            (24576,),
            {
                "alpha": gpu_profile(models.alpha, 3000),
                "beta": gpu_profile(models.beta, 8000),
                "brief": gpu_profile(models.beta, 8000, args=OTHER_ARGS, max_wait_in_queue_ms=500),
            },
            hog,
        )
        assert budget(node)["memory"]["gpu0"]["foreign_mib"] == 20000
        idle = node.prewarm("alpha")
        said = fits(node)["beta"]
        assert (said["fit"], said["evict"]) == ("waits", [])
        refused = node.chat("brief").json()["error"]
        assert "other programs (gpu0 20000 MiB)" in refused["message"]
        assert refused["memory"]["foreign_mib"]["gpu0"] == 20000
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(node.say, "beta")
            eventually(lambda: node.status()["queues"].get("beta:default"), what="beta waits")
            assert node.instances("beta") == []
            machine.driver.remove(hog)
            assert waiting.result(15) == "I am beta"
        assert node.instance("alpha")["pid"] == idle["pid"], "nobody had to go for it"

    def test_a_driver_that_fails_costs_only_news(self, models: Models, start_machine: StartMachine) -> None:
        """Trap 44: the last good figures stay, neither 0 nor everything; logged once, and once that it is over."""
        failure = "error * * 15"
        machine, node = start_machine(
            (24576,),
            {"alpha": gpu_profile(models.alpha, 6000), "beta": gpu_profile(models.beta, 3000)},
            "consumers 0",
            f"process 0 {os.getpid()} 10000",
        )
        node.prewarm("alpha")
        eventually(lambda: on_gpus(node.instance("alpha")["live"]) == {"gpu0": 6000}, what="a sample with alpha")
        good = budget(node)
        machine.driver.add(failure)
        assert node.say("beta") == "I am beta"  # its start makes the node sample often
        (line,) = node.wait_log("GPU is lost")
        assert line["level"] == "WARNING"
        assert node.say("alpha") == "I am alpha"
        now = budget(node)
        assert now["devices"]["gpus"] == good["devices"]["gpus"]
        assert now["memory"]["gpu0"]["capacity_mib"] == 24576
        assert now["memory"]["gpu0"]["foreign_mib"] == 10000
        assert now["memory"]["gpu0"]["used_mib"] == 9000
        machine.driver.remove(failure)
        node.unload("beta")
        eventually(lambda: not budget(node)["devices"]["problems"], what="the driver is read again")
        assert [line["level"] for line in node.wait_log("GPU is lost", count=2)] == ["WARNING", "INFO"]

    def test_a_driver_that_hangs_keeps_nobody_waiting(self, models: Models, start_machine: StartMachine) -> None:
        """Traps 44, 108: neither a start, nor an answer, nor the end of the node."""
        machine, node = start_machine(
            (24576,), {"alpha": gpu_profile(models.alpha, 6000), "beta": gpu_profile(models.beta, 3000)}
        )
        node.prewarm("alpha")
        machine.driver.add("error nvmlDeviceGetMemoryInfo_v2 * hang")
        asked_at = time.monotonic()
        assert node.say("beta") == "I am beta"
        assert node.say("alpha") == "I am alpha"
        assert budget(node)["memory"]["gpu0"]["used_mib"] == 9000
        node.stop()
        assert time.monotonic() - asked_at < 8.0


def test_a_load_waits_until_evicted_memory_is_back(models: Models, start_machine: StartMachine) -> None:
    """Trap 43: the driver frees late, and says so; what follows comes as soon as it does."""
    machine, node = start_machine(
        (12288,),
        {"alpha": gpu_profile(models.alpha, 8000), "beta": gpu_profile(models.beta, 8000)},
        f"consumers {round(LINGER_S * 1000)}",
    )
    assert node.say("alpha") == "I am alpha"
    eventually(lambda: on_gpus(node.instance("alpha")["live"]), what="a sample with alpha")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(node.say, "beta")
        (gone,) = node.wait_log('"message":"instance stopped"')
        assert budget(node)["memory"]["gpu0"]["used_mib"] >= 8000, "still charged to the one that is gone"
        assert answer.result(20) == "I am beta"
    started = node.wait_log('"message":"instance started"', count=2)[-1]
    assert started["fields"]["model"] == "beta"
    waited_s = logged_at(started) - logged_at(gone)
    assert LINGER_S * 0.9 < waited_s < LINGER_S + 1.5
    assert machine.starts() == 2
    assert budget(node)["memory"]["gpu0"]["foreign_mib"] == 0


def test_a_program_that_starts_meanwhile_is_not_taken_for_it(models: Models, start_machine: StartMachine) -> None:
    """Traps 42, 43: the driver lists it, so what it takes is not the memory of the one that is gone."""
    machine, node = start_machine(
        (12288,),
        {"alpha": gpu_profile(models.alpha, 8000), "beta": gpu_profile(models.beta, 8000)},
        f"consumers {round(LINGER_S * 1000)}",
    )
    assert node.say("alpha") == "I am alpha"
    eventually(lambda: on_gpus(node.instance("alpha")["live"]), what="a sample with alpha")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(node.say, "beta")
        node.wait_log('"message":"instance stopped"')
        machine.driver.add(f"process 0 {os.getpid()} 2000")
        assert answer.result(6) == "I am beta"
    eventually(lambda: budget(node)["memory"]["gpu0"]["foreign_mib"] == 2000, what="it is counted as foreign")


def test_the_memory_of_several_comes_back_together(models: Models, start_machine: StartMachine) -> None:
    """Trap 43: who left at the same moment is not taken for another program that uses as much."""
    _, node = start_machine(
        (24576,),
        {
            **{f"small{n}": gpu_profile(models.alpha, 5000, args=f"{OTHER_ARGS} --alias {n}") for n in range(4)},
            "large": gpu_profile(models.beta, 20000),
        },
    )
    for n in range(4):
        node.prewarm(f"small{n}")
    asked_at = time.monotonic()
    assert node.say("large") == "I am beta"
    assert time.monotonic() - asked_at < 6.0, "the ten seconds after which lost memory is given up"
    assert not node.log("did not come back")


class TestOutOfMemory:
    def test_it_gets_what_idles_there_and_one_more_try(self, models: Models, start_machine: StartMachine) -> None:
        """Trap 46: by the figures both fit, but the load finds the GPU full. The one on the other GPU stays."""
        machine, node = start_machine(
            (24576, 12288),
            {
                "idle": gpu_profile(models.alpha, 8000, devices=["0"]),
                "aside": gpu_profile(models.alpha, 8000, args=OTHER_ARGS, devices=["1"]),
                "tight": gpu_profile(models.beta, 8000, devices=["0"], out_of_memory=1),
            },
        )
        idle, aside = node.prewarm("idle"), node.prewarm("aside")
        asked_at = time.monotonic()
        assert node.say("tight") == "I am beta"
        assert time.monotonic() - asked_at < 6.0
        assert idle["pid"] not in node.server_pids()
        assert aside["pid"] in node.server_pids()
        assert machine.starts() == 4
        assert len(node.log("a load ran out of memory")) == 1
        assert node.metric("llama_mesh_instance_evictions_total") == 1
        assert node.metric("llama_mesh_instance_spawn_failures_total") == 1
        assert node.status()["failures"] == {}

    def test_the_second_time_it_fails_with_the_log(self, models: Models, start_machine: StartMachine) -> None:
        """Trap 46: even if there is somebody else who could go, and who stays."""
        machine, node = start_machine(
            (24576, 12288),
            {
                "idle": gpu_profile(models.alpha, 8000, devices=["0"]),
                "aside": gpu_profile(models.alpha, 8000, args=OTHER_ARGS, devices=["1"]),
                "doomed": gpu_profile(models.beta, 8000, devices=["0"], out_of_memory=9),
            },
        )
        idle, aside = node.prewarm("idle"), node.prewarm("aside")
        response = node.chat("doomed")
        assert response.status_code == 503
        message = response.json()["error"]["message"]
        assert "cudaMalloc failed: out of memory" in message.splitlines()[0]
        assert "last log lines:" in message
        assert "unable to allocate CUDA0 buffer" in message
        assert machine.starts() == 4
        assert idle["pid"] not in node.server_pids()
        assert aside["pid"] in node.server_pids()
        assert node.say("idle") == "I am alpha"

    def test_with_nobody_to_evict_it_fails_at_once(self, models: Models, start_machine: StartMachine) -> None:
        machine, node = start_machine((24576,), {"doomed": gpu_profile(models.beta, 8000, out_of_memory=9)})
        assert "out of memory" in node.chat("doomed").json()["error"]["message"]
        assert machine.starts() == 1
