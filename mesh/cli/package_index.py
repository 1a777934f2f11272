"""Fetches single files from a Python package index (PyPI, or whatever pip is configured to use), checked by sha256.

Standard library only: `scripts/bootstrap.py` uses it before anything is installed. It never trusts the index about
content: callers bring the expected sha256, so a mirror needs no trust and a resumed download cannot mix two versions.
"""

from __future__ import annotations

import base64
import configparser
import errno
import hashlib
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from mesh.cli.failure import CliError

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT_S = 30.0
ATTEMPTS = 4
_CHUNK_BYTES = 1 << 18

#: (bytes done so far, bytes in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file of one release, known by content before it is fetched."""

    project: str
    filename: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Listed:
    """One file as the index lists it; *sha256* is the index's claim, if it makes one."""

    filename: str
    url: str
    sha256: str | None


class Index:
    """A package index in the "simple" HTML form, and the TLS trust that goes with it."""

    def __init__(self, environ: Mapping[str, str], *, retry_pause_s: float = 1.0) -> None:
        self._retry_pause_s = retry_pause_s
        config = _pip_config(environ)
        self.url = (environ.get("PIP_INDEX_URL") or config.get("index-url") or DEFAULT_INDEX).rstrip("/")
        self._shown = _split_credentials(self.url)[0]
        self._tls = _tls_context(environ, config.get("cert"))

    def files(self, project: str) -> list[Listed]:
        """Return all files that the index lists for *project*."""
        page_url = f"{self.url}/{re.sub(r'[-_.]+', '-', project).lower()}/"
        try:
            with self._open(page_url, {"Accept": "text/html"}) as response:
                page, base = response.read(), response.geturl()
        except (OSError, HTTPException) as error:
            raise _unreachable(page_url, error) from error
        links = _Links()
        links.feed(page.decode("utf-8", "replace"))
        return [_listed(urllib.parse.urljoin(base, href)) for href in links.hrefs]

    def fetch(self, file: PinnedFile, target: Path, progress: Progress = lambda done, total: None) -> None:
        """Put *file* at *target*, whole or not at all; an earlier interrupted try is continued where it stopped."""
        part = target.with_name(f"{target.name}.{file.sha256[:12]}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists()
        if not _is_complete(part, file):
            self._download(self._url_of(file), part, file, progress)
        if (found := sha256_of(part)) != file.sha256:
            part.unlink()
            if resumed:  # the kept beginning may be what is wrong: once more from nothing
                return self.fetch(file, target, progress)
            raise CliError(
                f"{file.filename} from {self._shown} has sha256 {found}, expected {file.sha256}",
                fix="The index or a proxy served something else; try another network or set PIP_INDEX_URL.",
            )
        part.replace(target)
        return None

    def _url_of(self, file: PinnedFile) -> str:
        for listed in self.files(file.project):
            if listed.filename == file.filename:
                return listed.url
        raise CliError(
            f"{self._shown} does not list {file.filename}",
            fix="Set PIP_INDEX_URL to an index that has it, for example https://pypi.org/simple.",
        )

    def _download(self, url: str, part: Path, file: PinnedFile, progress: Progress) -> None:
        """Append to *part* until it has the full size, reconnecting a few times if the connection breaks."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._append(url, part, file.size_bytes, progress)
            except (OSError, HTTPException) as error:
                if attempt == ATTEMPTS or not _worth_retrying(error):
                    raise _download_failed(url, part, error) from error
            if _is_complete(part, file):
                return
            time.sleep(self._retry_pause_s * attempt)
        done = part.stat().st_size if part.exists() else 0
        raise CliError(
            f"{_split_credentials(url)[0]} ended after {done:,} of {file.size_bytes:,} bytes, {ATTEMPTS} times",
            fix="Run the command again: it continues where it stopped.",
        )

    def _append(self, url: str, part: Path, total: int, progress: Progress) -> None:
        done = part.stat().st_size if part.exists() else 0
        with self._open(url, {"Range": f"bytes={done}-"} if done else {}) as response:
            if done and response.status != 206:  # this server cannot continue: from the beginning then
                done = 0
            with part.open("ab" if done else "wb") as out:
                progress(done, total)
                # One byte too many is enough to know that it is not the file; an endless body must not fill the disk.
                while done <= total and (chunk := response.read1(_CHUNK_BYTES)):
                    out.write(chunk)
                    done += len(chunk)
                    progress(done, total)

    @contextmanager
    def _open(self, url: str, headers: Mapping[str, str]) -> Iterator[HTTPResponse]:
        plain_url, credentials = _split_credentials(url)
        if not credentials and _host(url) == _host(self.url):
            credentials = _split_credentials(self.url)[1]
        request = urllib.request.Request(plain_url, headers={"User-Agent": "llama-mesh", **headers, **credentials})
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S, context=self._tls)
        except urllib.error.HTTPError as error:
            error.close()  # it is an open response too
            raise
        with response:
            yield response


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]


def sha256_of(path: Path) -> str:
    """Return the file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_complete(part: Path, file: PinnedFile) -> bool:
    """Whether there is nothing more to fetch; more bytes than expected count, the hash will tell."""
    return part.exists() and part.stat().st_size >= file.size_bytes


def _listed(url: str) -> Listed:
    url, _, fragment = url.partition("#")
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1])
    algorithm, _, digest = fragment.partition("=")
    return Listed(name, url, digest if algorithm == "sha256" else None)


