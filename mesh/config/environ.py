"""``LLAMESH_*`` variables as a layer of settings: ``LLAMESH_CLUSTER__ENABLED=true`` is ``cluster.enabled``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from mesh.config.diagnostics import KeyPath, suggestion
from mesh.config.explain import has_named_sections, section_in
from mesh.config.settings import Settings

PREFIX = "LLAMESH_"

#: Only a near miss is worth a suggestion: most such names are not ours at all.
_CLOSE = 0.9

#: Read by the command line, not settings of a node.
_NOT_SETTINGS = frozenset({"url", "api_key", "config", "cookbook", "secrets"})


class EnvironSource(EnvSettingsSource):
    """pydantic-settings' reader over a given environment. Lists are JSON, or words with commas between them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(Settings)
        self.env_vars = {name.lower(): value for name, value in environ.items()}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Return *value* parsed; what is no JSON stays as it is, for validation to refuse with its place."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            if get_origin(field.annotation) is tuple:
                return [word.strip() for word in str(value).split(",") if word.strip()]
            return value


def read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that *environ* makes, nested as in config.yaml."""
    return EnvironSource(environ)()


def variable(environ: Mapping[str, str], path: KeyPath) -> str | None:
    """Return the name of the variable that set *path* or the nearest section around it."""
    parts = [str(part) for part in path if isinstance(part, str)]
    names = {name.lower(): name for name in environ}
    while parts:
        if found := names.get((PREFIX + "__".join(parts)).lower()):
            return found
        parts.pop()
    return None


def unknown_variables(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return names that begin like settings and are none, each with a message.

    No error: Kubernetes itself sets LLAMESH_SERVICE_HOST and the like next to a service called "llamesh".
    """
    known = Settings.model_fields
    candidates = [f"{PREFIX}{path}".upper() for path in _paths(Settings)]
    found = []
    for name in environ:
        if name.upper().startswith(PREFIX):
            top = name[len(PREFIX) :].lower().split("__")[0].split("[")[0]
            if top not in known and top not in _NOT_SETTINGS:
                found.append((name, f"is not a setting and is ignored{suggestion(name, candidates, cutoff=_CLOSE)}"))
    return found


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key of *model* as variables spell it: sections and keys with ``__`` between them."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if inner := section_in(field.annotation):
            named = "NAME__" if has_named_sections(field.annotation) else ""
            yield from _paths(inner, f"{prefix}{name}__{named}")
