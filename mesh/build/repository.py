"""The git repository: which commit a branch, tag or hash means now, and the sources of that commit.

Owns ``repo_path/.git``, and in it only ``refs/llama-mesh/…`` and worktrees that it makes; the working tree, the
branches and the tags belong to the operator and are never touched. What may take long runs as a child process that
can be cancelled and dies with the node; what only reads the local repository is GitPython in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.build.command import Command, CommandError, Surroundings, run, without_passwords
from mesh.build.layout import remove_tree
from mesh.build.lock import BuildLock, holder
from mesh.build.spec import BuildSpec
from mesh.build.threads import settled
from mesh.errors import BuildError

if TYPE_CHECKING:
    from git import Repo

_CONFIG: Final = (
    "core.hooksPath=/dev/null",  # an operator's hooks are for the operator's checkouts
    "gc.auto=0",  # killed in the middle, it would leave locks that nobody removes
    "maintenance.auto=false",
    "fetch.unpackLimit=1",  # and without it, thousands of loose objects would gather
    "fetch.recurseSubmodules=false",
    "advice.detachedHead=false",
    "http.lowSpeedLimit=1000",
    "http.lowSpeedTime=60",
)
#: nobody is there to type a password or to say yes to a host key; git is to fail and say so
_ENV: Final = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "",
    "SSH_ASKPASS": "",
    "SSH_ASKPASS_REQUIRE": "never",
    "LC_ALL": "C",
    "LANGUAGE": "C",
}
#: git says something every second while it gets anything; servers may count objects for a while
_MAX_SILENCE_S = 180.0
_REMOVE_LIMIT_S = 20.0
#: git's own choice is never shorter, unless somebody set core.abbrev; fewer digits read like words
SHORTEST: Final = 7
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHORT_HASH = re.compile(r"[0-9a-f]{4,64}")
_LISTED = re.compile(r"(?P<hash>[0-9a-f]{40,64})\t(?P<name>refs/\S+)$")


@dataclass(frozen=True, slots=True)
class Revision:
    commit: str  #: the full hash
    short: str  #: as ``git rev-parse --short`` writes it: what the directory is named after


class Repository:
    """The repository of one build; several builds may share one on disk."""

    def __init__(self, spec: BuildSpec, around: Surroundings, say: Callable[[str], None]) -> None:
        assert spec.repo_url is not None
        self._url = spec.repo_url
        self._path = spec.repo_path
        self._around = around
        self._say = say
        #: what was fetched last for this build is kept from being collected as garbage
        self._kept_ref = f"refs/llama-mesh/{spec.name.replace('.', '_')}"

    async def find(self, ref: str) -> Revision:
        """Return what *ref* means at ``repo_url`` now; its objects are in the local repository afterwards.

        A full hash that is known already needs no network. Raise ``BuildError`` if *ref* is unknown, or git fails.
        """
        if ref.startswith("-") or not ref.strip():
            raise BuildError(f"{ref!r} is no branch, tag or commit")
        async with self._alone():
            await self._ensure()
            commit = await self._find(ref)
        return await asyncio.to_thread(self._revision, commit)

    async def lay_out(self, commit: str, source: Path) -> None:
        """Put the files of *commit*, with submodules, into the new directory *source*."""
        async with self._alone():
            await self._forget(source)
            force = ("--force", "--force")  # also if a killed node left it half made
            await self._git("worktree", "add", "--detach", *force, "--", str(source), commit, at=self._path)
            if (source / ".gitmodules").exists():
                await self._git("submodule", "update", "--init", "--recursive", "--progress", at=source)

    async def remove(self, source: Path) -> None:
        """Remove what ``lay_out`` made, or half of it. Soon, for a cancelled build waits for it.

        If another node keeps git busy, only the files go, and git notices by itself, months later.
        """
        try:
            async with asyncio.timeout(_REMOVE_LIMIT_S), self._alone():
                await self._forget(source)
        except TimeoutError:
            await settled(partial(remove_tree, source))

    # -- under the lock

    async def _ensure(self) -> None:
        """Have a repository at ``repo_path``; whatever else is in that directory stays as it is."""
        if _is_repository(self._path):
            return
        scratch = self._path.with_name(f"{self._path.name}.clone")
        try:
            await asyncio.to_thread(remove_tree, scratch)
            self._path.mkdir(parents=True, exist_ok=True)
            await self._git("clone", "--no-checkout", "--progress", "--", self._url, str(scratch), at=self._path.parent)
            (scratch / ".git").rename(self._path / ".git")  # whole or not at all
        except OSError as error:
            raise BuildError(f"cannot make repo_path {self._path}: {error.strerror}") from error
        finally:
            await asyncio.to_thread(remove_tree, scratch)

    async def _find(self, ref: str) -> str:
        known: bool = await asyncio.to_thread(self._has, ref)
        if known and _HASH.fullmatch(ref):
            return ref
        listed = await self._listed(ref)
        for name, hash_name in ((f"refs/heads/{ref}", ""), (f"refs/tags/{ref}", "^{}"), (ref, "")):
            if name in listed:
                return await self._fetched(name, listed.get(name + hash_name, listed[name]))
        if not _SHORT_HASH.fullmatch(ref):
            raise BuildError(f"{self._shown_url} has no branch or tag {ref!r}; correct llama_cpp.branch")
        return await self._hash(ref)

    async def _listed(self, ref: str) -> dict[str, str]:
        """Return name -> hash of what the other side calls *ref*."""
        patterns = (f"refs/heads/{ref}", f"refs/tags/{ref}", f"refs/tags/{ref}^{{}}", ref)
        lines: list[str] = []
        await self._git("ls-remote", "--", self._url, *patterns, at=self._path, hear=lines.append)
        found = (_LISTED.match(line) for line in lines)
        return {line["name"]: line["hash"] for line in found if line}

    async def _fetched(self, name: str, commit: str) -> str:
        if await asyncio.to_thread(self._has, commit):
            return commit
        await self._fetch(f"+{name}:{self._kept_ref}/head")
        return await asyncio.to_thread(self._parse, f"{self._kept_ref}/head")  # it may have moved on meanwhile

    async def _hash(self, ref: str) -> str:
        """Return the commit that *ref*, a hash or its beginning, stands for."""
        with contextlib.suppress(BuildError):
            return await asyncio.to_thread(self._parse, ref)
        if _HASH.fullmatch(ref):
            with contextlib.suppress(CommandError):  # not every server gives out commits by hash
                await self._fetch(f"+{ref}:{self._kept_ref}/head")
                return ref
        spaces = [f"+refs/{space}/*:{self._kept_ref}/{space}/*" for space in ("heads", "tags")]
        await self._fetch(*spaces, prune=True)
        try:
            return await asyncio.to_thread(self._parse, ref)
        except BuildError as error:
            raise BuildError(f"{self._shown_url} has no branch, tag or commit {ref!r}") from error

    async def _fetch(self, *refspecs: str, prune: bool = False) -> None:
        await asyncio.to_thread(self._unlock)
        options = ("--no-tags", "--force", "--progress", *(["--prune"] if prune else []))
        await self._git("fetch", *options, "--", self._url, *refspecs, at=self._path)

    def _unlock(self) -> None:
        """Remove locks on our own refs that a killed git left; we hold the lock, so nobody is at work there."""
        for refs in (self._path / ".git" / self._kept_ref, self._path / self._kept_ref):
            for lock in refs.rglob("*.lock"):
                lock.unlink(missing_ok=True)

    async def _forget(self, source: Path) -> None:
        with contextlib.suppress(CommandError):  # it is none (any more)
            at, hear = self._path, _deaf
            await self._git("worktree", "remove", "--force", "--force", "--", str(source), at=at, hear=hear)
        await asyncio.to_thread(remove_tree, source)

    async def _git(self, *args: str, at: Path, hear: Callable[[str], None] | None = None) -> None:
        config = [word for setting in _CONFIG for word in ("-c", setting)]
        env = _ENV | {"GIT_CEILING_DIRECTORIES": str(self._path.parent)}  # never a repository that we only live in
        argv = ("git", *config, *args)
        command = Command(argv, cwd=at, extra_env=env, max_silence_s=_MAX_SILENCE_S)
        try:
            await run(command, self._around, hear or self._say)
        except CommandError as error:
            text = f"git {args[0]} failed (exit status: {error.exit_status}) for {self._shown_url}: {_why(error)}"
            raise CommandError(text, exit_status=error.exit_status, log_tail=error.log_tail) from error

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Keep other nodes out that share ``repo_path`` but not ``build_path``."""
        path = self._path.with_name(f"{self._path.name}.lock")
        if (lock := BuildLock.take(path)) is None:
            self._say(f"waiting for {holder(path)}, which uses {self._path}")
            lock = await BuildLock.wait(path)
        try:
            yield
        finally:
            lock.release()

    # -- in a thread: GitPython

    def _has(self, commit: str) -> bool:
        with contextlib.suppress(BuildError):
            return bool(self._parse(commit) == commit)
        return False

    def _parse(self, name: str) -> str:
        with _opened(self._path) as repo:
            return str(repo.git.rev_parse("--verify", "--quiet", f"{name}^{{commit}}"))

    def _revision(self, commit: str) -> Revision:
        with _opened(self._path) as repo:
            short = str(repo.git.rev_parse("--short", commit))
            return Revision(commit, short if len(short) >= SHORTEST else commit[:SHORTEST])

    @property
    def _shown_url(self) -> str:
        return without_passwords(self._url)