def _host(url: str) -> str | None:
    return urllib.parse.urlsplit(url).hostname


def _split_credentials(url: str) -> tuple[str, dict[str, str]]:
    """Move ``user:password@`` from *url* into a header, as pip does; urllib would look it up as a host name."""
    parts = urllib.parse.urlsplit(url)
    userinfo, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    token = base64.b64encode(urllib.parse.unquote(userinfo).encode()).decode()
    return urllib.parse.urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {token}"}


def _pip_config(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the ``[global]`` section of pip's configuration files, later files winning as in pip."""
    home = Path(environ.get("HOME") or "~").expanduser()
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path("/etc/pip.conf"), home / ".pip/pip.conf", user / "pip/pip.conf"]
    if explicit := environ.get("PIP_CONFIG_FILE"):
        files = [] if explicit == os.devnull else [*files, Path(explicit)]
    parser = configparser.RawConfigParser()
    try:
        parser.read(files, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return {}  # pip itself will complain about its own file; the default index is a fair guess
    return dict(parser["global"]) if parser.has_section("global") else {}


def _tls_context(environ: Mapping[str, str], configured_bundle: str | None) -> ssl.SSLContext:
    """Trust the system (SSL_CERT_FILE and SSL_CERT_DIR included), certifi if there, and pip's own bundle."""
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        pass
    else:  # python.org's macOS builds trust nothing by default
        context.load_verify_locations(certifi.where())
    for name in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"):
        if (bundle := environ.get(name)) and os.path.isfile(bundle):
            context.load_verify_locations(bundle)
    if configured_bundle and os.path.isfile(configured_bundle):
        context.load_verify_locations(configured_bundle)
    return context


def _worth_retrying(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    if isinstance(error, urllib.error.URLError):  # never connected: no name, refused, bad certificate
        return isinstance(error.reason, TimeoutError | ConnectionResetError)
    return not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError)


def _unreachable(url: str, error: Exception) -> CliError:
    return CliError(
        f"cannot read {_split_credentials(url)[0]}: {_reason(error)}",
        fix="Check the network; behind a proxy set HTTPS_PROXY, for a mirror PIP_INDEX_URL, for its CA SSL_CERT_FILE.",
    )


def _download_failed(url: str, part: Path, error: Exception) -> CliError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CliError(
            f"no room for the download in {part.parent}: {error.strerror}",
            fix="Free some space, or set LLAMA_MESH_CACHE to a directory on a larger disk.",
        )
    return _unreachable(url, error)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(getattr(error, "reason", "")) or str(error) or type(error).__name__
