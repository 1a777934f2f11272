"""`llama-mesh check`: says everything that is wrong with the files, or what they amount to."""

from __future__ import annotations

import argparse
import os
import os.path
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from mesh.cli.configuration import load_from
from mesh.cli.engine import builds_summary, engine_summary, engine_warnings, label, lacking, others_summary
from mesh.cli.failure import FAILED, OK
from mesh.cli.output import print_json, print_table, print_warnings, stdout_console
from mesh.config.cookbook import model_file
from mesh.config.diagnostics import ConfigErrors, Diagnostic
from mesh.config.loader import Loaded
from mesh.config.profile import Profile
from mesh.core.budget import BudgetLimits, capacity
from mesh.core.devices import Devices
from mesh.core.placement import gpu_kinds
from mesh.errors import ConfigError


def check(arguments: argparse.Namespace) -> int:
    """Validate the files as `serve` would; exit 1 if it would refuse them, or has nothing to start models with."""
    try:
        loaded = load_from(arguments)
    except ConfigErrors as errors:
        _report_errors(errors, as_json=arguments.json)
        return FAILED
    result = summary(loaded)
    if arguments.json:
        print_json(result)
    else:
        _print(result)
    return OK if result["ok"] else FAILED


def summary(loaded: Loaded) -> dict[str, Any]:
    """Return what the files amount to on this machine."""
    engine, builds, others = engine_summary(loaded), builds_summary(loaded), others_summary(loaded)
    lacked = lacking(loaded, engine, builds, others)
    missing = [(Diagnostic("engine", None, "", reason), later) for reason, later in lacked]
    errors = [told for told, later in missing if not later] + _cluster_problems(loaded)
    not_yet = [told for told, later in missing if later]
    warnings = (*loaded.warnings, *not_yet, *engine_warnings(loaded, engine), *_memory_warnings(loaded))
    return {
        "ok": not errors,
        "config": str(loaded.config_path) if loaded.config_path else None,
        "cookbook": str(loaded.cookbook_path) if loaded.cookbook_path else None,
        "errors": _as_json(errors),
        "warnings": _as_json(warnings),
        "engine": engine,
        "builds": builds,
        "engines": others,
        "profiles": [_profile(profile) for profile in loaded.catalog.profiles],
    }


def _cluster_problems(loaded: Loaded) -> list[Diagnostic]:
    """Return why the node could not join the others: no token, keys that cannot be used. Makes nothing."""
    if not loaded.settings.cluster.enabled:
        return []
    from mesh.member import NO_TOKEN
    from mesh.net.token import load_token
    from mesh.net.trust import load_trust

    noise = loaded.settings.cluster.noise
    problems = []
    try:
        if load_token(noise, os.environ) is None:
            problems.append(NO_TOKEN)
        load_trust(noise)
    except ConfigError as error:
        problems.append(error.message)
    return [Diagnostic("cluster", None, "", problem) for problem in problems]


def _memory_warnings(loaded: Loaded) -> list[Diagnostic]:
    """Return what is wrong with model files and figures beyond what loading the cookbook sees."""
    seen = [*_launch_problems(loaded), *_budget_problems(loaded)]
    return [Diagnostic(str(loaded.cookbook_path), None, profile.id, message) for profile, message in seen]


def _launch_problems(loaded: Loaded) -> Iterator[tuple[Profile, str]]:
    """Yield the files that llama-server could not load, and the flags that it does not know.

    Reads the headers of files, of each once, and asks each llama-server once what it knows.
    """
    from mesh.engine.children import child_env  # late: no other command pays for it
    from mesh.engine.examine import examine, found, refused_flags
    from mesh.engine.kinds import engines as engines_of

    told = [warning.message for warning in loaded.warnings]
    engines = engines_of(loaded.settings)
    for profile in loaded.catalog.profiles:
        env = child_env(profile, os.environ)
        if any(repr(model_file(profile)) in message for message in told):  # it is not there, or no GGUF file at all
            problem = refused_flags(profile, env, found(engines.of, profile))
        else:
            problem = examine(profile, env, engines.of).problem
        if problem is not None:
            yield profile, f"{problem}; it will not start"


