"""One attempt from the fetch to the swap, with real git, cmake and ninja: what it does, and what it leaves alone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.build import layout
from mesh.build.rejected import RejectedError
from mesh.build.status import Attempt, Outcome, Stage
from mesh.errors import BuildError
from tests.build.project import (
    BROKEN,
    GOOD,
    MODEL,
    Project,
    bench,
    directories,
    hanging_at,
    live,
    pid_from,
    spec_in,
    until,
)
from tests.build_project import make_repository, small_disk
from tests.host.deaths import wait_for_death


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "upstream")


def _run(binary: Path) -> str:
    return subprocess.run([binary], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


async def test_the_first_build_is_put_in_force(tmp_path: Path, project: Project) -> None:
    """All llamesh's default places are within repo_path, which is not there yet."""
    commit, spec = project.commit(), spec_in(tmp_path, project)
    async with bench(spec) as b:
        ended = await b.rebuild()
    assert (ended.outcome, ended.commit, ended.error) == (Outcome.INSTALLED, commit, None)
    assert (ended.comparisons, ended.notes, ended.stage) == ((MODEL,), ("a note",), Stage.INSTALLING)
    directory = spec.build_path.with_name(f"build-{commit[:7]}")
    assert os.readlink(spec.binary_path) == f"{directory}/bin/llama-server"
    assert _run(spec.binary_path) == "version: 1"
    assert b.installed == ["default"]
    assert b.tester.asked == [(directory / "bin/llama-server", None)]
    assert directories(spec) == {directory.name}, "neither sources nor a half clone"
    written = json.loads((directory / "mesh-build.json").read_text())
    assert (written["build"], written["commit"], written["ref"]) == ("default", commit, "master")
    assert written["comparisons"][0]["new"]["decode_tps"] == 100.0
    assert not (directory / "mesh-building.json").exists()


async def test_a_new_commit_replaces_the_old_one_and_the_same_one_drains_nothing(
    tmp_path: Path, project: Project
) -> None:
    """trap 89."""
    project.commit()
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        first = await b.install()
        project.commit()
        second = await b.install()
        assert second != first
        assert b.tester.asked[-1] == (second / layout.BINARY, first / layout.BINARY)
        ended = await b.rebuild()
        assert ended.outcome is Outcome.UNCHANGED
        assert len(b.tester.asked) == len(b.installed) == 2
        assert _run(spec.binary_path) == "version: 2"


async def test_a_failed_compilation_keeps_what_runs_and_shows_the_end_of_its_log(
    tmp_path: Path, project: Project
) -> None:
    """Trap 90. By itself the node does not try that commit again; by hand it does."""
    project.commit()
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        good = await b.install()
        bad = project.commit(BROKEN)
        ended = await b.rebuild()
        assert (ended.outcome, ended.stage) == (Outcome.FAILED, Stage.COMPILING)
        assert ended.exit_status in (1, 3), "newer ninjas pass the status of the step on"
        assert ended.error is not None
        assert ended.error.startswith(f"command failed (exit status: {ended.exit_status}): ")
        assert "cmake --build" in ended.error
        assert len(ended.log_tail) == 40
        assert "line 60" in ended.log_tail
        assert "line 20" not in ended.log_tail
        assert live(spec) == good
        assert _run(spec.binary_path) == "version: 1"
        assert directories(spec) == {good.name}
        assert list(b.manager.statuses()[0].held) == [bad]
        assert b.manager.statuses()[0].live_commit != bad
        assert (await b.rebuild()).outcome is Outcome.FAILED
        assert (await _by_itself(b.manager)).outcome is Outcome.SKIPPED
        assert b.manager.statuses()[0].last_error == ended.error, "what is skipped is still broken"
        assert b.installed == ["default"]


async def _by_itself(manager: object) -> Attempt:
    """Let the attempt at boot happen, and return it."""
    from mesh.build.manager import BuildManager

    assert isinstance(manager, BuildManager)
    events = manager.subscribe()
    manager.start()
    started = await until(events, "started")
    return await manager.wait(int(str(started.data["attempt"])))


async def test_other_arguments_lift_what_is_held(tmp_path: Path, project: Project) -> None:
    project.commit(BROKEN)
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        await b.rebuild()
    async with bench(replace(spec, build_args=("-DFANCY=ON",))) as b:
        assert (await _by_itself(b.manager)).outcome is Outcome.FAILED


