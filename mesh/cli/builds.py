"""`llama-mesh rebuild`, `rollback` and `builds`: new versions of llama.cpp on a running node, and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from mesh.cli import everywhere, node
from mesh.cli.build_report import (
    fix,
    headline,
    is_good,
    print_builds,
    print_speeds,
    print_tail,
    short,
)
from mesh.cli.build_view import Attempt, BuildView
from mesh.cli.build_watch import follow, poll
from mesh.cli.failure import FAILED, INTERRUPTED, OK, USAGE, CliError
from mesh.cli.output import print_json, stderr_console, stdout_console
from mesh.config.builds import DEFAULT_BUILD, rebuild_command

#: A rollback runs the old binary once; a node that asks another one waits for 120 s.
_ROLLBACK_S = 150.0
_BUSY = 409


def rebuild(arguments: argparse.Namespace) -> int:
    """Start a build and watch it to its end, or one in progress that does for what was asked (see ``_will_do``)."""
    if arguments.cancel:
        return _cancel(arguments)
    found = node.find(arguments)
    if arguments.everywhere:
        return _rebuild_everywhere(found, arguments)
    attempt = _started(found, arguments)
    if arguments.no_wait and attempt.get("outcome") is None:
        _tell_of_start(arguments, attempt)
        return OK
    try:
        with BuildView(as_json=arguments.json) as view:
            if arguments.node is None:
                attempt = follow(found, attempt, view)
            else:
                attempt = poll(found, arguments.node, {arguments.node: attempt}, view)[arguments.node]
    except KeyboardInterrupt:
        return _interrupted(arguments)
    return _report(arguments, attempt)


def _body(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what every request of these commands says: which build, and where."""
    build = {} if arguments.name is None else {"build": arguments.name}
    return {**build, **everywhere.target(arguments)}


def _order(arguments: argparse.Namespace) -> dict[str, Any]:
    branch = {} if arguments.branch is None else {"branch": arguments.branch}
    return {**_body(arguments), **branch, **({"force": True} if arguments.force else {})}


def _started(found: node.Node, arguments: argparse.Namespace) -> Attempt:
    """Return the attempt that was started, or the one that was going on. Raise ``CliError`` if that will not do."""
    try:
        attempt = found.post("/admin/rebuild-llama", _order(arguments))["attempt"]
    except CliError as error:
        if error.http_status != _BUSY or arguments.no_wait:
            raise
        running = _running(found, arguments)
        if running is None:  # another process on that machine, or it has ended meanwhile
            raise
        if not _will_do(running, arguments):
            next_step = _how_to_go_on(running, "" if arguments.node is None else f" --node {arguments.node}")
            raise CliError(_another(running), fix=next_step, http_status=_BUSY, answer=error.answer) from error
        stderr_console().print(_in_progress(running), markup=False, soft_wrap=True)
        return running
    if attempt is None:
        raise CliError("this node builds nothing", fix="Set llama_cpp.repo_url in its config.yaml.")
    return dict(attempt)


def _in_progress(running: Attempt) -> str:
    return f"a rebuild of {running['build']} is in progress already ({running['trigger']}); this is it:"


def _will_do(running: Attempt, arguments: argparse.Namespace) -> bool:
    """Whether to watch *running* is what was asked for: who names a ref, or forces, must not hear of another build."""
    return not arguments.force and arguments.branch in (None, running.get("ref"))


def _another(running: Attempt) -> str:
    parts = (f"attempt {running['id']}", running["trigger"], running.get("ref"))
    which = ", ".join(str(part) for part in parts if part)
    return (
        f"another rebuild of {running['build']} is in progress ({which}: {running['stage']}); "
        "what was asked for has not started"
    )


def _how_to_go_on(running: Attempt, where: str) -> str:
    """Return what to do about *running*; *where* is the flag that names its node."""
    command = rebuild_command(running["build"]) + where
    return f"Wait until it has ended ('{command}' watches it) or stop it ('{command} --cancel'), then ask again."


def _running(found: node.Node, arguments: argparse.Namespace) -> Attempt | None:
    picture = found.post("/admin/builds", everywhere.target(arguments))
    return _current(picture, arguments.name)


def _current(picture: Mapping[str, Any], name: str | None) -> Attempt | None:
    wanted = name or DEFAULT_BUILD
    current: Attempt | None = next((b["current"] for b in picture.get("builds", ()) if b["name"] == wanted), None)
    return current


def _tell_of_start(arguments: argparse.Namespace, attempt: Attempt) -> None:
    if arguments.json:
        print_json(attempt)
    else:
        where = "" if arguments.node is None else f" on {arguments.node}"
        print(f"the rebuild of {attempt['build']} has started{where}; 'llama-mesh builds' shows how far it is")


def _interrupted(arguments: argparse.Namespace) -> int:
    """Say that nothing was stopped: people press Ctrl-C to get their prompt back."""
    name = "" if arguments.name is None else f" {arguments.name}"
    where = "" if arguments.node is None else f" --node {arguments.node}"
    where = " --everywhere" if arguments.everywhere else where
    print(file=sys.stderr)
    again = f"the build goes on; 'llama-mesh rebuild{name}{where} --cancel' stops it"
    stderr_console().print(again, markup=False, soft_wrap=True)
    return INTERRUPTED


def _report(arguments: argparse.Namespace, attempt: Attempt) -> int:
    if arguments.json:
        print_json(attempt)
        return OK if is_good(attempt) else FAILED
    where = _where(arguments, attempt["build"])
    if not is_good(attempt):
        print_speeds(attempt)
        print_tail(attempt)
        raise CliError(f"{where}: {headline(attempt)}", fix=fix(attempt))
    stdout_console().print(f"{where}: {headline(attempt)}", markup=False)
    print_speeds(attempt)
    return OK