def _budget_problems(loaded: Loaded) -> Iterator[tuple[Profile, str]]:
    """Yield the cookbook's figures that are more than this machine gives, where no number in config.yaml says so."""
    profiles = [profile for profile in loaded.catalog.profiles if any(profile.estimate.mib.values())]
    if not profiles:
        return
    limits = {"ram": loaded.settings.max_sysmem_mb, "vram": loaded.settings.max_vram_mb}
    given = BudgetLimits(limits["ram"], limits["vram"], loaded.settings.max_vram_mb_per_gpu)
    budget = capacity(given, _devices())
    gpus_mib = sum(budget.mib[kind] for kind in gpu_kinds(budget))
    available = {"ram": budget.mib.get("ram"), "vram": budget.mib.get("vram", gpus_mib or None)}
    for profile in profiles:
        for kind, key in (("ram", "estimated_sysmem_mb"), ("vram", "estimated_vram_mb")):
            need_mib, limit, mib = profile.estimate.mib.get(kind, 0), limits[kind], available[kind]
            if mib is None or need_mib <= mib or (isinstance(limit, int) and need_mib > limit):
                continue  # the last was told when the cookbook was loaded
            message = f"{key} {need_mib} is more than the {mib} MiB that this machine has for models"
            yield profile, f"{message}; it is refused here until it was measured to need less"


def _devices() -> Devices:
    """Return this machine's memory; a driver that cannot be read is `fit`'s and the node's to speak of."""
    from mesh.host.devices import DeviceReader, TelemetryError
    from mesh.host.memory import ram_total_mib

    reader = DeviceReader()
    try:
        return reader.read()
    except TelemetryError:
        return Devices(ram_total_mib=ram_total_mib())
    finally:
        reader.close()


def _profile(profile: Profile) -> dict[str, Any]:
    return {
        "id": profile.id,
        "key": profile.key,
        "aliases": list(profile.aliases),
        "engine": str(profile.engine),
        "engine_build": profile.engine_build,
        "model": _model_source(profile),
        "model_file_missing": _is_missing(profile),
        "max_instances": profile.max_instances,
        "estimate_mib": dict(profile.estimate.mib),
        "args": list(profile.args),
    }


def _model_source(profile: Profile) -> str:
    file = model_file(profile)
    if profile.hf_repo and file is None:
        return f"hf:{profile.hf_repo}" + (f"/{profile.hf_file}" if profile.hf_file else "")
    return file or "in llama_server_args"


def _is_missing(profile: Profile) -> bool:
    """Only a remark: the file may be on a share that is mounted later, or still be downloading."""
    file = model_file(profile)
    return file is not None and not os.path.exists(file)


def _report_errors(found: ConfigErrors, *, as_json: bool) -> None:
    if as_json:
        print_json({"ok": False, "errors": _as_json(found.diagnostics), "warnings": _as_json(found.warnings)})
        return
    console = stdout_console()
    print_warnings(console, map(str, found.warnings))
    for diagnostic in found.diagnostics:
        console.print(str(diagnostic), markup=False, soft_wrap=True)
    console.print(_count(found.diagnostics))


def _count(errors: Sized) -> str:
    return f"[bold red]{len(errors)} {'mistake' if len(errors) == 1 else 'mistakes'}[/]"


def _as_json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, Any]]:
    return [{"file": d.file, "line": d.line, "path": d.path, "message": d.message} for d in diagnostics]


def _print(result: dict[str, Any]) -> None:
    console = stdout_console()
    print_warnings(console, (str(Diagnostic(**warning)) for warning in result["warnings"]))
    console.print(f"config    {result['config'] or 'none, all defaults'}", markup=False)
    console.print(f"cookbook  {result['cookbook'] or 'none, no models'}", markup=False)
    engine = result["engine"]
    if engine["found"]:
        console.print(f"engine    {label(engine)}", markup=False)
    else:
        console.print(f"engine    none: {engine['reason']}", markup=False, style="red", soft_wrap=True)
    for what, key in (("build", "builds"), ("engine", "engines")):
        for name, one in result[key].items():
            found = label(one) if one["found"] else f"none: {one['reason']}"
            console.print(f"{what:<9} {name}: {found}", markup=False, soft_wrap=True)
    if result["profiles"]:
        console.print()
        print_table(["MODEL", "ALIASES", "FILE", "INSTANCES", "MEMORY"], [_row(p) for p in result["profiles"]])
        console.print()
    for error in result["errors"]:
        console.print(str(Diagnostic(**error)), markup=False, style="red", soft_wrap=True)
    console.print("[bold green]ok[/]" if result["ok"] else _count(result["errors"]))


def _row(profile: dict[str, Any]) -> list[str]:
    memory = ", ".join(f"{kind} {mib} MiB" for kind, mib in sorted(profile["estimate_mib"].items()) if mib)
    source = profile["model"] + (" (missing)" if profile["model_file_missing"] else "")
    return [profile["id"], ", ".join(profile["aliases"]) or "-", source, str(profile["max_instances"]), memory or "-"]
