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
from mesh.build.remote import NAME, remote_of
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
_LISTED = re.compile(r"(?P<hash>[0-9a-f]{40,64})\t(?P<name>HEAD|refs/\S+)$")
#: what only those can write who may push there. Elsewhere, as in refs/pull of GitHub, is anybody's code
_PUSHED = ("refs/heads/", "refs/tags/")


@dataclass(frozen=True, slots=True)
class Revision:
    commit: str  #: the full hash
    short: str  #: as ``git rev-parse --short`` writes it: what the directory is named after


class Repository:
    """The repository of one build; several builds may share one on disk."""

    def __init__(self, spec: BuildSpec, around: Surroundings, say: Callable[[str], None]) -> None:
        assert spec.repo_url is not None
        self._remote = remote_of(spec.repo_url)
        self._configured = spec.ref
        self._path = spec.repo_path
        self._around = around
        self._say = say
        #: what was fetched last for this build is kept from being collected as garbage
        self._kept_ref = f"refs/llama-mesh/{spec.name.replace('.', '_')}"

    async def find(self, ref: str) -> Revision:
        """Return what *ref* means at ``repo_url`` now; its objects are in the local repository afterwards.

        What is configured may be anything that the other side has. Else *ref* is a branch, a tag, HEAD, or a commit
        that one of those leads to: by other names, or by its hash, anybody's commit can be had from a server that
        hosts forks and pull requests, and it would be run here. A full hash that is known already needs no network.
        Raise ``BuildError`` if *ref* is unknown, or git fails.
        """
        if ref.startswith("-") or not ref.strip():
            raise BuildError(f"{ref!r} is no branch, tag or commit")
        async with self._alone():
            await self._ensure()
            commit = await self._find(ref)
        return await asyncio.to_thread(self._revision, commit)

    async def tip(self, ref: str) -> str:
        """Return the commit that *ref* means at ``repo_url`` now, "" if it is no name; nothing is fetched."""
        if _HASH.fullmatch(ref):
            return ref
        async with self._alone():
            await self._ensure()
            listed = await self._listed(ref)
        return next((listed.get(f"{name}^{{}}", listed[name]) for name in self._names(ref) if name in listed), "")

    async def lay_out(self, commit: str, source: Path) -> None:
        """Put the files of *commit*, with submodules, into the new directory *source*."""
        async with self._alone():
            await self._forget(source)
            force = ("--force", "--force")  # also if a killed node left it half made
            await self._git("worktree", "add", "--detach", *force, "--", str(source), commit, at=self._path)
            if (source / ".gitmodules").exists():
                await self._git("submodule", "init", at=source, as_origin=True)
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
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(f"cannot make repo_path {self._path}: {error.strerror}") from error
        await self._git("init", "--quiet", at=self._path)  # killed in the middle of it, it goes on the next time

    async def _find(self, ref: str) -> str:
        if _HASH.fullmatch(ref) and (known := await asyncio.to_thread(self._allowed, ref)):
            return known
        listed = await self._listed(ref)
        for name in self._names(ref):
            if name in listed:
                return await self._fetched(name, listed.get(f"{name}^{{}}", listed[name]))
        if not _SHORT_HASH.fullmatch(ref):
            raise BuildError(f"{self._shown_url} has no branch or tag {ref!r}{self._advice(ref)}")
        return await self._hash(ref)

    def _names(self, ref: str) -> tuple[str, ...]:
        """Return what *ref* may be called in full, the first one first."""
        as_it_is = ref == self._configured or ref == "HEAD" or ref.startswith(_PUSHED)
        return (*(space + ref for space in _PUSHED), *((ref,) if as_it_is else ()))

    def _advice(self, ref: str) -> str:
        if ref == self._configured:
            return "; correct llama_cpp.branch"
        return "; anything else is built only if llama_cpp.branch says so" if ref.startswith("refs/") else ""

    async def _listed(self, ref: str) -> dict[str, str]:
        """Return name -> hash of what the other side calls *ref*; with ``^{}`` that of the commit of a tag."""
        patterns = [pattern for name in self._names(ref) for pattern in (name, f"{name}^{{}}")]
        lines: list[str] = []
        await self._git("ls-remote", "--", NAME, *patterns, at=self._path, hear=lines.append)
        found = (_LISTED.match(line) for line in lines)
        return {line["name"]: line["hash"] for line in found if line}

    async def _fetched(self, name: str, commit: str) -> str:
        pushed = name == "HEAD" or name.startswith(_PUSHED)
        kept = f"{self._kept_ref}/{'head' if pushed else 'other'}"
        if await asyncio.to_thread(self._has, commit):
            await asyncio.to_thread(self._keep, kept, commit)
            return commit
        await self._fetch(f"+{name}:{kept}")
        return await asyncio.to_thread(self._parse, kept)  # it may have moved on meanwhile

    async def _hash(self, ref: str) -> str:
        """Return the commit that *ref*, a hash or its beginning, stands for."""
        if known := await asyncio.to_thread(self._allowed, ref):
            return known
        if _HASH.fullmatch(ref) and ref == self._configured:
            with contextlib.suppress(CommandError):  # not every server gives out commits by hash
                await self._fetch(f"+{ref}:{self._kept_ref}/other")
                return ref
        spaces = [f"+refs/{space}/*:{self._kept_ref}/{space}/*" for space in ("heads", "tags")]
        await self._fetch(*spaces, prune=True)
        if known := await asyncio.to_thread(self._allowed, ref):
            return known
        if await asyncio.to_thread(self._has, ref):
            raise BuildError(
                f"{ref} is on no branch and no tag of {self._shown_url}: it may be anybody's, from a pull request or a "
                f"fork. Set llama_cpp.branch to it if it is to be built all the same"
            )
        raise BuildError(f"{self._shown_url} has no branch, tag or commit {ref!r}")

    async def _fetch(self, *refspecs: str, prune: bool = False) -> None:
        await asyncio.to_thread(self._unlock)
        options = ("--no-tags", "--no-write-fetch-head", "--force", "--progress", *(["--prune"] if prune else []))
        await self._git("fetch", *options, "--", NAME, *refspecs, at=self._path)

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

    async def _git(
        self, *args: str, at: Path, hear: Callable[[str], None] | None = None, as_origin: bool = False
    ) -> None:
        config = [word for setting in _CONFIG for word in ("-c", setting)]
        env = _ENV | self._remote.environment(self._around.environ(), as_origin=as_origin)
        env["GIT_CEILING_DIRECTORIES"] = str(self._path.parent)  # never a repository that we only live in
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
        path = lock_path(self._path)
        if (lock := await BuildLock.taken(path)) is None:
            self._say(f"waiting for {await asyncio.to_thread(holder, path)}, which uses {self._path}")
            lock = await BuildLock.wait(path)
        try:
            yield
        finally:
            lock.release()

    # -- in a thread: GitPython

    def _has(self, commit: str) -> bool:
        """Whether *commit*, a hash or its beginning, is here."""
        with contextlib.suppress(BuildError):
            return self._parse(commit).startswith(commit)
        return False

    def _allowed(self, ref: str) -> str:
        """Return the commit that *ref*, a hash or its beginning, means here; "" if not known or anybody's."""
        try:
            commit = self._parse(ref)
        except BuildError:
            return ""
        if ref == self._configured:
            return commit
        with _opened(self._path) as repo:  # "head*": what was fetched last, and the branches; not "other"
            pushed = [f"--glob={self._kept_ref}/{space}*" for space in ("head", "tags/")]
            return commit if not repo.git.rev_list("--max-count=1", commit, "--not", *pushed) else ""

    def _keep(self, kept: str, commit: str) -> None:
        self._unlock()
        with _opened(self._path) as repo:
            repo.git.update_ref(kept, commit)

    def _parse(self, name: str) -> str:
        with _opened(self._path) as repo:
            return str(repo.git.rev_parse("--verify", "--quiet", f"{name}^{{commit}}"))

    def _revision(self, commit: str) -> Revision:
        with _opened(self._path) as repo:
            short = str(repo.git.rev_parse("--short", commit))
            return Revision(commit, short if len(short) >= SHORTEST else commit[:SHORTEST])

    @property
    def _shown_url(self) -> str:
        return without_passwords(self._remote.url)


def lock_path(repo_path: Path) -> Path:
    """Return what keeps two out of *repo_path*. No build's lock has that name, also if they build in the same place."""
    return repo_path.with_name(f".{repo_path.name}.git.lock")


def _is_repository(path: Path) -> bool:
    bare = (path / ".git").is_file() or ((path / "HEAD").is_file() and (path / "objects").is_dir())
    return bare or ((path / ".git" / "HEAD").is_file() and (path / ".git" / "objects").is_dir())


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
    if any(f"'{NAME}' does not appear to be a git repository" in line for line in lines):
        return "this git is too old; update it to 2.31 or later"
    at = next((i for i, line in enumerate(lines) if line.startswith(("fatal:", "error:"))), len(lines) - 1)
    return "; ".join(lines[max(0, at - 1) : at + 1]) or "it said nothing"


def _deaf(line: str) -> None:
    """Listen to nothing."""