async def test_a_rejected_build_is_kept_but_not_put_in_force(tmp_path: Path, project: Project) -> None:
    project.commit()
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        good = await b.install()
        slow = project.commit()
        b.tester.error = RejectedError("40 % slower", log_tail=("t",), comparisons=(MODEL,))
        ended = await b.rebuild()
        assert (ended.outcome, ended.error, ended.log_tail) == (Outcome.REJECTED, "40 % slower", ("t",))
        assert ended.comparisons == (MODEL,)
        assert live(spec) == good
        assert b.manager.statuses()[0].held == {slow: "40 % slower"}
        b.tester.error = None
        (spec.build_path.with_name(f"build-{slow[:7]}") / "not compiled again").touch()
        by_hand = await b.rebuild()
        assert by_hand.outcome is Outcome.INSTALLED
        assert (live(spec) / "not compiled again").exists()
        assert b.manager.statuses()[0].held == {}


async def test_one_rejection_after_the_other_does_not_fill_the_disk(tmp_path: Path, project: Project) -> None:
    project.commit()
    spec = spec_in(tmp_path, project, keep_builds=1)
    async with bench(spec) as b:
        first = await b.install()
        project.commit()
        good = await b.install()
        b.tester.error = RejectedError("40 % slower")
        for _ in range(3):
            project.commit()
            assert (await b.rebuild()).outcome is Outcome.REJECTED
        assert directories(spec) == {first.name, good.name}, "what a rollback goes to, and what is live"