def _is_repository(path: Path) -> bool:
    return (path / ".git").exists() or ((path / "HEAD").is_file() and (path / "objects").is_dir())


@contextmanager
def _opened(path: Path) -> Iterator[Repo]:
    """Open *path* with GitPython, whatever the environment says of other repositories. Map its errors to ours."""
    try:
        import git  # it looks for the git program when it is imported: 50 ms, and an error if there is none
    except ImportError as error:
        raise BuildError("git is not installed; apt-get install git, or set llama_cpp.enabled: false") from error
    try:
        with git.Repo(path) as repo:
            repo.git.update_environment(GIT_DIR=str(repo.git_dir))
            yield repo
    except (git.GitError, ValueError, OSError) as error:
        raise BuildError(f"git cannot read {path}: {_words(error)}") from error


def _words(error: Exception) -> str:
    return without_passwords(str(getattr(error, "stderr", "") or error).strip())


def _why(error: CommandError) -> str:
    """Return git's complaint, with the line before it: ssh's, if it was that which failed."""
    lines = list(error.log_tail)
    at = next((i for i, line in enumerate(lines) if line.startswith(("fatal:", "error:"))), len(lines) - 1)
    return "; ".join(lines[max(0, at - 1) : at + 1]) or "it said nothing"


def _deaf(line: str) -> None:
    """Listen to nothing."""
