"""Every key of config.yaml: its name (llamesh 1.20's, plus ours), its type, its default and one line on its meaning.

Owns shapes and single values only. Rules between keys are in ``checks``, reading files in ``loader``. The descriptions
here are the comments of config.example.yaml and of the JSON Schema.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from mesh.config.address import split_address
from mesh.config.builds import Build, LlamaCpp, WhisperCpp, lower_case_names, resolved
from mesh.config.fields import HeaderKey, HeaderName, HeaderValue, Line, Port, Section, StrictLine, Text, not_zero
from mesh.config.fields import key as _key
from mesh.config.units import Budget, Bytes, Count, Milliseconds, Seconds

DEFAULT_PORT = 8080
_SERVICE_NAME = re.compile(r"_(?=.{1,15}\.)[a-z0-9]+(-[a-z0-9]+)*\._tcp\.local\.?", re.IGNORECASE)
_GPU = re.compile(r"(gpu)?(?P<number>[0-9]{1,4})|(?P<kind>gpu|mig)-(?P<uuid>[0-9a-z/-]+)", re.IGNORECASE)


def _host_name() -> str:
    """Return the machine's name, without what an HTTP header could not carry."""
    return re.sub(r"[^!-~]", "-", socket.gethostname()) or "node"


def _listen_address(text: str) -> str:
    split_address(text)
    return text.strip()


def _peer_address(text: str) -> str:
    """Accept host:port, a host alone, which means the usual port, or a URL, as llamesh's files have it."""
    port = DEFAULT_PORT
    if found := re.fullmatch(r"(https?)://([^/\s]+)/*", text, re.IGNORECASE):
        port, text = (443 if found[1].lower() == "https" else 80), found[2]
    address = text if re.search(r":[0-9]+$", text) else f"{text}:{port}"
    if split_address(address)[1] == 0:
        raise ValueError("port 0 cannot be dialled")
    return address


def _service_name(text: str) -> str:
    if not _SERVICE_NAME.fullmatch(text):
        raise ValueError("is not an mDNS service type; expected one like _llama-mesh._tcp.local")
    return text


def _gpu_names(limits: object) -> object:
    """Name each GPU in one way, by number or as NVML spells its UUID; refuse two limits for one GPU."""
    if not isinstance(limits, dict):
        return limits
    named: dict[str, object] = {}
    for key, limit in limits.items():
        if isinstance(key, bool) or not (found := _GPU.fullmatch(str(key).strip())):
            raise ValueError(f"{key!r} names no GPU; use its number (0, 1, ...) or its UUID (GPU-...)")
        name = str(int(found["number"])) if found["number"] else f"{found['kind'].upper()}-{found['uuid'].lower()}"
        if name in named:
            raise ValueError(f"{key!r} is limited twice")
        named[name] = limit
    return named


def _http_url(text: str) -> str:
    if not re.match(r"https?://[^/\s]", text):
        raise ValueError("expected a URL that starts with http:// or https://")
    return text


def _file_name(text: str) -> str:
    if "/" in text or text in (".", ".."):
        raise ValueError("must be a file name without a directory; 'directory' is a key of its own")
    return text


class ModelDefaults(Section):
    """Limits of every profile that does not set its own in the cookbook."""

    max_concurrent_requests_per_instance: Count | None = _key(
        None, "Requests at once per instance; null = as many as it has slots, 0 = unlimited"
    )
    max_queue_size_per_model: Count = _key(1024, "Waiting requests per profile, more get 503; 0 = unlimited")
    max_instances_per_model: Count = _key(1, "Instances per profile on this node; 0 counts as 1")
    max_wait_in_queue_ms: Milliseconds | None = _key(
        None, "Longest wait for a place, loading included; null = 60 s, for whisper-server 10m; 0 = for ever"
    )
    max_request_duration_ms: Milliseconds = _key(0, "Longest whole request; 0 = unlimited")
    min_eviction_tenure_secs: Seconds = _key(
        15.0, "How long a busy instance is left alone while others wait for its memory; 0 = not at all"
    )


class PortRange(Section):
    start: Port
    end: Port


class LlamaCppPorts(Section):
    """Ports for the children. Without this section the operating system picks them."""

    ports: tuple[Port, ...] = _key((), "Single ports, used first")
    ranges: tuple[PortRange, ...] = _key((), "Ranges, both ends included")

    def numbers(self) -> tuple[int, ...]:
        """Return every port once, in the order in which they are used."""
        ranged = [
            port for span in sorted(self.ranges, key=lambda r: r.start) for port in range(span.start, span.end + 1)
        ]
        return tuple(dict.fromkeys((*self.ports, *ranged)))


class Discovery(Section):
    mdns: bool = _key(True, "Find the nodes of the local network by mDNS")
    service_name: Annotated[Line, AfterValidator(_service_name)] = _key(
        "_llama-mesh._tcp.local", "mDNS service type; another one keeps two clusters of one network apart"
    )


