"""Validates the data of a file against its model, and goes on with what is left after the first errors.

Rules between keys only run on data whose single values are right. So that one run reports everything, the wrong values
are taken out, the rest is checked, and nothing is said about a section or profile that lost something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mesh.config import checks
from mesh.config.cookbook import Entry, entries_of
from mesh.config.cookbook_file import CookbookFile
from mesh.config.diagnostics import KeyPath, Problem
from mesh.config.explain import problems_of
from mesh.config.settings import Settings

M = TypeVar("M", bound=BaseModel)


def _validate(model: type[M], data: Mapping[str, Any]) -> tuple[M | None, list[Problem]]:
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        return None, problems_of(error, model)


def validate_settings(data: Mapping[str, Any]) -> tuple[Settings, list[Problem]]:
    """Return settings for *data* and all that is wrong with it; with problems they only serve to check more."""
    settings, problems = _validate(Settings, data)
    if settings is None:
        settings, rest = _validate(Settings, _without(data, [_before_index(p.path) for p in problems]))
        assert settings is not None, rest
    damaged = [problem.path[:-1] for problem in problems]
    more = [p for p in checks.errors(settings) if not any(_related(p.path[:-1], path) for path in damaged if path)]
    return settings, problems + more


def validate_cookbook(data: Mapping[str, Any]) -> tuple[CookbookFile, list[Entry], list[Problem]]:
    """Return the cookbook and its profiles, without those in which something is wrong, and all that is wrong."""
    file, problems = _validate(CookbookFile, data)
    if file is not None:
        return file, entries_of(file), []
    broken = {_element(problem.path) for problem in problems}
    kept = _without(data, [path for path in broken if not _is_element(path)])
    places: list[KeyPath] = []
    if isinstance(models := kept.get("models"), list):
        kept["models"] = _sound_models(models, broken, places)
    file, rest = _validate(CookbookFile, kept)
    assert file is not None, rest
    entries = [Entry(path, entry.model, entry.profile) for path, entry in zip(places, entries_of(file), strict=True)]
    return file, entries, problems


def _sound_models(models: list[Any], broken: set[KeyPath], places: list[KeyPath]) -> list[Any]:
    """Return the models without *broken* parts; note in *places* where each remaining profile stood."""
    sound = []
    for m, model in enumerate(models):
        if ("models", m) in broken:
            continue
        paths: list[KeyPath] = [("models", m, "profiles", p) for p in range(len(model.get("profiles") or []))]
        places += (kept := [path for path in paths if path not in broken])
        sound.append({**model, "profiles": [model["profiles"][path[3]] for path in kept]})
    return sound


def _element(path: KeyPath) -> KeyPath:
    """Return the model or profile around *path*, or *path* itself outside of ``models``."""
    if path[:1] != ("models",) or len(path) == 1:
        return _before_index(path)
    inside_profile = path[2:3] == ("profiles",) and len(path) >= 4
    return path[:4] if inside_profile else path[:2]


def _is_element(path: KeyPath) -> bool:
    return len(path) >= 2 and isinstance(path[-1], int)


def _before_index(path: KeyPath) -> KeyPath:
    first = next((i for i, part in enumerate(path) if isinstance(part, int)), len(path))
    return path[:first]


def _without(data: Mapping[str, Any], paths: list[KeyPath]) -> dict[str, Any]:
    """Return a copy of *data* without the keys at *paths*."""
    heads = {path[0] for path in paths if len(path) == 1}
    result: dict[str, Any] = {}
    for key, value in data.items():
        if key in heads:
            continue
        below = [path[1:] for path in paths if len(path) > 1 and path[0] == key]
        result[key] = _without(value, below) if below and isinstance(value, Mapping) else value
    return result


def _related(one: KeyPath, other: KeyPath) -> bool:
    """Whether one path leads to the other."""
    return all(a == b for a, b in zip(one, other, strict=False))
