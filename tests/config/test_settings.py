"""config.yaml's keys: defaults, llamesh's files, and every refusal by name (trap 85)."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mesh.config.settings import Settings
from tests.config.files import Files

#: The keys that llamesh 1.20 requires, with values of its examples: such a file must simply work.
LLAMESH = """
node_id: "gpu-1"
listen_addr: "0.0.0.0:8080"
public_url: "http://gpu-1:8080"
max_vram_mb: 24000
max_sysmem_mb: 64000
default_model: "qwen"
model_defaults:
  max_concurrent_requests_per_instance: 4
  max_queue_size_per_model: 0
  max_instances_per_model: 2
  max_wait_in_queue_ms: 0
llama_cpp_ports: {ports: [9005, 9001], ranges: [{start: 9100, end: 9102}, {start: 9000, end: 9001}]}
llama_cpp:
  repo_url: https://github.com/ggml-org/llama.cpp
  branch: master
  auto_update_interval_seconds: 3600
  build_args: ["-DGGML_CUDA=ON"]
  keep_builds: 3
cluster: {enabled: true, gossip_interval_seconds: 5, peers: ["http://b:8080"]}
http: {request_body_limit_bytes: 1048576, idle_timeout_seconds: 60}
auth: {enabled: true, required_header: Authorization, allowed_keys: ["k"]}
"""


def test_no_file_at_all_works(files: Files) -> None:
    loaded = files.load()
    assert loaded.settings == Settings()
    assert loaded.settings.node_id == socket.gethostname()
    assert (loaded.config_path, loaded.cookbook_path, loaded.warnings, loaded.catalog.profiles) == (None, None, (), ())


def test_settings_never_read_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMESH_MAX_HOPS", "3")
    assert Settings().max_hops == 10


def test_a_llamesh_file_works(files: Files) -> None:
    settings = files.load(LLAMESH).settings
    assert settings.listen == ("0.0.0.0", 8080)
    assert (settings.max_vram_mb, settings.model_defaults.max_instances_per_model) == (24000, 2)
    assert settings.llama_cpp_ports is not None
    assert settings.llama_cpp_ports.numbers() == (9005, 9001, 9000, 9100, 9101, 9102)
    assert settings.llama_cpp.repo_url == "https://github.com/ggml-org/llama.cpp"
    assert settings.cluster.noise.tofu
    assert settings.cluster.peers == ("b:8080",)


def test_a_mesh_needs_one_line(files: Files) -> None:
    loaded = files.load("cluster: {enabled: true}")
    assert loaded.settings.cluster.enabled
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("gpu1", "gpu1:8080"),
        ("gpu1.example.org:9000", "gpu1.example.org:9000"),
        ("192.0.2.1", "192.0.2.1:8080"),
        ("'[2001:db8::1]'", "[2001:db8::1]:8080"),
        ("'[2001:db8::1]:9000'", "[2001:db8::1]:9000"),
        ("http://gpu1:8080/", "gpu1:8080"),  # as in llamesh's files
        ("HTTPS://gpu1", "gpu1:443"),
        ("'http://[2001:db8::1]'", "[2001:db8::1]:80"),
    ],
)
def test_where_other_nodes_are(files: Files, written: str, meant: str) -> None:
    """trap 68"""
    settings = files.load(f"cluster: {{enabled: true, peers: [{written}]}}").settings
    assert settings.cluster.peers == (meant,)


@pytest.mark.parametrize(
    ("config", "listens"),
    [
        ("{}", False),
        ("cluster: {enabled: true}", True),
        ("cluster: {enabled: true}\nlisten_addr: 127.0.0.1:8080", True),  # a copied example means the same as no file
        ("cluster: {enabled: true}\nlisten_addr: 127.0.0.1:8081", False),
        ("cluster: {enabled: true}\nlisten_addr: 0.0.0.0:8080", False),
        ("cluster: {enabled: false}\nlisten_addr: 127.0.0.1:8080", False),
    ],
)
def test_only_a_node_of_a_cluster_that_was_told_nothing_listens_for_nodes(
    files: Files, config: str, listens: bool
) -> None:
    assert files.load(config).settings.listens_for_nodes is listens


def test_nodes_speak_over_noise_or_not_at_all(files: Files) -> None:
    """trap 103; without a cluster the key has nothing to say."""
    (error,) = files.errors("cluster:\n  enabled: true\n  noise:\n    enabled: false")
    assert error.startswith("config.yaml:4: cluster.noise.enabled: is false, but nodes speak over Noise only")
    files.load("cluster: {enabled: false, noise: {enabled: false}}")


def test_config_values_are_as_lenient_as_llameshs(files: Files) -> None:
    """Keys in any case, numbers as text, yes and on for booleans, empty sections."""
    settings = files.load("Node_ID: 7\nMAX_HOPS: '4'\ncluster:\nlogging: {enabled: yes, compression: off}").settings
    assert (settings.node_id, settings.max_hops) == ("7", 4)
    assert (settings.logging.enabled, settings.logging.compression) == (True, False)


def test_keys_are_written_as_in_llamesh(files: Files) -> None:
    """With the scheme, for the header Authorization, or as numbers; clients send what follows 'Bearer'."""
    auth = files.load(
        "auth: {enabled: true, required_header: Authorization, allowed_keys: ['Bearer abc', 42]}"
    ).settings.auth
    assert auth.allowed_keys == ("abc", "42")
    assert files.load("auth: {admin_keys: ['bearer  a', Bearer]}").settings.auth.admin_keys == ("a", "Bearer")


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ("cluster: {peers: ['b:1']}", "cluster.peers"),
        ("llama_cpp: {auto_update_interval_seconds: 1h}", "llama_cpp.auto_update_interval_seconds"),
        ("wedge_detector: {enabled: true}", "wedge_detector.enabled"),
    ],
)
def test_what_does_nothing_yet_is_warned_of(files: Files, config: str, path: str) -> None:
    (warning,) = files.warnings(config)
    assert warning.startswith(f"config.yaml:1: {path}: has no effect: ")


def test_units(files: Files) -> None:
    settings = files.load("max_vram_mb: 24GB\nmax_sysmem_mb: auto\nshutdown_grace_period_seconds: 500ms").settings
    assert (settings.max_vram_mb, settings.max_sysmem_mb, settings.shutdown_grace_period_seconds) == (
        24576,
        "auto",
        0.5,
    )


def test_single_gpus_are_named_by_number_or_uuid(files: Files) -> None:
    uuid = "GPU-8a1b2c3d-0000-0000-0000-00000000000a"
    settings = files.load(f"max_vram_mb_per_gpu: {{0: 20GB, gpu1: auto, '2': 0, {uuid.upper()}: 1000}}").settings
    assert settings.max_vram_mb_per_gpu == {"0": 20480, "1": "auto", "2": 0, uuid: 1000}
    assert files.load("max_vram_mb_per_gpu:").settings.max_vram_mb_per_gpu == {}
    environ = {"LLAMESH_MAX_VRAM_MB_PER_GPU__0": "20GB", "LLAMESH_MAX_VRAM_MB_PER_GPU__1": "auto"}
    assert files.load("{}", environ=environ).settings.max_vram_mb_per_gpu == {"0": 20480, "1": "auto"}


def test_only_another_binary_path_is_a_choice(files: Files) -> None:
    """A copied example names the default path; that file need not exist."""
    copied = files.load("llama_cpp: {binary_path: ./llama.cpp/bin/llama-server}").settings
    assert "binary_path" not in copied.llama_cpp.model_fields_set
    chosen = files.load("llama_cpp: {binary_path: /opt/llama-server}").settings
    assert "binary_path" in chosen.llama_cpp.model_fields_set


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("max_instances_per_node: 0", "max_instances_per_node: is 0; no model could ever"),
        ("http: {request_body_limit_bytes: 0}", "http.request_body_limit_bytes: is 0;"),
        ("http: {idle_timeout_seconds: 0}", "http.idle_timeout_seconds: is 0;"),
        ("http: {body_read_timeout_ms: 0}", "http.body_read_timeout_ms: is 0;"),
        ("http: {protocol_detect_timeout_ms: 0s}", "http.protocol_detect_timeout_ms: is 0;"),
        ("http: {head_limit_bytes: 0}", "http.head_limit_bytes: is 0;"),
        ("http: {head_read_timeout_ms: 0}", "http.head_read_timeout_ms: is 0;"),
        ("logging: {max_keep_files: 0}", "logging.max_keep_files: is 0;"),
        ("logging: {filename: a/b}", "logging.filename: must be a file name without a directory"),
        ("logging: {level: warn}", "did you mean 'warning'?"),
        ("node_id: ''", "node_id: is empty"),
        ("node_id: 'a b'", "node_id: must be printable ASCII without spaces"),
        ("node_id: 1.20", "node_id: expected text, got 1.2; put it in quotes"),
        ("listen_addr: '::1:80'", "listen_addr: IPv6 addresses need brackets: [::1]:80"),
        ("public_url: gpu-1", "public_url: expected a URL"),
        ("max_vram_mb: much", "max_vram_mb: expected a number or text such as '24GB' or '512MB', or 'auto', got"),
        ("max_vram_mb_per_gpu: {0: much}", "max_vram_mb_per_gpu.0: expected a number or text such as"),
        ("max_vram_mb_per_gpu: {0: 1, gpu0: 2}", "max_vram_mb_per_gpu: 'gpu0' is limited twice"),
        ("max_vram_mb_per_gpu: {left: 1}", "max_vram_mb_per_gpu: 'left' names no GPU; use its number"),
        ("max_vram_mb_per_gpu: 24GB", "max_vram_mb_per_gpu: expected a mapping of keys, got '24GB'"),
        ("max_hops: true", "max_hops: expected a whole number, got true"),
        ("llama_cpp_ports: {}", "llama_cpp_ports: llama_cpp_ports is configured but provides no usable ports"),
        ("llama_cpp_ports: {ports: [0]}", "llama_cpp_ports.ports[0]: is not a port; use 1 to 65535, got 0"),
        ("llama_cpp_ports: {ranges: [{start: 2, end: 1}]}", "llama_cpp_ports.ranges[0]: llama_cpp_ports range has"),
        ("llama_cpp_ports: {ranges: [{start: 2}]}", "llama_cpp_ports.ranges[0].end: is required"),
        ("auth: {enabled: true}", "auth.allowed_keys: auth.enabled is true but auth.allowed_keys is empty"),
        ("auth: {allowed_keys: [' ']}", "auth.allowed_keys[0]: is empty"),
        ("auth: {allowed_keys: ['a ']}", "auth.allowed_keys[0]: must be one line without spaces at its ends"),
        ("auth: {allowed_keys: [1.20]}", "auth.allowed_keys[0]: expected text; put it in quotes"),
        ("auth: {allowed_keys: ['Basic abc']}", "auth.allowed_keys[0]: must be printable ASCII without spaces"),
        ("auth: {required_header: 'X Y'}", "auth.required_header: is not an HTTP header name"),
        ("auth: {required_header: ' '}", "auth.required_header: is empty"),
        ("auth: {enabled: maybe}", "auth.enabled: expected true or false, got 'maybe'"),
        ("auth: true", "auth: expected a mapping of keys"),
        ("server_tls: {enabled: true}", "server_tls.cert_path: server_tls.enabled is true but"),
        ("server_tls: {enabled: true, cert_path: /no, key_path: /no}", "server_tls.cert_path: there is no such file"),
        ("cluster_tls: {enabled: true}", "cluster TLS is enabled but server_tls is not configured"),
        ("cluster_tls: {enabled: true}\nserver_tls: {}", "cluster TLS is enabled but server_tls is disabled"),
        ("cluster: {version_mismatch_action: reject_mayor}", "did you mean 'reject_major'?"),
        ("cluster: {peers: 'a:1'}", "cluster.peers: expected a list"),
        ("cluster: {peers: ['a:0']}", "cluster.peers[0]: port 0 cannot be dialled"),
        ("cluster: {peers: ['a:99999']}", "cluster.peers[0]: '99999' is not a port"),
        ("cluster: {peers: ['::1']}", "cluster.peers[0]: IPv6 addresses need brackets"),
        ("cluster: {peers: ['1.2.3']}", "cluster.peers[0]: '1.2.3' is not an address"),
        ("cluster: {peers: ['ftp://a:1']}", "cluster.peers[0]: "),
        ("cluster: {peers: ['http://a:1/v1']}", "cluster.peers[0]: "),
        ("cluster: {peers: ['a', '']}", "cluster.peers[1]: is empty"),
        ("cluster: {enabled: true, gossip_interval_seconds: 0}", "gossip_interval_seconds: is 0, but cluster mode is"),
        ("cluster: {enabled: true, max_concurrent_gossip: 0}", "max_concurrent_gossip: is 0, but cluster mode is"),
        ("wedge_detector: {enabled: true, window_ms: 0}", "wedge_detector.window_ms: is 0, but wedge_detector"),
    ],
)  # fmt: skip
def test_what_would_not_work_is_refused_by_name(files: Files, config: str, expected: str) -> None:
    """Traps 84, 85: the file, the line, the key and what is accepted."""
    (error,) = [error for error in files.errors(config) if expected in error]
    assert error.startswith("config.yaml:1: ")


@pytest.mark.parametrize(
    "key", ["failure_threshold", "success_threshold", "open_duration_base_ms", "open_duration_max_ms"]
)
def test_a_breaker_with_a_zero_is_refused(files: Files, key: str) -> None:
    """Trap 85; without the cluster or with the breaker off it does not matter."""
    breaker = f"circuit_breaker: {{{key}: 0, enabled: "
    (error,) = files.errors(f"cluster: {{enabled: true, {breaker}true}}}}")
    assert f"cluster.circuit_breaker.{key}: is 0, but cluster.circuit_breaker is enabled" in error
    files.load(f"cluster: {{enabled: true, {breaker}false}}}}")
    files.load(f"cluster: {{enabled: false, {breaker}true}}}}")


def test_zero_where_it_means_something_is_fine(files: Files) -> None:
    files.load(
        "max_vram_mb: 0\nmax_hops: 0\nmax_total_queue_entries: 0\nshutdown_grace_period_seconds: 0\n"
        "cluster: {enabled: true, circuit_breaker: {half_open_probe_interval_ms: 0}}\n"
        "model_defaults: {max_concurrent_requests_per_instance: 0, min_eviction_tenure_secs: 0}"
    )


def test_a_breaker_whose_base_is_over_its_maximum_is_refused(files: Files) -> None:
    (error,) = files.errors("cluster:\n  enabled: true\n  circuit_breaker:\n    open_duration_base_ms: 2m")
    assert error.startswith("config.yaml:4: cluster.circuit_breaker.open_duration_base_ms: 120000 is more than")


def test_keys_that_nobody_is_asked_for_are_warned_of(files: Files) -> None:
    (warning,) = files.warnings("auth: {allowed_keys: [sesame]}")
    assert "everybody may use this node" in warning
    assert "sesame" not in warning


def test_a_deprecated_section_is_warned_of(files: Files, tmp_path: Path) -> None:
    pem = files.write("x.pem", "")
    (warning,) = files.warnings(
        f"cluster_tls: {{enabled: true}}\nserver_tls: {{enabled: true, cert_path: {pem}, key_path: {pem}}}"
    )
    assert warning.startswith("config.yaml:1: cluster_tls: is deprecated")