class Noise(Section):
    enabled: bool = _key(True, "Encrypt and authenticate what nodes say to each other")
    tofu: bool = _key(True, "Trust a node's key on first use, then only that key")
    config_dir: Text = _key("~/.llama-mesh", "Directory of this node's key and of known_peers")
    private_key_path: Text | None = _key(None, "This node's key; null = <config_dir>/node.key")
    previous_key_path: Text | None = _key(
        None, "The key that this one replaced, so that others follow; null = <private_key_path>.previous, if it exists"
    )
    known_peers_path: Text | None = _key(None, "Keys seen so far; null = <config_dir>/known_peers")
    allowed_keys: tuple[StrictLine, ...] = _key((), "Public keys that may join; empty = any that tofu accepts")
    session_ttl_seconds: Seconds = _key(3600.0, "Accepted for llamesh's files; not used")


class CircuitBreaker(Section):
    enabled: bool = _key(True, "Stop asking a peer that keeps failing")
    failure_threshold: Count = _key(5, "Failures in a row that open the circuit")
    success_threshold: Count = _key(2, "Successful probes that close it again")
    open_duration_base_ms: Milliseconds = _key(5000, "First pause; doubles with every failed probe")
    open_duration_max_ms: Milliseconds = _key(60_000, "Longest pause")
    half_open_probe_interval_ms: Milliseconds = _key(1000, "Time between probes; 0 = no pacing")


class Cluster(Section):
    """Other nodes of the mesh."""

    enabled: bool = _key(False, "Join other nodes; all need the same token: llama-mesh token, or CLUSTER_TOKEN")
    peers: tuple[Annotated[Line, AfterValidator(_peer_address)], ...] = _key(
        (), "Nodes to join by address, host:port, beside those that are found; names are resolved each time"
    )
    gossip_interval_seconds: Seconds = _key(5.0, "Time between exchanges of state")
    max_concurrent_gossip: Count = _key(16, "Exchanges of a kind at once")
    version_mismatch_action: Literal["warn", "reject_major", "reject_any"] = _key(
        "warn", "What to do about a peer of another version: warn, reject_major or reject_any"
    )
    discovery: Discovery = _key(Discovery(), "How nodes find each other")
    noise: Noise = _key(Noise(), "Encryption and trust between nodes")
    circuit_breaker: CircuitBreaker = _key(CircuitBreaker(), "What happens to a peer that fails")


class Http(Section):
    """Limits that protect the port from slow and huge requests."""

    request_body_limit_bytes: Annotated[Bytes, not_zero("every request with a body would be refused")] = _key(
        64 * 1024**2, "Largest request body; more gets 413"
    )
    upload_limit_bytes: Annotated[Bytes, not_zero("every form would be refused")] = _key(
        512 * 1024**2, "Largest form, for audio; more gets 413"
    )
    upload_memory_bytes: Bytes = _key(
        1024**2, "How much of a form is kept in memory; the rest of a larger one goes to a file that nobody can open"
    )
    idle_timeout_seconds: Annotated[Seconds, not_zero("every connection would be closed at once")] = _key(
        75.0, "How long an idle keep-alive connection stays open"
    )
    body_read_timeout_ms: Annotated[Milliseconds, not_zero("every request with a body would be refused")] = _key(
        30_000, "Longest silence while a body is read; then 408"
    )
    protocol_detect_timeout_ms: Annotated[Milliseconds, not_zero("every connection would be closed at once")] = _key(
        10_000, "How long a new connection may say nothing"
    )
    head_limit_bytes: Annotated[Bytes, not_zero("every request would be refused")] = _key(
        65_536, "Largest request line and headers; more gets 431"
    )
    head_read_timeout_ms: Annotated[Milliseconds, not_zero("every request would be refused")] = _key(
        30_000, "How long a request's headers may take; then 408"
    )


class Auth(Section):
    """API keys. They are accepted as 'Authorization: Bearer KEY' and in the header named here."""

    enabled: bool = _key(False, "Ask for a key on everything but /health, /healthz, /readyz and /version")
    required_header: HeaderName = _key("X-Api-Key", "Header that may carry the key, beside Authorization")
    allowed_keys: tuple[HeaderKey, ...] = _key((), "Keys for inference; better kept in secrets.yaml", repr=False)
    admin_keys: tuple[HeaderKey, ...] = _key(
        (), "If any: only these keys may use /admin, and they may do all else too", repr=False
    )


class ServerTls(Section):
    """HTTPS on the one port. The files are read again when they change."""

    enabled: bool = _key(False, "Speak TLS")
    cert_path: Text | None = _key(None, "Certificate chain, PEM")
    key_path: Text | None = _key(None, "Private key, PEM")
    allow_plain_http: bool = _key(False, "Serve plain HTTP on the same port as well")


class ClusterTls(Section):
    """Deprecated, accepted for llamesh's files: cluster.noise protects the links between nodes."""

    enabled: bool = _key(False, "Deprecated")
    ca_cert_path: Text | None = _key(None, "Deprecated")
    client_cert_path: Text | None = _key(None, "Deprecated")
    client_key_path: Text | None = _key(None, "Deprecated")


