"""What a ref means, whatever is in the local repository already, and what a killed git leaves there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.build import state
from mesh.build.command import Surroundings
from mesh.build.lock import BuildLock
from mesh.build.repository import Repository, lock_path
from mesh.build.spec import BuildSpec
from mesh.errors import BuildError
from mesh.host.warden import Warden
from mesh.tasks import spawn
from tests.build.project import Project, spec_in


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "upstream")


@pytest.fixture
def around() -> Iterator[Surroundings]:
    warden = Warden()
    yield Surroundings(lambda: os.environ, warden)
    warden.close()


@pytest.fixture
def spec(tmp_path: Path, project: Project) -> BuildSpec:
    return spec_in(tmp_path, project)


def _repository(spec: BuildSpec, around: Surroundings) -> Repository:
    return Repository(spec, around, print)


async def test_a_branch_before_a_tag_of_the_same_name(spec: BuildSpec, around: Surroundings, project: Project) -> None:
    tagged = project.commit()
    project.git("tag", "same")
    branch = project.commit()
    project.git("branch", "same")
    repository = _repository(spec, around)
    assert (await repository.find("same")).commit == branch
    assert (await repository.find("refs/tags/same")).commit == tagged


async def test_moved_branches_and_tags(spec: BuildSpec, around: Surroundings, project: Project) -> None:
    """As after a forced push, which is no fast-forward."""
    project.commit()
    project.git("tag", "-a", "latest", "-m", "1")
    repository = _repository(spec, around)
    await repository.find("master")
    project.git("commit", "--quiet", "--amend", "-m", "rewritten")
    project.git("tag", "--force", "-a", "latest", "-m", "2")
    head = project.git("rev-parse", "HEAD")
    found = await repository.find("master")
    assert (found.commit, found.short) == (head, head[:7])
    assert (await repository.find("latest")).commit == head


async def test_a_branch_that_became_a_directory(spec: BuildSpec, around: Surroundings, project: Project) -> None:
    first = project.commit()
    project.git("branch", "a")
    repository = _repository(spec, around)
    await repository.find("a")
    second = project.commit()
    project.git("branch", "-D", "a")
    project.git("branch", "a/b")
    assert (await repository.find("a/b")).commit == second
    assert (await repository.find(first[:9])).commit == first


@pytest.mark.parametrize("ask", ["refs/pull/7/head", "pull/7/head", "the hash", "its beginning", "the hash, known"])
async def test_a_strangers_commit_is_had_by_no_name(
    spec: BuildSpec, around: Surroundings, project: Project, ask: str
) -> None:
    """As on GitHub, where anybody puts commits under a repository's URL: by a pull request, or in a fork."""
    project.commit()
    project.git("config", "uploadpack.allowAnySHA1InWant", "true")
    repository = _repository(spec, around)
    await repository.find("master")
    theirs = project.commit()
    project.git("update-ref", "refs/pull/7/head", theirs)
    project.git("reset", "--quiet", "--hard", "HEAD~1")
    if ask == "the hash, known":
        await _repository(replace(spec, ref="refs/pull/7/head"), around).find("refs/pull/7/head")
    wanted = {"the hash": theirs, "its beginning": theirs[:9], "the hash, known": theirs}.get(ask, ask)
    with pytest.raises(BuildError, match=r"no branch|on no branch") as caught:
        await repository.find(wanted)
    if ask == "the hash, known":
        assert "Set llama_cpp.branch to it" in caught.value.message
    assert theirs not in _ours(spec) or ask == "the hash, known"


def _ours(spec: BuildSpec) -> str:
    repository = Project.__new__(Project)
    repository.path = spec.repo_path
    return repository.git("for-each-ref", "--format=%(objectname)", "refs/llama-mesh")


async def test_what_is_configured_may_be_anything(spec: BuildSpec, around: Surroundings, project: Project) -> None:
    project.commit()
    request = project.commit()
    project.git("update-ref", "refs/pull/7/head", request)
    project.git("reset", "--quiet", "--hard", "HEAD~1")
    pull = _repository(replace(spec, ref="refs/pull/7/head"), around)
    assert (await pull.find("refs/pull/7/head")).commit == await pull.tip("refs/pull/7/head") == request
    project.git("config", "uploadpack.allowAnySHA1InWant", "true")
    hidden = project.commit()
    project.git("reset", "--quiet", "--hard", "HEAD~1")
    by_hash = _repository(replace(spec, ref=hidden), around)
    assert (await by_hash.find(hidden)).commit == await by_hash.tip(hidden) == hidden


async def test_head_and_commits_of_the_past_of_branches_and_tags(
    spec: BuildSpec, around: Surroundings, project: Project
) -> None:
    first = project.commit()
    tagged = project.commit()
    project.git("tag", "-a", "b1", "-m", "1")
    project.git("reset", "--quiet", "--hard", first)
    head = project.commit()
    repository = _repository(spec, around)
    assert (await repository.find("HEAD")).commit == await repository.tip("HEAD") == head
    assert await repository.tip("b1") == tagged
    for commit in (first, tagged, tagged[:9]):
        assert (await repository.find(commit)).commit == commit or commit == tagged[:9]
    project.path.rename(project.path.with_name("gone"))
    for commit in (first, tagged, head):
        assert (await repository.find(commit)).commit == commit, "what is known needs no network"