async def test_what_follows_a_rejection_cannot_change_it(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise OSError("an I/O error")

    commit = project.commit()
    async with bench(spec_in(tmp_path, project)) as b:
        b.tester.error = RejectedError("40 % slower")
        monkeypatch.setattr("mesh.build.install.prune", fails)
        assert (await b.rebuild()).error == "40 % slower"
        assert b.manager.statuses()[0].held == {commit: "40 % slower"}


@pytest.mark.parametrize("live_one", [True, False])
async def test_what_does_not_run_any_more_is_built_anew(tmp_path: Path, project: Project, live_one: bool) -> None:
    """As after an upgrade of the system that took a library away. What instances run from is not touched."""
    commit, spec = project.commit(), spec_in(tmp_path, project)
    async with bench(spec) as b:
        broken = await b.install()
        if not live_one:
            project.commit()
            await b.install()
        (broken / layout.BINARY).write_text("#!/bin/sh\necho libcuda.so: cannot open shared object file\nexit 127\n")
        ended = await b.rebuild(ref=commit)
        assert ended.outcome is Outcome.INSTALLED
        assert live(spec).name == f"build.2-{commit[:7]}"
        assert _run(spec.binary_path) == "version: 1"
        assert (await b.rebuild(ref=commit)).outcome is Outcome.UNCHANGED
        assert "exit 127" in (broken / layout.BINARY).read_text()


async def test_cancel_in_the_middle_of_a_compilation(tmp_path: Path, project: Project) -> None:
    project.commit()
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        good = await b.install()
        project.commit(hanging_at(tmp_path / "fifo"))
        attempt = b.manager.rebuild(None)
        pid = await pid_from(tmp_path / "fifo")
        current = b.manager.statuses()[0].current
        assert current is not None
        assert current.stage is Stage.COMPILING
        assert b.manager.cancel("default")
        assert b.manager.cancel("default"), "a second time does no harm"
        ended = await b.manager.wait(attempt.id)
        wait_for_death(pid)
        assert ended.outcome is Outcome.CANCELLED
        assert live(spec) == good
        assert directories(spec) == {good.name}
        assert b.manager.statuses()[0].held == {}
        assert not b.manager.cancel("default")


async def test_closing_the_manager_ends_what_it_started(tmp_path: Path, project: Project) -> None:
    project.commit(hanging_at(tmp_path / "fifo"))
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        b.manager.start()
        pid = await pid_from(tmp_path / "fifo")
    wait_for_death(pid)
    assert directories(spec) == set()
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_a_cancelled_attempt_that_never_began_lets_the_lock_go(tmp_path: Path, project: Project) -> None:
    project.commit()
    async with bench(spec_in(tmp_path, project)) as b:
        attempt = b.manager.rebuild(None)
        assert b.manager.cancel(None)
        assert (await b.manager.wait(attempt.id)).outcome is Outcome.CANCELLED
        assert (await b.rebuild()).outcome is Outcome.INSTALLED


@pytest.mark.parametrize("leftover", ["marker", "nothing", "manifest without a binary", "damaged manifest"])
async def test_a_half_built_directory_is_built_anew(tmp_path: Path, project: Project, leftover: str) -> None:
    """As a killed node, or a full disk, leaves it: also with a binary that looks finished, and half of the sources."""
    commit, spec = project.commit(), spec_in(tmp_path, project)
    directory = spec.build_path.with_name(f"build-{commit[:7]}")
    binary = directory / layout.BINARY
    manifest = layout.Manifest("default", commit)
    layout.begin(directory, manifest)
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\necho half\n")
    binary.chmod(0o755)
    if leftover == "nothing":
        (directory / layout.MARKER).unlink()
    elif leftover == "manifest without a binary":
        layout.finish(directory, manifest)
        binary.unlink()
    elif leftover == "damaged manifest":
        (directory / layout.MANIFEST).write_bytes(b"\0" * 100)
    (directory / "leftover.o").touch()
    source = directory.with_name(f"{directory.name}.src")
    source.mkdir()
    (source / "CMakeLists.txt").write_text("message(FATAL_ERROR old)")
    async with bench(spec) as b:
        assert await b.install() == directory
    assert not (directory / "leftover.o").exists()
    assert _run(spec.binary_path) == "version: 1"
    assert directories(spec) == {directory.name}


async def test_what_llamesh_made_is_adopted(tmp_path: Path, project: Project) -> None:
    """The live one is left alone; what is known of its arguments is nothing, and that is said."""
    commit, spec = project.commit(), spec_in(tmp_path, project, build_args=("-DFANCY=ON",))
    binary = spec.build_path.with_name(f"build-{commit[:7]}") / layout.BINARY
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\necho llamesh\n")
    binary.chmod(0o755)
    layout.swap(spec, binary)
    async with bench(spec) as b:
        ended = await b.rebuild()
        assert ended.outcome is Outcome.UNCHANGED
        assert "--force" in ended.notes[0]
        forced = await b.install(force=True)
        assert forced.name == f"build.2-{commit[:7]}"
        assert _run(binary) == "llamesh"
        went_back = await b.manager.rollback("default")
        assert (went_back.binary, went_back.commit) == (str(binary), commit[:7])


async def test_force_compiles_again_beside_what_is_live(tmp_path: Path, project: Project) -> None:
    commit, spec = project.commit(), spec_in(tmp_path, project)
    async with bench(spec) as b:
        await b.install()
        forced = await b.install(force=True)
        assert forced.name == f"build.2-{commit[:7]}"
        assert (await b.rebuild()).outcome is Outcome.UNCHANGED
        assert (await b.install(force=True)).name == f"build.3-{commit[:7]}", "the first is what a rollback goes to"


async def test_other_arguments_go_to_another_directory(tmp_path: Path, project: Project) -> None:
    commit, spec = project.commit(), spec_in(tmp_path, project)
    fancy = replace(spec, build_args=("-DFANCY=ON",))
    async with bench(spec) as b:
        plain = await b.install()
    async with bench(fancy) as b:
        other = await b.install()
        assert other.name == f"build.2-{commit[:7]}"
        assert "FANCY:BOOL=ON" in (other / "CMakeCache.txt").read_text()
    async with bench(spec) as b:
        (plain / "not compiled again").touch()
        assert await b.install() == plain, "both are kept, and known by their arguments"
        assert (plain / "not compiled again").exists()


async def test_branch_tag_and_commit(tmp_path: Path, project: Project) -> None:
    first = project.commit()
    project.git("tag", "-a", "b1", "-m", "an annotated tag")
    second = project.commit()
    project.git("branch", "side/way")
    third = project.commit()
    async with bench(spec_in(tmp_path, project)) as b:
        for ref, commit in (
            ("b1", first),
            ("side/way", second),
            ("master", third),
            (first, first),
            (second[:8], second),
        ):
            ended = await b.rebuild(ref=ref)
            assert (ended.outcome, ended.commit, ended.ref) == (Outcome.INSTALLED, commit, ref), ended
        unknown = await b.rebuild(ref="b2")
        assert unknown.outcome is Outcome.FAILED
        assert "no branch or tag 'b2'" in str(unknown.error)
        assert "no branch, tag or commit 'abcdef0'" in str((await b.rebuild(ref="abcdef0")).error)
        assert "is no branch" in str((await b.rebuild(ref="--upload-pack=touch /tmp/x")).error)


async def test_offline_a_known_commit_is_built_and_a_branch_says_what_is_wrong(
    tmp_path: Path, project: Project
) -> None:
    commit, spec = project.commit(), spec_in(tmp_path, project)
    async with bench(spec) as b:
        await b.install()
        project.path.rename(tmp_path / "gone")
        ended = await b.rebuild()
        assert ended.outcome is Outcome.FAILED
        assert f"git ls-remote failed (exit status: 128) for {project.path}" in str(ended.error)
        assert "does not appear to be a git repository" in str(ended.error)
        assert (await b.rebuild(ref=commit)).outcome is Outcome.UNCHANGED
        assert b.manager.statuses()[0].held == {}


async def test_what_the_operator_has_in_the_repository_survives(tmp_path: Path, project: Project) -> None:
    """Edits, a branch that is checked out, its index, another origin and hooks."""
    project.commit()
    spec = spec_in(tmp_path, project)
    project.git("clone", "--quiet", str(project.path), str(spec.repo_path))
    mine = Project.__new__(Project)
    mine.path = spec.repo_path
    mine.git("checkout", "--quiet", "-b", "mine")
    mine.git("remote", "set-url", "origin", "/nowhere")
    mine.git("tag", "b1")
    (spec.repo_path / "compile.sh").write_text("exit 1 # my edit\n")
    (spec.repo_path / "new file").write_text("staged")
    mine.git("add", "new file")
    hook = spec.repo_path / ".git/hooks/post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/hooked\n")
    hook.chmod(0o755)
    before = _of_operator(mine)
    new = project.commit()
    project.git("tag", "b1")
    async with bench(spec) as b:
        await b.install()
        assert (await b.rebuild(ref="b1")).outcome is Outcome.UNCHANGED
    assert live(spec).name == f"build-{new[:7]}"
    assert _run(spec.binary_path) == "version: 2"
    assert _of_operator(mine) == before
    assert not (tmp_path / "hooked").exists()
    assert mine.git("worktree", "list").count("\n") == 0


