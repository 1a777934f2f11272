"""Rules between the keys of config.yaml: what would start and then not work is refused by name (trap 85).

Pure but for looks at the disk: whether the TLS files are there, and what stands where builds put their symlinks.
Messages follow llamesh 1.20's.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mesh.config.builds import DEFAULT_BUILD, LlamaCpp
from mesh.config.diagnostics import KeyPath, Problem
from mesh.config.settings import CircuitBreaker, Cluster, Settings

_BUILD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def errors(settings: Settings) -> Iterator[Problem]:
    """Yield every contradiction in *settings*, the keys' own values being valid."""
    yield from _tls(settings)
    yield from _ports(settings)
    yield from _build_names(settings)
    yield from _build_paths(settings.build_settings())
    if settings.cluster.enabled:
        yield from _cluster(settings.cluster)
    if settings.wedge_detector.enabled:
        yield from _zeros(("wedge_detector",), settings.wedge_detector, ("window_ms", "sample_interval_ms"))
    if settings.auth.enabled and not (settings.auth.allowed_keys or settings.auth.admin_keys):
        yield Problem(
            ("auth", "allowed_keys"),
            "auth.enabled is true but auth.allowed_keys is empty; every request would be refused."
            " Add a key (secrets.yaml is the place) or set auth.enabled to false",
        )


def warnings(settings: Settings) -> Iterator[Problem]:
    """Yield what is allowed and probably not meant."""
    if not settings.auth.enabled and (settings.auth.allowed_keys or settings.auth.admin_keys):
        yield Problem(
            ("auth", "enabled"), "is false, so the keys given are not asked for and everybody may use this node"
        )
    if settings.cluster_tls.enabled:
        yield Problem(
            ("cluster_tls",), "is deprecated and has no effect; cluster.noise protects the links between nodes"
        )
    if not settings.server_tls.enabled and (settings.server_tls.cert_path or settings.server_tls.key_path):
        yield Problem(
            ("server_tls", "enabled"), "is false, so the certificate is not used and this node speaks plain HTTP"
        )
    yield from _without_effect(settings)


def _without_effect(settings: Settings) -> Iterator[Problem]:
    """Yield what llamesh's files may ask for and this version does not do yet."""
    cluster = settings.cluster
    for path, asked, missing in (
        (("cluster", "peers"), cluster.peers and not cluster.enabled, "this node joins no others"),
        *(
            (_place(name, "auto_update_interval_seconds"), asked, "without repo_url nothing is built")
            for name, asked in _unbuilt_updates(settings)
        ),
        (("wedge_detector", "enabled"), settings.wedge_detector.enabled, "stuck instances are not looked for"),
    ):
        if asked:
            yield Problem(path, f"has no effect: {missing}")


def _unbuilt_updates(settings: Settings) -> Iterator[tuple[str, bool]]:
    """Yield the builds that have no source, and whether they say how often it is to be fetched."""
    for name, build in settings.build_settings().items():
        if build.repo_url is None:
            own = settings.llama_cpp if name == DEFAULT_BUILD else settings.builds[name]
            yield name, own.auto_update_interval_seconds > 0


def _build_names(settings: Settings) -> Iterator[Problem]:
    for name in settings.builds:
        if name == DEFAULT_BUILD:
            yield Problem(("builds", name), "is what llama_cpp is called; choose another name, or set it up there")
        elif not _BUILD_NAME.fullmatch(name):
            yield Problem(
                ("builds", name),
                "is no name for a build; use letters, digits, '.', '_' and '-', 64 at most, the first"
                " of them a letter or a digit",
            )


def _build_paths(builds: Mapping[str, LlamaCpp]) -> Iterator[Problem]:
    """Yield what would make two builds, or a build and somebody else's file, take each other's place."""
    taken: dict[str, str] = {}
    for name, build in builds.items():
        for key in ("build_path", "binary_path"):
            path = os.path.abspath(os.path.expanduser(getattr(build, key)))
            if (other := taken.setdefault(path, name)) != name:
                yield Problem(_place(name, key), f"{path} is that of build '{other}' too; give each its own")
        binary = os.path.expanduser(build.binary_path)
        if build.is_made and os.path.lexists(binary) and not os.path.islink(binary):
            what = "a directory" if os.path.isdir(binary) else "a file"
            yield Problem(
                _place(name, "binary_path"),
                f"{binary} is {what}, and builds put a symlink there; move it away, or set enabled: false"
                " to run what is there as it is",
            )


def _place(build: str, key: str) -> KeyPath:
    return ("llama_cpp", key) if build == DEFAULT_BUILD else ("builds", build, key)


def _tls(settings: Settings) -> Iterator[Problem]:
    tls = settings.server_tls
    if settings.cluster_tls.enabled and not tls.enabled:
        state = "disabled" if "server_tls" in settings.model_fields_set else "not configured"
        yield Problem(
            ("cluster_tls", "enabled"), f"cluster TLS is enabled but server_tls is {state}; enable server_tls too"
        )
    if tls.enabled:
        for key, path in (("cert_path", tls.cert_path), ("key_path", tls.key_path)):
            if path is None:
                yield Problem(("server_tls", key), f"server_tls.enabled is true but server_tls.{key} is not set")
            elif not Path(path).expanduser().is_file():
                yield Problem(("server_tls", key), f"there is no such file: {path!r}")


def _ports(settings: Settings) -> Iterator[Problem]:
    ports = settings.llama_cpp_ports
    if ports is None:
        return
    for index, span in enumerate(ports.ranges):
        if span.start > span.end:
            message = f"llama_cpp_ports range has start {span.start} greater than end {span.end}; swap them"
            yield Problem(("llama_cpp_ports", "ranges", index), message)
    if not ports.ports and not ports.ranges:
        yield Problem(
            ("llama_cpp_ports",),
            "llama_cpp_ports is configured but provides no usable ports; give ports or ranges, or remove the section",
        )


def _zeros(path: tuple[str, ...], section: object, keys: tuple[str, ...]) -> Iterator[Problem]:
    for key in keys:
        if getattr(section, key) == 0:
            owner = "cluster mode" if path == ("cluster",) else ".".join(path)
            yield Problem((*path, key), f"is 0, but {owner} is enabled; set it above 0")


def _cluster(cluster: Cluster) -> Iterator[Problem]:
    if not cluster.noise.enabled:
        message = "is false, but nodes speak over Noise only; remove the line, or set cluster.enabled to false"
        yield Problem(("cluster", "noise", "enabled"), message)
    yield from _zeros(("cluster",), cluster, ("gossip_interval_seconds", "max_concurrent_gossip"))
    if cluster.circuit_breaker.enabled:
        yield from _breaker(cluster.circuit_breaker)


def _breaker(breaker: CircuitBreaker) -> Iterator[Problem]:
    path = ("cluster", "circuit_breaker")
    keys = ("failure_threshold", "success_threshold", "open_duration_base_ms", "open_duration_max_ms")
    yield from _zeros(path, breaker, keys)
    if breaker.open_duration_base_ms > breaker.open_duration_max_ms > 0:
        message = f"{breaker.open_duration_base_ms} is more than open_duration_max_ms, {breaker.open_duration_max_ms}"
        yield Problem((*path, "open_duration_base_ms"), message)
