"""Finds the node that a command talks to, and talks to it. Every way that can fail becomes a CliError with a fix."""

from __future__ import annotations

import argparse
import json
import os
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from mesh.cli.configuration import KEY_VARIABLE, NO_COOKBOOK, URL_VARIABLE, load_from
from mesh.cli.failure import CliError
from mesh.config.address import join_address
from mesh.config.diagnostics import ConfigErrors
from mesh.config.settings import Settings

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Node:
    """Where a node is and how to be let in."""

    url: str
    key: str | None = None
    tls: ssl.SSLContext | None = None

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, as far as its address tells."""
        return _is_loopback(self.url)

    def get(self, path: str) -> Any:
        """Return the JSON that GET *path* answers."""
        return self._call("GET", path, None, ANSWER_TIMEOUT_S)

    def post(self, path: str, body: dict[str, Any], *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Any:
        """Return the JSON that POST *path* answers; None waits for ever."""
        return self._call("POST", path, body, timeout_s)

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        silence_s: float | None = None,
    ) -> Iterator[httpx.Response]:
        """Open a streamed answer that may pause for *silence_s*, None: as long as it likes; not the 2xx ones raise."""
        with (
            self._errors_explained(),
            self._client(silence_s) as client,
            client.stream(method, path, params=params, json=body) as response,
        ):
            if not response.is_success:
                response.read()
                raise refusal(response, self.url)
            yield response

    def upload(self, path: str, body: Iterable[bytes], headers: Mapping[str, str], *, model: str) -> httpx.Response:
        """POST *body* as it comes, for *model*, and wait for the answer as long as it takes; not the 2xx ones raise."""
        with self._errors_explained(), self._client(None) as client:
            response = client.post(path, content=body, headers=headers)
        if not response.is_success:
            raise refusal(response, self.url, model=model)
        return response

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None) -> Any:
        with self._errors_explained(), self._client(timeout_s) as client:
            response = client.request(method, path, json=body)
        if not response.is_success:
            raise refusal(response, self.url)
        try:
            return response.json()
        except ValueError as error:
            raise CliError(
                f"{self.url}{path} did not answer with JSON: is this a llama-mesh node?",
                fix="Name the node with --url, for example --url http://127.0.0.1:8080.",
            ) from error

    def _client(self, timeout_s: float | None) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            verify=self.tls or ssl.create_default_context(),
            trust_env=not _is_loopback(self.url),  # a proxy must not be asked for this machine
        )

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                fix = "Trust its certificate with --ca FILE."
            elif self.url.startswith("https:") and re.search("SSL|reset|disconnected", str(error)):
                fix = self._plain_http()
            else:
                fix = "Start a node with 'llama-mesh serve', or name one with --url or LLAMESH_URL."
            raise CliError(f"no node answers at {self.url}: {error}", fix=fix) from error
        except httpx.TimeoutException as error:
            raise CliError(f"the node at {self.url} did not answer in time", fix="Look at its log.") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            fix = self._plain_http() if self.url.startswith("https:") else "Is it http or https?"
            raise CliError(f"talking to {self.url} failed: {reason}", fix=fix) from error

    def _plain_http(self) -> str:
        return f"It may speak plain HTTP: try --url {self.url.replace('https:', 'http:', 1)}."


def refusal(response: httpx.Response, url: str, *, model: str | None = None) -> CliError:
    """Return the error for an answer that is not 2xx, in the node's own words. *model*: if the body does not tell."""
    message = _message_of(response)
    model = model or _asked_model(response)
    match response.status_code:
        case 401 | 403:
            fix: str | None = (
                "Give the key with --key or LLAMESH_API_KEY; admin routes may need one of auth.admin_keys."
            )
        case 404 if _error_of(response).get("type") == "build_not_found":
            fix = "'llama-mesh builds' shows what there is."
        case 404 if "odel" in message:
            fix = "'llama-mesh models' lists the names that it knows."
        case 404 | 405:
            message, fix = f"{url} does not know {response.request.url.path}", "Is this a llama-mesh node? See --url."
        case 503 if _error_of(response).get("type") == "instance_failed":  # trying again would not mend it
            fix = f"See 'llama-mesh logs {model}'."
        case 503 if _error_of(response).get("type") == "engine_missing":
            fix = "Run 'llama-mesh check' on the node's machine."
        case 503 if _error_of(response).get("type") == "model_too_large":
            fix = f"'llama-mesh fit {model}' shows what takes how much."
        case 503 if retry_after := response.headers.get("retry-after"):
            fix = f"Try again in {retry_after} s."
        case 400 if _error_of(response).get("param") == "node":
            fix = "'llama-mesh nodes' lists them."
        case _:
            fix = None
    return CliError(message, fix=fix, http_status=response.status_code, answer=_json_of(response))


