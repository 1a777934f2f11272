"""Where git fetches from, told to it by its environment: what is in argv, every local user can read (trap 101).

A name stands for the URL on the command line. Its user and password are left out even of that URL, for git passes URLs
on to its helpers in argv; a credential helper says them when the server asks. Nothing gets into ``.git/config``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

#: what the URL is called on git's command line; nobody else's remote should have that name
NAME: Final = "llama-mesh-source"
_USER, _PASSWORD = "LLAMA_MESH_GIT_USER", "LLAMA_MESH_GIT_PASSWORD"
#: a shell function, as git wants it; echo and printf are part of the shell, so they have no argv
_HELPER: Final = (
    f"""!f() {{ test "$1" = get && printf 'username=%s\\npassword=%s\\n' "${_USER}" "${_PASSWORD}"; }}; f"""
)
_WITH_USER: Final = re.compile(r"(?P<scheme>https?://)(?P<user>[^/?#@:]*)(?P<password>:[^/?#@]*)?@(?P<rest>.*)", re.S)


@dataclass(frozen=True, slots=True)
class Remote:
    """A URL, split into what anybody may see and what not."""

    url: str  #: without user and password, if git can be told them in another way
    user: str | None = None
    password: str = ""

    def environment(self, environ: Mapping[str, str], *, as_origin: bool = False) -> dict[str, str]:
        """Return what to add to *environ* so that git knows the remote ``NAME``.

        *as_origin*: it is also what the URLs of submodules are relative to.
        """
        settings = [(f"remote.{NAME}.url", self.url)]
        if as_origin:
            settings.append(("remote.origin.url", self.url))
        secrets: dict[str, str] = {}
        if self.user is not None:
            helper = f"credential.{_host(self.url)}.helper"
            settings += [(helper, ""), (helper, _HELPER)]  # the first: nobody else's helper is to store them
            secrets = {_USER: self.user, _PASSWORD: self.password}
        return _as_environment(settings, environ) | secrets


def remote_of(url: str) -> Remote:
    """Return *url* as it may be shown, and its secrets."""
    found = _WITH_USER.fullmatch(url)
    if found is None:
        return Remote(url)
    password = (found["password"] or ":")[1:]
    return Remote(found["scheme"] + found["rest"], unquote(found["user"]), unquote(password))


def _host(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{re.split('[/?#]', rest, maxsplit=1)[0]}"


def _as_environment(settings: Sequence[tuple[str, str]], environ: Mapping[str, str]) -> dict[str, str]:
    """Return *settings* for git, after those that are in *environ* already."""
    text = environ.get("GIT_CONFIG_COUNT", "")
    first = int(text) if text.isascii() and text.isdigit() else 0
    result = {"GIT_CONFIG_COUNT": str(first + len(settings))}
    for number, (key, value) in enumerate(settings, start=first):
        result |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return result
