"""Git repositories for tests, with hashes that depend on nothing but what is in them."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.build_project import behaviour

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_WHO = ("llama-mesh tests", "tests@llama-mesh.invalid")


def git(directory: Path, *args: str, work_tree: Path | None = None, commits_before: int = 0) -> str:
    """Run git in *directory* and return what it says, without the last line end.

    With *work_tree*, *directory* is the repository alone (absolute). Nothing of the user's configuration counts; author
    and date are fixed, the date by *commits_before*.
    """
    when = (_EPOCH + timedelta(minutes=commits_before)).isoformat()
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    env |= {"GIT_ATTR_NOSYSTEM": "1", "XDG_CONFIG_HOME": os.devnull}  # the latter for git/attributes
    for role in ("AUTHOR", "COMMITTER"):
        env |= dict(zip((f"GIT_{role}_NAME", f"GIT_{role}_EMAIL"), _WHO, strict=True)) | {f"GIT_{role}_DATE": when}
    where = ["-C", str(work_tree or directory)]
    where += [f"--git-dir={directory}", f"--work-tree={work_tree}"] if work_tree else []
    done = subprocess.run(["git", *where, *args], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"git {' '.join(args)}: {done.stderr}"
    return done.stdout.rstrip("\n")


def init(directory: Path, *options: str) -> None:
    """Make an empty repository with the branch master."""
    directory.mkdir(parents=True, exist_ok=True)
    git(directory, "init", "--quiet", "--object-format=sha1", "--initial-branch=master", *options)


def commit_all(directory: Path, message: str, *, work_tree: Path | None = None) -> str:
    """Commit everything that lies in the working tree, ignored files too, even if nothing changed; return the hash."""
    count = len(git(directory, "log", "--all", "--format=%H", work_tree=work_tree).splitlines())
    git(directory, "add", "--all", "--force", ".", work_tree=work_tree)
    options = ("--quiet", "--allow-empty", "--no-verify", "-m", message)
    git(directory, "commit", *options, work_tree=work_tree, commits_before=count)
    return git(directory, "rev-parse", "HEAD", work_tree=work_tree)


class Repository:
    """The stand-in for llama.cpp at ``path``; ``url`` is what to write as ``repo_url``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"file://{path}"

    def commit(self, message: str = "as asked", **behaviour_and_faults: object) -> str:
        """Commit a project that behaves so, on the branch that is checked out; return the full hash."""
        build, faults = behaviour.split(behaviour_and_faults)
        for name, text in {"CMakeLists.txt": build.cmake(), **build.sources(faults)}.items():
            file = self.path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        return commit_all(self.path, message)

    def tag(self, name: str, commit: str = "HEAD") -> None:
        """Let the tag *name* mean *commit*, also if it meant another one."""
        git(self.path, "tag", "--force", name, commit)

    def branch(self, name: str, start: str = "HEAD") -> None:
        """Check out the branch *name*; it is made at *start*, or moved there."""
        git(self.path, "checkout", "--quiet", "-B", name, start)

    def reset(self, commit: str) -> None:
        """Move the branch that is checked out to *commit*, as after a forced push."""
        git(self.path, "reset", "--quiet", "--hard", commit)

    @property
    def head(self) -> str:
        """The full hash of what is checked out."""
        return git(self.path, "rev-parse", "HEAD")


def make_repository(path: Path) -> Repository:
    """Make a repository without a commit at *path*."""
    init(path)
    return Repository(path)
