"""Loads config.yaml, secrets.yaml, cookbook.yaml, the environment and the flags into one ``Loaded``.

Precedence: flag > environment > secrets.yaml > config.yaml > default. Never half-applies anything: either everything is
valid, or ``ConfigErrors`` lists every problem of every source with its place.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.config import checks
from mesh.config.address import join_address, split_address
from mesh.config.cookbook import assemble, unserved
from mesh.config.diagnostics import ConfigErrors, Diagnostic, KeyPath, Problem, dotted, suggestion
from mesh.config.engines import keys_of
from mesh.config.environ import read_environ, unknown_variables, variable
from mesh.config.profile import Catalog
from mesh.config.settings import Settings
from mesh.config.validation import validate_cookbook, validate_settings
from mesh.config.yaml_source import Source, read_yaml

__all__ = ["ConfigErrors", "Diagnostic", "Loaded", "load", "load_catalog"]

DEFAULT_CONFIG = Path("config.yaml")
DEFAULT_COOKBOOK = Path("cookbook.yaml")
DEFAULT_SECRETS = Path("secrets.yaml")

_SECRET_SECTIONS = ("auth", "server_tls", "cluster_tls")
_NO_CANARY = "new builds are compared with the old on a tiny model only"
_OTHER_FORMATS = (".toml", ".ini", ".ron", ".json5")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that is valid as a whole. A path is None if there was no file and none was asked for."""

    settings: Settings
    catalog: Catalog
    warnings: tuple[Diagnostic, ...]
    config_path: Path | None
    cookbook_path: Path | None


@dataclass(frozen=True, slots=True)
class _Layer:
    """Settings from one origin, and how to point at one of them there."""

    data: Mapping[str, Any]
    at: Callable[[KeyPath, str], Diagnostic]


def load(
    *,
    config: Path | None,
    cookbook: Path | None,
    secrets: Path | None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str],
) -> Loaded:
    """Return the configuration, or raise ``ConfigErrors`` with everything that is wrong in any of its sources.

    A path that is given must exist; the default files in the working directory may be missing. *overrides* are the
    flags: keys as in config.yaml, nested or dotted, and ``host`` and ``port`` as parts of ``listen_addr``.
    """
    config_path, cookbook_path = _existing(config, DEFAULT_CONFIG), _existing(cookbook, DEFAULT_COOKBOOK)
    layers, errors, warnings = _layers(config_path, _existing(secrets, DEFAULT_SECRETS), environ)
    layers.append(_flags(overrides or {}, layers))
    settings, problems = validate_settings(_merged(layers))
    errors += [_place(problem, layers) for problem in problems]
    if not problems:  # what is only a guess at the settings deserves no remarks
        warnings += [_place(problem, layers) for problem in checks.warnings(settings)]
    catalog = Catalog(default_model=settings.default_model)
    if cookbook_path is not None:
        catalog, found, cautions = _read_catalog(cookbook_path, settings, 0)
        errors += found
        warnings += cautions
    if errors:
        raise ConfigErrors(_in_reading_order(errors), warnings)
    warnings += [_place(problem, layers) for problem in _unknown_models(catalog, settings)]
    return Loaded(settings, catalog, tuple(warnings), config_path, cookbook_path)


def load_catalog(path: Path, settings: Settings, version: int) -> tuple[Catalog, tuple[Diagnostic, ...]]:
    """Return the catalog of the cookbook at *path* and its warnings; raise ``ConfigErrors`` if it cannot be used.

    For a reload: a file that is suddenly blank is half of a save, or one that met a full disk, and no reason to stop
    every model.
    """
    catalog, errors, warnings = _read_catalog(path, settings, version)
    if not errors and not catalog.profiles and not path.read_bytes().strip():
        errors = [Diagnostic(str(path), None, "", "the file is empty; write 'models: []' to serve no models")]
    if errors:
        raise ConfigErrors(errors)
    warnings += [
        Diagnostic(str(path), None, "", f"{dotted(p.path)} {p.message}") for p in _unknown_models(catalog, settings)
    ]
    return catalog, tuple(warnings)


def _existing(given: Path | None, default: Path) -> Path | None:
    """Return *given*, be it there or not, or *default* if that exists. A broken link counts: it was meant to."""
    return given if given is not None else default if default.exists() or default.is_symlink() else None


def _layers(
    config_path: Path | None, secrets_path: Path | None, environ: Mapping[str, str]
) -> tuple[list[_Layer], list[Diagnostic], list[Diagnostic]]:
    config = _read_config(config_path) if config_path else Source("config.yaml")
    secrets = read_yaml(secrets_path, fold_keys=True) if secrets_path else Source("secrets.yaml")
    known = {key: value for key, value in secrets.data.items() if key in _SECRET_SECTIONS}
    errors = [*config.problems, *secrets.problems, *_foreign_secrets(secrets)]
    warnings = [Diagnostic(name, None, "", message) for name, message in unknown_variables(environ)]
    if secrets_path and not secrets.problems:
        warnings += _open_secrets(secrets_path)

    def at_variable(path: KeyPath, message: str) -> Diagnostic:
        return Diagnostic(variable(environ, path) or "environment", None, dotted(path), message)

    layers = [_Layer(config.data, config.at), _Layer(known, secrets.at), _Layer(read_environ(environ), at_variable)]
    return layers, errors, warnings