class Logging(Section):
    """Logs are JSON lines on stdout; the file is in addition to that."""

    enabled: bool = _key(False, "Write a log file too")
    directory: Text = _key("./logs", "Its directory")
    filename: Annotated[Line, AfterValidator(_file_name)] = _key(
        "proxy.log", "Today's file; older ones get their date appended"
    )
    max_keep_files: Annotated[Count, not_zero("the log in use would be deleted")] = _key(7, "Days that are kept")
    compression: bool = _key(True, "Compress the days before today with gzip")
    level: Literal["debug", "info", "warning", "error"] = _key("info", "debug, info, warning or error")
    access_log: bool = _key(True, "One line per request")


class WedgeDetector(Section):
    """Kills an instance that holds work and makes no progress at all."""

    enabled: bool = _key(False, "Watch for stuck instances")
    window_ms: Milliseconds = _key(600_000, "How long without any progress counts as stuck")
    sample_interval_ms: Milliseconds = _key(5000, "How often progress is measured")
    cpu_only: bool = _key(False, "Judge by CPU alone, not by the GPU")


class Settings(Section, BaseSettings):
    """A node's settings. Builds from its arguments alone; files and environment are the loader's business."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="LLAMESH_", env_nested_delimiter="__")

    node_id: HeaderValue = Field(default_factory=_host_name, description="Name of this node; null = the host's name")
    listen_addr: Annotated[Text, AfterValidator(_listen_address)] = _key(
        "127.0.0.1:8080",
        "Address and port; 0.0.0.0:8080 or [::]:8080 for all interfaces; port 0 = any free one. As it is here, a node"
        " in a cluster listens to other nodes on all interfaces, and to clients of this machine only",
    )
    public_url: Annotated[Line, AfterValidator(_http_url)] | None = _key(None, "URL at which others reach this node")
    max_vram_mb: Budget | None = _key(
        None, "GPU memory for models, all GPUs together, in MB or as '24GB'; auto = most of each; null = not limited"
    )
    max_vram_mb_per_gpu: Annotated[dict[str, Budget], BeforeValidator(_gpu_names)] = _key(
        {}, "The same for single GPUs, by number or UUID, for example {0: 20GB, 1: auto}; the others have no limit here"
    )
    max_sysmem_mb: Budget | None = _key(None, "Main memory for models, in MB or as '64GB'; auto; null = not limited")
    max_instances_per_node: Annotated[Count, not_zero("no model could ever be started")] = _key(
        100, "Instances at once on this node"
    )
    metrics_path: Text = _key("./node-metrics.json", "Where counters and learned figures survive a restart")
    default_model: Line | None = _key(None, "Model of requests that name none; null = they get 400")
    shutdown_grace_period_seconds: Seconds = _key(
        30.0, "How long running requests may finish after SIGTERM; 0 = not at all"
    )
    max_hops: Count = _key(10, "How often a request may be passed on between nodes")
    max_total_queue_entries: Count = _key(0, "Waiting requests on this node in all; 0 = unlimited")
    upstream_read_timeout_ms: Milliseconds = _key(0, "Longest silence of an instance during an answer; 0 = unlimited")
    model_defaults: ModelDefaults = _key(ModelDefaults(), "Limits of profiles that set none of their own")
    llama_cpp_ports: LlamaCppPorts | None = _key(None, "Ports for the children; null = the operating system picks them")
    llama_cpp: LlamaCpp = _key(LlamaCpp(), "Which llama-server runs, and how it is built")
    builds: Annotated[dict[str, Build], BeforeValidator(lower_case_names)] = _key(
        {}, "Further llama-servers, by a name that the cookbook's engine_build may give; keys as in llama_cpp"
    )
    whisper_cpp: WhisperCpp = _key(WhisperCpp(), "Which whisper-server runs")
    cluster: Cluster = _key(Cluster(), "Other nodes")
    http: Http = _key(Http(), "Limits on requests and connections")
    auth: Auth = _key(Auth(), "API keys")
    server_tls: ServerTls = _key(ServerTls(), "HTTPS")
    cluster_tls: ClusterTls = _key(ClusterTls(), "Deprecated; use cluster.noise")
    logging: Logging = _key(Logging(), "Logs")
    wedge_detector: WedgeDetector = _key(WedgeDetector(), "Stuck instances")

    def build_settings(self) -> Mapping[str, LlamaCpp]:
        """Return every build by name with all its keys set: ``llama_cpp`` as "default" first, then ``builds``."""
        return resolved(self.llama_cpp, self.builds)

    @property
    def listen(self) -> tuple[str, int]:
        """Host (IPv6 without brackets) and port of ``listen_addr``."""
        return split_address(self.listen_addr)

    @property
    def listens_for_nodes(self) -> bool:
        """Whether nobody chose where to listen, and other nodes must get through all the same: on every interface.

        Clients of other machines must not, since nobody decided that they may: they are refused.
        """
        default = type(self).model_fields["listen_addr"].default  # a copied example means the same as no file
        return self.cluster.enabled and self.listen_addr == default

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Never read the process environment by itself: a ``Settings()`` means the defaults, everywhere."""
        return (init_settings,)