async def test_what_was_here_already_is_known_as_the_branchs(
    spec: BuildSpec, around: Surroundings, project: Project
) -> None:
    """In a clone of the operator's nothing need be fetched."""
    commit = project.commit()
    project.git("clone", "--quiet", str(project.path), str(spec.repo_path))
    repository = _repository(spec, around)
    await repository.find("master")
    assert commit in _ours(spec), "it is kept from being collected as garbage"
    project.path.rename(project.path.with_name("gone"))
    assert (await repository.find(commit)).commit == commit


async def test_two_builds_of_two_forks_share_a_repository(
    spec: BuildSpec, around: Surroundings, project: Project, tmp_path: Path
) -> None:
    ours = project.commit()
    fork = Project(tmp_path / "fork")
    theirs = fork.commit("echo something else\n")
    other = replace(spec, name="my.fork", repo_url=str(fork.path))
    assert (await _repository(spec, around).find("master")).commit == ours
    assert (await _repository(other, around).find("master")).commit == theirs
    assert (await _repository(spec, around).find("master")).commit == ours


async def test_what_a_killed_git_left_is_no_hindrance(spec: BuildSpec, around: Surroundings, project: Project) -> None:
    """Half a repository, a locked ref, half a worktree that git believes is still being made."""
    project.commit()
    (spec.repo_path / ".git" / "refs").mkdir(parents=True)
    (spec.repo_path / ".git" / "HEAD").write_text("ref: refs/heads/master\n")
    repository = _repository(spec, around)
    await repository.find("master")
    project.commit()
    second = await repository.find("master")
    (spec.repo_path / ".git/refs/llama-mesh/default/head.lock").touch()
    third = project.commit()
    assert (await repository.find("master")).commit == third
    source = spec.build_path.with_name("build-1234567.src")
    await repository.lay_out(second.commit, source)
    (worktree,) = (spec.repo_path / ".git/worktrees").iterdir()
    (worktree / "locked").write_text("initializing")
    (worktree / "index.lock").touch()
    (source / "CMakeLists.txt").unlink()
    await repository.lay_out(third, source)
    assert (source / "CMakeLists.txt").exists()
    await repository.remove(source)
    assert not source.exists()
    assert not list((spec.repo_path / ".git").glob("worktrees/*"))


async def test_a_worktree_of_the_operators_stays_registered(
    spec: BuildSpec, around: Surroundings, project: Project, tmp_path: Path
) -> None:
    """Even if its directory is not there now, as on a disk that is not mounted."""
    commit = project.commit()
    repository = _repository(spec, around)
    await repository.find("master")
    theirs = Project.__new__(Project)
    theirs.path = spec.repo_path
    theirs.git("worktree", "add", "--quiet", "--detach", str(tmp_path / "theirs"), commit)
    (tmp_path / "theirs").rename(tmp_path / "unmounted")
    source = spec.build_path.with_name("build-1234567.src")
    await repository.lay_out(commit, source)
    await repository.remove(source)
    (tmp_path / "unmounted").rename(tmp_path / "theirs")
    assert "theirs" in theirs.git("worktree", "list")


async def test_a_first_fetch_that_fails_is_tried_again(
    spec: BuildSpec, around: Surroundings, project: Project, tmp_path: Path
) -> None:
    repository = _repository(replace(spec, repo_url=str(tmp_path / "missing")), around)
    with pytest.raises(BuildError, match=r"git ls-remote failed \(exit status: 128\) .*does not (exist|appear)") as e:
        await repository.find("master")
    assert e.value.exit_status == 128
    left = {path.name for path in spec.repo_path.parent.iterdir()}
    assert left == {"upstream", "llama.cpp", ".llama.cpp.git.lock"}
    assert {path.name for path in spec.repo_path.iterdir()} == {".git"}
    commit = project.commit()
    assert (await _repository(spec, around).find("master")).commit == commit


async def test_a_git_that_knows_no_configuration_by_environment(
    spec: BuildSpec, around: Surroundings, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.commit()
    monkeypatch.setattr("mesh.build.remote._as_environment", lambda settings, environ: {})
    with pytest.raises(BuildError, match=r"this git is too old; update it to 2\.31 or later"):
        await _repository(spec, around).find("master")


async def test_no_build_has_the_lock_of_the_repository(spec: BuildSpec, around: Surroundings, project: Project) -> None:
    """All of ``build_path``, ``repo_path`` and another build's may be the same."""
    commit = project.commit()
    lock = BuildLock.take(state.lock_path(replace(spec, build_path=spec.repo_path)))
    assert lock is not None
    async with asyncio.timeout(60):
        assert (await _repository(spec, around).find("master")).commit == commit
    lock.release()


async def test_another_node_in_the_same_repository_is_waited_for(
    spec: BuildSpec, around: Surroundings, project: Project
) -> None:
    commit = project.commit()
    said: list[str] = []
    lock = BuildLock.take(lock_path(spec.repo_path))
    assert lock is not None

    def say(line: str) -> None:
        said.append(line)
        lock.release()

    finding = spawn(Repository(spec, around, say).find("master"), "find")
    assert (await finding).commit == commit
    assert said[0].startswith("waiting for process ")


async def test_a_cancelled_build_does_not_wait_for_another_node(
    spec: BuildSpec, around: Surroundings, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = project.commit()
    repository = _repository(spec, around)
    await repository.find("master")
    source = spec.build_path.with_name("build-1234567.src")
    await repository.lay_out(commit, source)
    monkeypatch.setattr("mesh.build.repository._REMOVE_LIMIT_S", 0.05)
    lock = BuildLock.take(lock_path(spec.repo_path))
    assert lock is not None
    await repository.remove(source)
    lock.release()
    assert not source.exists()
    await repository.lay_out(commit, source)