def _json_of(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of OpenAI's envelope, empty without one."""
    try:
        error = response.json()["error"]
    except (ValueError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _asked_model(response: httpx.Response) -> str:
    """Return the model that the refused request was about."""
    try:
        return str(json.loads(response.request.content)["model"])
    except (ValueError, LookupError, TypeError):
        return "MODEL"


def _message_of(response: httpx.Response) -> str:
    """Read the OpenAI envelope, the admin routes' {"status", "message"}, or whatever text there is."""
    fallback = f"HTTP {response.status_code} {response.text[:500]}".strip()
    try:
        body = response.json()
    except ValueError:
        return fallback
    if not isinstance(body, dict):
        return fallback
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else body.get("message")
    return str(message or fallback)


def find(arguments: argparse.Namespace) -> Node:
    """Return the node that the flags, the environment or the configuration point to, in this order.

    The configuration's own keys go to this machine only: a mistyped --url must not receive an admin key (trap 102).
    """
    url = arguments.url or os.environ.get(URL_VARIABLE)
    key = arguments.key or os.environ.get(KEY_VARIABLE)
    elsewhere = url is not None and url != "" and not _is_loopback(_checked(url))
    settings = None if elsewhere or (url and key) else _settings(arguments, required=not url)
    if not key and settings is not None and settings.auth.enabled:
        key = next(iter((*settings.auth.admin_keys, *settings.auth.allowed_keys)), None)
    if not url:
        assert settings is not None
        return Node(local_url(settings), key, _local_trust(settings, arguments.ca))
    return Node(_checked(url), key, _trust(arguments.ca))


def is_named(arguments: argparse.Namespace) -> bool:
    """Whether the user said which node, so that no other way to an answer will do."""
    return bool(arguments.url or os.environ.get(URL_VARIABLE))


def _settings(arguments: argparse.Namespace, *, required: bool) -> Settings | None:
    """Load the configuration; a broken one matters only if it was named or nothing else says where the node is."""
    try:
        return load_from(arguments, cookbook=NO_COOKBOOK).settings
    except ConfigErrors:
        if required or arguments.config or arguments.secrets:
            raise
        return None


def local_url(settings: Settings) -> str:
    """Return where a node with these settings is reached from its own machine."""
    host, port = settings.listen
    if port == 0:
        raise CliError("listen_addr has port 0: any free one", fix="Name the node with --url; its log says the port.")
    scheme = "https" if settings.server_tls.enabled else "http"
    return f"{scheme}://{join_address({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), port)}"


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.geturl().rstrip("/").removesuffix("/v1")
    except ValueError:
        pass
    raise CliError(f"'{url}' is no URL of a node", fix="Write it like http://127.0.0.1:8080.", exit_code=2)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _trust(ca: Path | None) -> ssl.SSLContext | None:
    if ca is None:
        return None
    try:
        return ssl.create_default_context(cafile=str(ca))
    except OSError as error:  # SSLError is one
        raise CliError(f"cannot use {ca} as a certificate: {error}", fix="--ca takes a PEM file.") from error


def _local_trust(settings: Settings, ca: Path | None) -> ssl.SSLContext | None:
    """Trust this node's own certificate file. It is made out to a public name, and we ask for 127.0.0.1."""
    if ca is not None or not settings.server_tls.enabled or not settings.server_tls.cert_path:
        return _trust(ca)
    context = _trust(Path(settings.server_tls.cert_path).expanduser())
    assert context is not None
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the leaf itself is the anchor
    return context
