"""Files, environment and flags together: precedence, places of errors, secrets, and reloading."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.config.loader import ConfigErrors, load, load_catalog
from mesh.config.settings import Settings
from mesh.errors import ConfigError
from tests.config.files import Files

COOKBOOK = "models: [{name: m, profiles: [{hf_repo: a/b}]}]\n"


def test_flag_beats_environment_beats_secrets_beats_file(files: Files) -> None:
    config = "auth: {enabled: true, required_header: A, allowed_keys: [file]}\nmax_hops: 1"
    environ = {"LLAMESH_AUTH__REQUIRED_HEADER": "C"}
    settings = files.load(config, None, "auth: {required_header: B, allowed_keys: [secret]}").settings
    assert (settings.auth.required_header, settings.auth.allowed_keys) == ("B", ("secret",))
    settings = files.load(environ=environ).settings
    assert (settings.auth.required_header, settings.auth.allowed_keys, settings.max_hops) == ("C", ("secret",), 1)
    settings = files.load(environ=environ, overrides={"auth.required_header": "D", "max_hops": None}).settings
    assert (settings.auth.required_header, settings.max_hops) == ("D", 1)


def test_secrets_do_not_switch_auth_off(files: Files) -> None:
    """A secrets file with keys alone must leave the rest of the section as config.yaml has it."""
    settings = files.load("auth: {enabled: true}", None, "auth: {allowed_keys: [k]}").settings
    assert settings.auth.enabled


@pytest.mark.parametrize(
    ("overrides", "address"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0:9"),
        ({"port": 81}, "10.0.0.1:81"),
        ({"host": "::1", "port": 0}, "[::1]:0"),
        ({"host": None, "port": None}, "10.0.0.1:9"),
        ({"listen_addr": "1.2.3.4:5"}, "1.2.3.4:5"),
    ],
)
def test_host_and_port_are_parts_of_the_address(files: Files, overrides: dict[str, object], address: str) -> None:
    """Trap 68."""
    assert files.load("listen_addr: 10.0.0.1:9", overrides=overrides).settings.listen_addr == address


def test_environment_sets_any_key(files: Files) -> None:
    environ = {
        "LLAMESH_MAX_VRAM_MB": "24GB",
        "llamesh_cluster__enabled": "TRUE",
        "LLAMESH_CLUSTER__CIRCUIT_BREAKER__FAILURE_THRESHOLD": "7",
        "LLAMESH_CLUSTER__PEERS": "a:1, b:2",
        "LLAMESH_AUTH__ALLOWED_KEYS": '["k,1"]',
        "LLAMESH_LLAMA_CPP_PORTS__PORTS": "[9001]",
        "LLAMESH_LOGGING": '{"level": "debug"}',
        "PATH": "/bin",
    }
    settings = files.load("cluster: {enabled: false, gossip_interval_seconds: 9}", environ=environ).settings
    assert (settings.max_vram_mb, settings.cluster.enabled, settings.cluster.peers) == (24576, True, ("a:1", "b:2"))
    assert (settings.cluster.circuit_breaker.failure_threshold, settings.cluster.gossip_interval_seconds) == (7, 9)
    assert (settings.auth.allowed_keys, settings.logging.level) == (("k,1",), "debug")
    assert settings.llama_cpp_ports is not None
    assert settings.llama_cpp_ports.numbers() == (9001,)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("LLAMESH_MAX_HOPS", "x", "LLAMESH_MAX_HOPS: max_hops: expected a whole number, got 'x'"),
        ("LLAMESH_HTTP__IDLE_TIMEOUT_SECONDS", "0", "LLAMESH_HTTP__IDLE_TIMEOUT_SECONDS: http.idle_timeout"),
        ("LLAMESH_CLUSTER__ENABLD", "1", "LLAMESH_CLUSTER__ENABLD: cluster.enabld: unknown key; did you"),
        ("LLAMESH_HTTP", "x", "LLAMESH_HTTP: http: expected a mapping of keys, got 'x'"),
        ("LLAMESH_LOGGING", '{"level": "x"}', "LLAMESH_LOGGING: logging.level: expected one of: debug"),
        ("LLAMESH_NODE_ID", "", "LLAMESH_NODE_ID: node_id: is empty"),
    ],
)  # fmt: skip
def test_errors_name_the_variable(files: Files, name: str, value: str, expected: str) -> None:
    (error,) = files.errors("max_hops: 3", environ={name: value})
    assert error.startswith(expected)


def test_unknown_variables_are_only_a_warning(files: Files) -> None:
    """Kubernetes makes such names next to a service called llamesh; the command line has LLAMESH_URL."""
    environ = {"LLAMESH_SERVICE_HOST": "10.0.0.1", "LLAMESH_URL": "http://x", "LLAMESH_MAX_VRAM": "1"}
    service, typo = files.warnings(environ=environ)
    assert service.startswith("LLAMESH_SERVICE_HOST: is not a setting and is ignored")
    assert typo == "LLAMESH_MAX_VRAM: is not a setting and is ignored; did you mean 'LLAMESH_MAX_VRAM_MB'?"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LLAMESH_AUTH_ENABLED", "LLAMESH_AUTH__ENABLED"),
        ("LLAMESH_SERVER_TLS_CERT_PATH", "LLAMESH_SERVER_TLS__CERT_PATH"),
        ("LLAMESH_CLUSTER_CIRCUIT_BREAKER_ENABLED", "LLAMESH_CLUSTER__CIRCUIT_BREAKER__ENABLED"),
        ("LLAMESH_LISTEN_ADR", "LLAMESH_LISTEN_ADDR"),
        ("LLAMESH_PORT", None),
        ("LLAMESH_SERVICE_PORT", None),
        ("LLAMESH_PORT_8080_TCP_ADDR", None),
    ],
)
def test_a_mistyped_variable_is_told_the_right_one(files: Files, name: str, meant: str | None) -> None:
    (warning,) = files.warnings(environ={name: "true"})
    hint = f"; did you mean '{meant}'?" if meant else ""
    assert warning == f"{name}: is not a setting and is ignored{hint}"


def test_errors_carry_the_warnings(files: Files) -> None:
    """A mistyped variable may be why there is an error; a guess at broken settings is worth nothing."""
    files.write("config.yaml", "auth: {enabled: maybe, allowed_keys: [k]}")
    with pytest.raises(ConfigErrors) as caught:
        files.load(environ={"LLAMESH_AUTH_ENABLED": "true"})
    assert [warning.file for warning in caught.value.warnings] == ["LLAMESH_AUTH_ENABLED"]


def test_secrets_of_somebody_else_are_not_locked_away(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """root:llama-mesh 0640, as it was once installed: after chmod 600 alone the service could not read it."""
    files.write("secrets.yaml", "auth: {}", mode=0o640)
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    (warning,) = files.warnings()
    assert warning.endswith("run: chown 12345 secrets.yaml && chmod 600 secrets.yaml, as root")


def test_errors_of_all_sources_come_together(files: Files) -> None:
    """In reading order, file after file."""
    found = files.errors(
        "max_hops: -1\nlog:\n  level: info\nhttp:\n  idle_timeout_seconds: 0\nauth: {enabled: true}\nmax_hops: 2\n",
        "models:\n  - name: a\n    profiles: [{}]\n  - name: a:b\n    profiles: [{model_path: /m}]\n",
        "server_tls: {enabled: true}\nfoo: 1\n",
        environ={"LLAMESH_MAX_TOTAL_QUEUE_ENTRIES": "x"},
        overrides={"logging": {"level": "loud"}, "port": 99999},
    )
    assert [error.split(": ")[0:2] for error in found] == [
        ["config.yaml:1", "max_hops"],
        ["config.yaml:2", "log"],
        ["config.yaml:5", "http.idle_timeout_seconds"],
        ["config.yaml:6", "auth.allowed_keys"],
        ["config.yaml:7", "max_hops"],
        ["secrets.yaml:1", "server_tls.cert_path"],
        ["secrets.yaml:1", "server_tls.key_path"],
        ["secrets.yaml:2", "foo"],
        ["command line", "listen_addr"],
        ["command line", "logging.level"],
        ["LLAMESH_MAX_TOTAL_QUEUE_ENTRIES", "max_total_queue_entries"],
        ["cookbook.yaml:3", "models[0].profiles[0]"],
        ["cookbook.yaml:4", "models[1].name"],
    ]


def test_a_misplaced_section_is_told_its_place(files: Files) -> None:
    (error,) = files.errors("noise: {enabled: false}")
    assert error == "config.yaml:1: noise: unknown key at this place; it belongs at cluster.noise"


def test_a_given_file_must_exist(files: Files) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load(config=Path("a.yaml"), cookbook=Path("sub/b.yaml"), secrets=Path("c.yaml"), environ={})
    assert isinstance(caught.value, ConfigError)
    found = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in found] == ["a.yaml", "c.yaml", "sub/b.yaml"]
    assert all("does not exist (looked in " in line and "create it or correct the path" in line for line in found)


def test_a_default_file_that_is_a_broken_link_is_not_no_file(files: Files) -> None:
    (files.directory / "cookbook.yaml").symlink_to("gone.yaml")
    (error,) = files.errors()
    assert error.startswith("cookbook.yaml: the file does not exist")


def test_other_formats_are_named(files: Files) -> None:
    with pytest.raises(ConfigErrors, match=r"c\.toml: \.toml files are not supported; write it as YAML"):
        load(config=files.write("c.toml", "a = 1"), cookbook=None, secrets=None, environ={})


def test_json_is_yaml(files: Files) -> None:
    path = files.write("c.json", '{\n\t"max_hops": 3\n}')
    assert load(config=path, cookbook=None, secrets=None, environ={}).settings.max_hops == 3


@pytest.mark.parametrize(
    "content", [b"a: \xff", b"models: [", b"\tmodels: 1", b"models: 1\nmodels: 2", b"a: 1\n---\nb: 1"]
)
def test_a_file_that_is_no_yaml_is_an_error_with_its_line(files: Files, content: bytes) -> None:
    """Trap 84."""
    (files.directory / "cookbook.yaml").write_bytes(content)
    assert all(error.startswith("cookbook.yaml:") and error.split(":")[1].isdecimal() for error in files.errors())


def test_secrets_that_others_can_read_are_warned_of(files: Files) -> None:
    files.write("secrets.yaml", "auth: {enabled: true, allowed_keys: [k]}", mode=0o640)
    (warning,) = files.warnings()
    assert warning == "secrets.yaml: other users may access this file (mode 0640); run: chmod 600 secrets.yaml"
    files.write("secrets.yaml", "auth: {enabled: true, allowed_keys: [k]}", mode=0o600)
    assert files.warnings() == []


def test_secrets_are_never_in_messages(files: Files) -> None:
    """Trap 101."""
    secrets = "auth: {enabled: true, allowed_keys: ['s3cret key'], admin_keys: [{a: s3cret}], allowd_keys: [s3cret]}"
    found = files.errors(None, None, secrets)
    assert len(found) == 3
    assert "s3cret" not in "".join(found)
    assert "s3cret" not in "".join(files.errors(None, None, "auth: s3cret"))
    assert "s3cret" not in "".join(files.errors(None, None, "auth: {allowed_keys: s3cret}"))
    loaded = files.load(None, None, "auth: {enabled: true, allowed_keys: [s3cret]}")
    assert "s3cret" not in repr(loaded.settings)


def test_secrets_hold_three_sections(files: Files) -> None:
    (error,) = files.errors(None, None, "auth_: {}")
    assert error.startswith("secrets.yaml:1: auth_: unknown key; did you mean 'auth'?")


def test_a_default_model_that_is_not_there_is_warned_of(files: Files) -> None:
    (warning,) = files.warnings("max_hops: 1\ndefault_model: mm", COOKBOOK)
    assert warning.startswith("config.yaml:2: default_model: 'mm' is not in the cookbook; did you mean 'm'?")
    assert files.warnings("default_model: M", COOKBOOK) == []
    assert (
        files.warnings("default_model: far-away\ncluster: {enabled: true}", COOKBOOK) == []
    )  # another node may have it


def test_loaded_carries_what_was_read(files: Files) -> None:
    loaded = files.load("default_model: m", COOKBOOK)
    assert (loaded.config_path, loaded.cookbook_path) == (Path("config.yaml"), Path("cookbook.yaml"))
    assert loaded.catalog.resolve(None).key == "m:default"


def test_reloading_gives_the_next_version_or_raises(files: Files) -> None:
    """Trap 84: the caller keeps the old catalog."""
    path = files.write("cookbook.yaml", COOKBOOK)
    catalog, warnings = load_catalog(path, Settings(default_model="x"), 3)
    assert (catalog.version, [profile.key for profile in catalog.profiles]) == (3, ["m:default"])
    assert "default_model 'x' is not in the cookbook" in str(warnings[0])
    path.write_text(COOKBOOK + COOKBOOK)
    with pytest.raises(ConfigErrors, match=r"cookbook\.yaml:2: models: the key occurs twice"):
        load_catalog(path, Settings(), 4)
    path.write_text("\n")  # half of a save, or one that met a full disk
    with pytest.raises(ConfigErrors, match="is empty"):
        load_catalog(path, Settings(), 4)
    path.write_text("models: []")
    assert load_catalog(path, Settings(), 4)[0].profiles == ()
    path.unlink()
    with pytest.raises(ConfigErrors, match="does not exist"):
        load_catalog(path, Settings(), 4)


def test_a_large_cookbook_loads(files: Files) -> None:
    """1,000 profiles are within the bound on values per file."""
    models = "".join(
        f"  - name: m{i}\n    profiles: [{{id: a, hf_repo: u/r{i}, aliases: [x{i}]}}]\n" for i in range(1000)
    )
    assert len(files.load(None, "models:\n" + models).catalog.names) == 3000