def _read_config(path: Path) -> Source:
    if path.suffix.lower() in _OTHER_FORMATS:
        message = f"{path.suffix} files are not supported; write it as YAML (or JSON, which is YAML too)"
        return Source(str(path), problems=(Diagnostic(str(path), None, "", message),))
    return read_yaml(path, fold_keys=True)


def _foreign_secrets(secrets: Source) -> list[Diagnostic]:
    return [
        secrets.at((key,), f"unknown key{suggestion(key, _SECRET_SECTIONS)}; known here: {', '.join(_SECRET_SECTIONS)}")
        for key in secrets.data
        if key not in _SECRET_SECTIONS
    ]


def _open_secrets(path: Path) -> list[Diagnostic]:
    """Warn of a file that anyone but its owner may access; as the service's user owns it, nobody else needs to."""
    info = path.stat()
    mode = stat.S_IMODE(info.st_mode)
    if not mode & 0o077:
        return []
    owned = os.geteuid() in (0, info.st_uid)
    run = f"chmod 600 {path}" if owned else f"chown {os.geteuid()} {path} && chmod 600 {path}, as root"
    return [Diagnostic(str(path), None, "", f"other users may access this file (mode {mode:04o}); run: {run}")]


def _flags(overrides: Mapping[str, Any], layers: Iterable[_Layer]) -> _Layer:
    data: dict[str, Any] = {}
    for key, value in overrides.items():
        if value is not None and key not in ("host", "port"):
            *parents, last = key.split(".")
            for parent in reversed(parents):
                last, value = parent, {last: value}
            data = _merge(data, {last: value})
    host, port = overrides.get("host"), overrides.get("port")
    if host is not None or port is not None:
        data["listen_addr"] = _address(host, port, _merged(layers).get("listen_addr"))
    return _Layer(data, lambda path, message: Diagnostic("command line", None, dotted(path), message))


def _address(host: str | None, port: int | None, configured: object) -> str:
    """Return the listen address with *host* and *port* put in; an invalid configured one counts as not given."""
    try:
        base = split_address(str(configured))
    except ValueError:
        base = split_address(Settings.model_fields["listen_addr"].default)
    return join_address(base[0] if host is None else host, base[1] if port is None else port)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return *below* with *above* laid over it: mappings key by key, everything else whole."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = _merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return result


def _merged(layers: Iterable[_Layer]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for layer in layers:
        result = _merge(result, layer.data)
    return result


def _place(problem: Problem, layers: list[_Layer]) -> Diagnostic:
    """Point at the strongest layer that has the key, or else its nearest parent."""
    path = problem.path
    while path:
        for layer in reversed(layers):
            if _has(layer.data, path):
                return layer.at(problem.path, problem.message)
        path = path[:-1]
    return layers[0].at(problem.path, problem.message)


def _has(data: Any, path: KeyPath) -> bool:
    for part in path:
        in_list = isinstance(part, int) and isinstance(data, list) and part < len(data)
        if not in_list and not (isinstance(data, Mapping) and part in data):
            return False
        data = data[part]
    return True


def _read_catalog(path: Path, settings: Settings, version: int) -> tuple[Catalog, list[Diagnostic], list[Diagnostic]]:
    source = read_yaml(path)
    file, entries, problems = validate_cookbook(source.data)
    built = assemble(entries, file.defaults, settings, version)
    errors = [*source.problems, *(_in_source(problem, source) for problem in (*problems, *built.errors))]
    remarks = built.warnings if problems else [*unserved(file), *built.warnings]
    return built.catalog, _in_reading_order(errors), [_in_source(problem, source) for problem in remarks]


def _in_reading_order(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Return *diagnostics* by line, file after file."""
    files = list(dict.fromkeys(diagnostic.file for diagnostic in diagnostics))
    return sorted(diagnostics, key=lambda diagnostic: (files.index(diagnostic.file), diagnostic.line or 0))


def _in_source(problem: Problem, source: Source) -> Diagnostic:
    second = source.line(problem.other) if problem.other else None
    return source.at(problem.path, problem.message + (f" (the other is in line {second})" if second else ""))


def _unknown_models(catalog: Catalog, settings: Settings) -> Iterator[Problem]:
    """Yield the settings that name a model which the cookbook does not have, or not for this."""
    named: list[tuple[KeyPath, str | None, str]] = []
    if not settings.cluster.enabled:  # else another node may have it
        named.append((("default_model",), settings.default_model, "requests that name no model will get 404"))
    named += [(path, name, _NO_CANARY) for path, name in _canaries(settings)]
    for path, name, then in named:
        if name is not None and name.lower() not in catalog.names:
            yield Problem(path, f"'{name}' is not in the cookbook{suggestion(name, catalog.names)}; {then}")
    yield from _canaries_of_other_engines(catalog, settings)


def _canaries_of_other_engines(catalog: Catalog, settings: Settings) -> Iterator[Problem]:
    """Yield the canaries that no build of llama.cpp runs."""
    for path, name in _canaries(settings):
        profile = None if name is None else catalog.names.get(name.lower())
        if profile is not None and not (keys := keys_of(profile.engine)).has_builds:
            yield Problem(path, f"'{name}' is run by {keys.program}, not by a build of llama.cpp; {_NO_CANARY}")


def _canaries(settings: Settings) -> Iterator[tuple[KeyPath, str | None]]:
    yield ("llama_cpp", "canary_profile"), settings.llama_cpp.canary_profile
    for name, build in settings.builds.items():
        yield ("builds", name, "canary_profile"), build.canary_profile
