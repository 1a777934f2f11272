"""`llama-mesh check`: says everything that is wrong with the files, or what they amount to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mesh.cli.configuration import load_from
from mesh.cli.failure import FAILED, OK
from mesh.cli.output import print_json, print_table, stdout_console
from mesh.config.diagnostics import ConfigErrors, Diagnostic
from mesh.config.loader import Loaded
from mesh.config.profile import Profile
from mesh.engine.locate import find_engine
from mesh.errors import EngineMissingError


def check(arguments: argparse.Namespace) -> int:
    """Validate the files as `serve` would; exit 1 if it would refuse them."""
    try:
        loaded = load_from(arguments)
    except ConfigErrors as errors:
        _report_errors(errors.diagnostics, as_json=arguments.json)
        return FAILED
    result = summary(loaded)
    if arguments.json:
        print_json(result)
    else:
        _print(loaded, result)
    return OK


def summary(loaded: Loaded) -> dict[str, Any]:
    """Return what the files amount to on this machine."""
    return {
        "ok": True,
        "config": str(loaded.config_path) if loaded.config_path else None,
        "cookbook": str(loaded.cookbook_path) if loaded.cookbook_path else None,
        "errors": [],
        "warnings": [_as_json(warning) for warning in loaded.warnings],
        "engine": engine_summary(loaded),
        "profiles": [_profile(profile) for profile in loaded.catalog.profiles],
    }


def engine_summary(loaded: Loaded) -> dict[str, Any]:
    """Return which llama-server would be run, or why none."""
    try:
        engine = find_engine(loaded.settings.llama_cpp)
    except EngineMissingError as error:
        return {"found": False, "reason": error.message}
    return {"found": True, "source": engine.source, "version": engine.version, "command": list(engine.argv)}


def _profile(profile: Profile) -> dict[str, Any]:
    return {
        "id": profile.id,
        "key": profile.key,
        "aliases": list(profile.aliases),
        "engine": str(profile.engine),
        "model": _model_source(profile),
        "model_file_missing": _is_missing(profile),
        "max_instances": profile.max_instances,
        "estimate_mib": dict(profile.estimate.mib),
        "args": list(profile.args),
    }


def _model_source(profile: Profile) -> str:
    if profile.hf_repo:
        return f"hf:{profile.hf_repo}" + (f"/{profile.hf_file}" if profile.hf_file else "")
    return profile.model_path or "in llama_server_args"


def _is_missing(profile: Profile) -> bool:
    """Only a remark: the file may be on a share that is mounted later, or still be downloading."""
    return profile.model_path is not None and not Path(profile.model_path).expanduser().exists()


def _report_errors(diagnostics: tuple[Diagnostic, ...], *, as_json: bool) -> None:
    if as_json:
        print_json({"ok": False, "errors": [_as_json(diagnostic) for diagnostic in diagnostics]})
        return
    console = stdout_console()
    for diagnostic in diagnostics:
        console.print(str(diagnostic), markup=False, soft_wrap=True)
    count = len(diagnostics)
    console.print(f"[bold red]{count} {'mistake' if count == 1 else 'mistakes'}[/]")


def _as_json(diagnostic: Diagnostic) -> dict[str, Any]:
    return {
        "file": str(diagnostic.file),
        "line": diagnostic.line,
        "path": diagnostic.path,
        "message": diagnostic.message,
    }


def _print(loaded: Loaded, result: dict[str, Any]) -> None:
    console = stdout_console()
    for warning in loaded.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow", soft_wrap=True)
    console.print(f"config    {result['config'] or 'none, all defaults'}", markup=False)
    console.print(f"cookbook  {result['cookbook'] or 'none, no models'}", markup=False)
    engine = result["engine"]
    if engine["found"]:
        version = engine["version"] or "unknown version"
        console.print(f"engine    {engine['source']} llama-server, {version}", markup=False)
    else:
        console.print(f"engine    none: {engine['reason']}", markup=False, style="yellow", soft_wrap=True)
    if result["profiles"]:
        console.print()
        print_table(["MODEL", "ALIASES", "FILE", "INSTANCES", "MEMORY"], [_row(p) for p in result["profiles"]])
        console.print()
    console.print("[bold green]ok[/]")


def _row(profile: dict[str, Any]) -> list[str]:
    memory = ", ".join(f"{kind} {mib} MiB" for kind, mib in sorted(profile["estimate_mib"].items()) if mib)
    source = profile["model"] + (" (missing)" if profile["model_file_missing"] else "")
    return [profile["id"], ", ".join(profile["aliases"]) or "-", source, str(profile["max_instances"]), memory or "-"]