def _of_operator(repository: Project) -> tuple[str, ...]:
    status = repository.git("status", "--short", "--untracked-files=no")
    refs = repository.git("for-each-ref", "refs/heads", "refs/tags", "refs/remotes")
    return (status, refs, repository.git("diff"), repository.git("rev-parse", "--abbrev-ref", "HEAD"))


async def test_submodules_come_along(tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Project(tmp_path / "part")
    part.commit()
    project.commit()
    project.git("-c", "protocol.file.allow=always", "submodule", "add", "--quiet", str(part.path), "part")
    project.commit("test -f $(dirname $0)/part/CMakeLists.txt && " + GOOD.format(version=7))
    for name, value in (("COUNT", "1"), ("KEY_0", "protocol.file.allow"), ("VALUE_0", "always")):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        await b.install()
    assert _run(spec.binary_path) == "version: 7"
    assert directories(spec) == {live(spec).name}


async def test_a_file_where_the_link_should_be_is_never_replaced(tmp_path: Path, project: Project) -> None:
    project.commit()
    spec = spec_in(tmp_path, project)
    spec.binary_path.parent.mkdir(parents=True)
    spec.binary_path.write_text("somebody's own")
    async with bench(spec) as b:
        ended = await b.rebuild()
    assert ended.outcome is Outcome.FAILED
    assert "is not a symlink" in str(ended.error)
    assert (ended.stage, ended.commit, b.tester.asked) == (Stage.WAITING, None, []), "before hours of work"
    assert spec.binary_path.read_text() == "somebody's own"
    assert b.installed == []


async def test_a_full_disk_is_nobodys_bad_commit(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here that of the compilers' temporary files: to remove builds would not help."""
    temporary = tmp_path / "temporary"
    monkeypatch.setenv("TMPDIR", str(temporary))
    project.commit()
    spec = spec_in(tmp_path, project)
    async with bench(spec) as b:
        good = await b.install()
        project.commit(f"echo 'fatal error: error writing to {temporary}/x.s: No space left on device'\nexit 1\n")
        ended = await b.rebuild()
        assert ended.outcome is Outcome.FAILED
        assert f"the disk of the temporary directory {temporary} is full: free some space there" in str(ended.error)
        assert "set TMPDIR" in str(ended.error)
        assert "keep_builds" not in str(ended.error)
        assert any("No space left" in line for line in ended.log_tail)
        assert b.manager.statuses()[0].held == {}
        assert directories(spec) == {good.name}


async def test_a_disk_that_fills_up_while_it_compiles(tmp_path: Path) -> None:
    """What was half-built goes, so that what runs can write again."""
    upstream = make_repository(tmp_path / "llama.cpp")
    upstream.commit()
    with small_disk(tmp_path / "small", 24) as disk:
        project = Project.__new__(Project)
        project.path = upstream.path
        spec = spec_in(disk, project)
        async with bench(spec) as b:
            good = await b.install()
            free = shutil.disk_usage(disk).free
            upstream.commit(fill_mib=64)
            ended = await b.rebuild()
            assert ended.outcome is Outcome.FAILED
            full = f"the disk of {spec.build_path.parent} is full: free some space, or lower keep_builds"
            assert full in str(ended.error), ended
            assert b.manager.statuses()[0].held == {}
            assert directories(spec) == {good.name}
            assert shutil.disk_usage(disk).free > free - 2**20
            upstream.commit()
            await b.install()


async def test_the_first_error_of_the_compiler_is_told(tmp_path: Path, project: Project) -> None:
    project.commit("echo 'x.cpp:7:1: error: expected a semicolon'; echo 'x.cpp:9:1: error: another'; exit 1\n")
    async with bench(spec_in(tmp_path, project)) as b:
        ended = await b.rebuild()
        assert str(ended.error).endswith("--config Release; x.cpp:7:1: error: expected a semicolon")
        assert list(b.manager.statuses()[0].held.values()) == [ended.error]


async def test_a_compiler_that_was_killed_for_memory_is_tried_again(tmp_path: Path, project: Project) -> None:
    project.commit("echo 'g++: fatal error: Killed signal terminated program cc1plus'\nexit 1\n")
    async with bench(spec_in(tmp_path, project)) as b:
        ended = await b.rebuild()
        assert "ran out of memory; compile less at once" in str(ended.error)
        assert b.manager.statuses()[0].held == {}


async def test_a_build_without_a_server_is_an_error(tmp_path: Path, project: Project) -> None:
    project.commit("touch $1\n")
    async with bench(spec_in(tmp_path, project)) as b:
        assert "made no bin/llama-server" in str((await b.rebuild()).error)


async def test_an_error_of_the_tester_that_is_no_verdict_is_not_held(tmp_path: Path, project: Project) -> None:
    project.commit()
    async with bench(spec_in(tmp_path, project)) as b:
        b.tester.error = BuildError("cannot write the tiny model")
        assert (await b.rebuild()).outcome is Outcome.FAILED
        assert b.manager.statuses()[0].held == {}


async def test_without_cmake_it_is_said_how_to_get_it(
    tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.commit()
    (tmp_path / "path").mkdir()
    (tmp_path / "path/git").symlink_to("/usr/bin/git")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr("sys.executable", os.fspath(tmp_path / "path/python"))
    monkeypatch.setattr("mesh.host.process._tied_to_us", list)
    monkeypatch.setattr("mesh.host.warden.Warden.start", lambda self: None)
    monkeypatch.setattr("mesh.host.warden.Warden._update", lambda self, message: None)
    async with bench(spec_in(tmp_path, project)) as b:
        ended = await b.rebuild()
    assert "pip install 'llama-mesh[build]'" in str(ended.error), ended


async def test_without_a_compiler_it_is_said_what_to_install(tmp_path: Path, project: Project) -> None:
    project.commit()
    missing = ("-DGGML_CUDA=ON", "-DCMAKE_PROJECT_INCLUDE=missing.cmake")
    (project.path / "missing.cmake").write_text('message(FATAL_ERROR "CUDA Toolkit not found")')
    project.commit()
    async with bench(spec_in(tmp_path, project, build_args=missing)) as b:
        ended = await b.rebuild()
        assert (ended.outcome, ended.exit_status, ended.stage) == (Outcome.FAILED, 1, Stage.CONFIGURING)
        assert "CMake Error at missing.cmake:1 (message): CUDA Toolkit not found; install" in str(ended.error)
        assert "install the CUDA toolkit, or take -DGGML_CUDA=ON out" in str(ended.error), ended
        assert b.manager.statuses()[0].held == {}, "another time there may be one"


async def test_a_repository_around_us_is_not_taken_for_ours(tmp_path: Path, project: Project) -> None:
    """The node may be started within some other checkout, with git's variables of a hook set."""
    project.commit()
    around = Project(tmp_path / "around")
    around.commit(BROKEN)
    before = around.git("for-each-ref")
    spec = spec_in(around.path, project)
    spec.repo_path.mkdir()
    async with bench(spec) as b:
        os.environ["GIT_DIR"] = str(around.path / ".git")
        try:
            await b.install()
        finally:
            del os.environ["GIT_DIR"]
    assert around.git("for-each-ref") == before


async def test_passwords_in_the_url_are_not_shown(tmp_path: Path, project: Project) -> None:
    url = "http://me:s3cret@127.0.0.1:1/llama.cpp"
    async with bench(replace(spec_in(tmp_path, project), repo_url=url)) as b:
        events = b.manager.subscribe()
        ended = await b.rebuild()
        b.manager._events.close()
        shown = [ended, *b.manager.statuses(), *[event async for event in events]]
    assert "http://127.0.0.1:1/llama.cpp" in str(ended.error)
    assert "s3cret" not in repr(shown)
