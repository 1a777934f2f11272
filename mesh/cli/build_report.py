"""What is said of an attempt at a build that has ended, and the table of what there is."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rich.text import Text

from mesh.build.status import Outcome
from mesh.cli.build_view import Attempt
from mesh.cli.output import clock, duration, print_table, stderr_console
from mesh.config.builds import DEFAULT_BUILD, rebuild_command

#: As long as git makes them for llama.cpp.
_COMMIT_CHARACTERS: Final = 9
_GOOD: Final = frozenset({Outcome.INSTALLED, Outcome.UNCHANGED})
_COLUMNS: Final = ["BUILD", "COMMIT", "REF", "BUILT", "STATE", "BINARY"]


def is_good(attempt: Attempt) -> bool:
    """Whether the build that was asked for runs now."""
    return attempt.get("outcome") in _GOOD


def short(commit: str | None) -> str:
    """Return a commit as people name it."""
    return "-" if not commit else commit[:_COMMIT_CHARACTERS]


def headline(attempt: Attempt) -> str:
    """Return what became of *attempt*, in one sentence."""
    error = attempt.get("error") or "no reason was given"
    ref = attempt.get("ref")
    commit = short(attempt.get("commit")) + (f" ({ref})" if ref else "")
    match attempt.get("outcome"):
        case Outcome.INSTALLED:
            took = clock(attempt["ended_at_wall"] - attempt["started_at_wall"])
            return f"{commit} is installed after {took}; instances are replaced as their requests end"
        case Outcome.UNCHANGED:
            return f"{commit} runs already; nothing was changed"
        case Outcome.REJECTED:
            return f"{commit} was built, but rejected: {error}"
        case Outcome.CANCELLED:
            return f"cancelled while {attempt['stage']}"
        case Outcome.DISABLED:
            return "nothing is configured to be built"
        case Outcome.SKIPPED:
            why = "; ".join(attempt.get("notes") or ()) or error  # nothing went wrong, so it has no error
            return f"{commit} was skipped: {why}"
        case Outcome.FAILED:
            return f"{attempt['stage']} failed: {error}"
        case _:
            return str(error)


def fix(attempt: Attempt) -> str:
    """Return what to do about an attempt that is not good."""
    name = attempt["build"]
    match attempt.get("outcome"):
        case Outcome.DISABLED:
            where = "llama_cpp" if name == DEFAULT_BUILD else f"builds.{name}"
            return f"Set {where}.repo_url in config.yaml, and {where}.enabled to true."
        case Outcome.REJECTED:
            return "What ran before runs on. How much speed a build may lose is max_slowdown in config.yaml."
        case Outcome.FAILED | Outcome.CANCELLED:
            return f"What ran before runs on. '{rebuild_command(name)}' tries it again."
        case _:
            return "'llama-mesh builds' shows what there is."


def print_tail(attempt: Attempt) -> None:
    """Print the last lines of what failed, on stderr, and how it ended; those of what was cancelled explain nothing."""
    lines, status = attempt.get("log_tail") or (), attempt.get("exit_status")
    if attempt.get("outcome") == Outcome.CANCELLED or (not lines and status is None):
        return
    console = stderr_console()
    for line in lines:
        text = Text("  ")
        console.print(text.append_text(Text.from_ansi(line)), style="dim", soft_wrap=True)
    if status is not None:
        console.print(f"{_exit(status)}, {len(lines)} last lines above" if lines else _exit(status), markup=False)


def _exit(status: int) -> str:
    try:
        return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def print_speeds(attempt: Attempt) -> None:
    """Print the speeds of old and new, and the notes that ``headline`` does not have."""
    rows = [
        [c["model"], *(_change(c["old"], c["new"], key) for key in ("prefill_tps", "decode_tps"))]
        for c in attempt.get("comparisons") or ()
    ]
    if rows:
        print_table(["TOKENS/S", "PREFILL", "DECODE"], rows)
    if attempt.get("outcome") != Outcome.SKIPPED:
        for note in attempt.get("notes") or ():
            print(f"note: {note}")


def _change(old: Mapping[str, float] | None, new: Mapping[str, float], key: str) -> str:
    if old is None or old[key] <= 0:
        return _figure(new[key])
    return f"{_figure(old[key])} → {_figure(new[key])} ({new[key] / old[key] - 1:+.0%})"


def _figure(tps: float) -> str:
    return f"{tps:,.0f}" if tps >= 100 else f"{tps:.1f}"


# --- the table


def print_builds(pictures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the builds of one or several nodes, by node; a name that is empty is not shown."""
    rows = [
        [node, *row]
        for node, picture in pictures.items()
        for status in picture["builds"]
        for row in _rows(status, picture["now_wall"])
    ]
    several = any(pictures)
    if rows:
        columns = ["NODE", *_COLUMNS] if several else _COLUMNS
        print_table(columns, rows if several else [row[1:] for row in rows], optional=["BINARY", "REF", "BUILT"])
    else:
        print("This node builds nothing: set llama_cpp.repo_url in its config.yaml.")
    for node, picture in pictures.items():
        for status in picture["builds"]:
            _print_news(f"{node} {status['name']}".strip(), status, picture["now_wall"])


def _rows(status: Mapping[str, Any], now_wall: float) -> Iterator[list[str]]:
    """Yield a row for each version on disk, for what is live without being one, and for what is held and gone."""
    name, held = status["name"], list(status.get("held") or ())
    versions, live = status.get("versions") or (), status.get("live_commit")
    if not any(version["live"] for version in versions):
        nothing = "not built" if status["enabled"] else "disabled"
        yield [name, short(live), "-", "-", "live" if live else nothing, status["binary_path"]]
    for version in versions:
        of_it = [commit for commit in held if _same_commit(commit, version["commit"])]
        held = [commit for commit in held if commit not in of_it]
        built = version.get("built_at_wall")
        age = "-" if built is None else f"{duration(max(0.0, now_wall - built))} ago"
        yield [
            name,
            short(version["commit"]),
            version.get("ref") or "-",
            age,
            _state(version, bool(of_it)),
            version["binary"],
        ]
    for commit in held:
        yield [name, short(commit), "-", "-", "held", "-"]


def _same_commit(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _state(version: Mapping[str, Any], is_held: bool) -> str:
    words = [word for word in ("live", "previous") if version[word]]
    return ", ".join([*words, *(["held"] if is_held else [])]) or "-"


def _print_news(name: str, status: Mapping[str, Any], now_wall: float) -> None:
    """Print what is held and why, and what goes on, or how the last attempt failed."""
    lines = [Text(f"{name}: {short(commit)} is held: {why}") for commit, why in (status.get("held") or {}).items()]
    if (current := status.get("current")) is not None:
        done, total = current.get("done"), current.get("total")
        count = "" if done is None or total is None else f" {done}/{total}"
        for_s = clock(max(0.0, now_wall - current["started_at_wall"]))
        watch = rebuild_command(status["name"])
        lines.append(Text(f"{name}: {current['stage']}{count}, for {for_s}; '{watch}' watches it"))
    elif (last := status.get("last")) is not None and last.get("error") and not is_good(last):
        ago = duration(max(0.0, now_wall - last["ended_at_wall"]))
        lines.append(Text(f"{name}, {ago} ago: {headline(last)}", style="red"))
    for line in lines:
        stderr_console().print(line, soft_wrap=True)