def _where(arguments: argparse.Namespace, build: str) -> str:
    return build if arguments.node is None else f"{build} on {arguments.node}"


# --- every node


def _rebuild_everywhere(found: node.Node, arguments: argparse.Namespace) -> int:
    answer = everywhere.post(found, "/admin/rebuild-llama", _order(arguments))
    attempts, refusals = _sorted(found, arguments, answer["nodes"])
    if not arguments.no_wait and attempts:
        try:
            with BuildView(as_json=arguments.json) as view:
                attempts = poll(found, everywhere.ALL_NODES, attempts, view)
        except KeyboardInterrupt:
            return _interrupted(arguments)
    good = [arguments.no_wait or is_good(attempt) for attempt in attempts.values()]
    failed = (
        not all(good) or not attempts or any(said.get("type") not in everywhere.NOT_THERE for said in refusals.values())
    )
    if arguments.json:
        ended = {name: {"status": "ok", "attempt": attempt} for name, attempt in attempts.items()}
        print_json({"status": "error" if failed else "ok", "nodes": {**refusals, **ended}})
    else:
        _print_everywhere(answer["nodes"], attempts, refusals, started=arguments.no_wait)
    return FAILED if failed else OK


def _sorted(
    found: node.Node, arguments: argparse.Namespace, said: Mapping[str, Any]
) -> tuple[dict[str, Attempt], dict[str, Any]]:
    """Return the attempts to watch, and what the other nodes said; those that are busy are watched if that will do."""
    attempts = {name: answer["attempt"] for name, answer in said.items() if answer.get("attempt") is not None}
    refusals = {name: answer for name, answer in said.items() if name not in attempts}
    busy = [name for name, answer in refusals.items() if answer.get("type") == "conflict"]
    if busy and not arguments.no_wait:
        pictures = everywhere.post(found, "/admin/builds", {"node": everywhere.ALL_NODES})["nodes"]
        for name in busy:
            running = _current(pictures.get(name) or {}, arguments.name)
            if running is not None and _will_do(running, arguments):
                attempts[name] = running
                del refusals[name]
            elif running is not None:
                text = f"{_another(running)}. {_how_to_go_on(running, f' --node {name}')}"
                refusals[name] = {**refusals[name], "message": text}
    return attempts, refusals


def _print_everywhere(
    names: Mapping[str, Any], attempts: Mapping[str, Attempt], refusals: Mapping[str, Any], *, started: bool
) -> None:
    """Print the last lines of what failed, then a line for each node."""
    for name, attempt in attempts.items():
        if not started and not is_good(attempt):
            stderr_console().print(Text(f"{name}:", style="bold"))
            print_tail(attempt)

    def outcome(said: Mapping[str, Any]) -> str:
        return "started" if started else headline(said)

    lines: dict[str, Any] = {}
    for name in names:
        if name not in attempts:
            said = refusals[name]
            lines[name] = said if said.get("status") == "error" else {"status": "error", "message": "builds nothing"}
        elif started or is_good(attempts[name]):
            lines[name] = attempts[name]
        else:
            lines[name] = {"status": "error", "message": headline(attempts[name])}
    everywhere.print_each({"nodes": lines}, outcome)


# --- the rest


def _cancel(arguments: argparse.Namespace) -> int:
    if arguments.branch is not None or arguments.force:
        raise CliError(
            "--cancel stops what is in progress, whatever it builds",
            fix="Leave out --branch and --force.",
            exit_code=USAGE,
        )
    return _print_answer(
        arguments, everywhere.post(node.find(arguments), "/admin/rebuild-llama/cancel", _body(arguments))
    )


def rollback(arguments: argparse.Namespace) -> int:
    """Go back to the version before; its instances are replaced like after a rebuild."""
    found = node.find(arguments)
    answer = everywhere.post(found, "/admin/rollback-llama", _body(arguments), timeout_s=_ROLLBACK_S)
    return _print_answer(arguments, answer)


def _print_answer(arguments: argparse.Namespace, answer: everywhere.Answer) -> int:
    if arguments.json:
        print_json(answer)
    elif "nodes" in answer:
        everywhere.print_each(answer, _sentence)
    else:
        told = _sentence(answer)
        if "version" in answer:
            told = f"{_where(arguments, arguments.name or DEFAULT_BUILD)}: {told}"
        stdout_console().print(told, markup=False)
    return everywhere.status(answer)


def _sentence(said: everywhere.Answer) -> str:
    version = said.get("version")
    if version is None:
        return str(said["message"])
    ref = f" ({version['ref']})" if version.get("ref") else ""
    return f"back at {short(version['commit'])}{ref}; instances are replaced as their requests end"


def builds(arguments: argparse.Namespace) -> int:
    """Show GET /admin/builds, of this node or of others."""
    found, body = node.find(arguments), everywhere.target(arguments)
    answer = everywhere.post(found, "/admin/builds", body) if body else found.get("/admin/builds")
    if arguments.json:
        print_json(answer)
        return everywhere.status(answer)
    if "nodes" not in answer:
        print_builds({answer.get("node") or "": answer})
        return OK
    print_builds({name: said for name, said in answer["nodes"].items() if "builds" in said})
    for name, said in answer["nodes"].items():
        if "builds" not in said:
            stderr_console().print(f"\n{name}: {said.get('message')}", style="red", markup=False)
    return everywhere.status(answer)
