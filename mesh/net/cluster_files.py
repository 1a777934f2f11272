"""Where a node keeps what makes it a member: its key, the cluster's token, whom it trusts, whom it asks first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh.config.settings import Noise


@dataclass(frozen=True, slots=True)
class ClusterFiles:
    """The files of ``cluster.noise``, with their defaults in ``config_dir``."""

    directory: Path
    key: Path
    previous_key: Path  #: what ``llama-mesh keys rotate`` keeps
    token: Path
    known_peers: Path
    peers: Path  #: addresses that ``llama-mesh join`` noted


def cluster_files(noise: Noise) -> ClusterFiles:
    """Return the paths that *noise* sets."""
    directory = Path(noise.config_dir).expanduser()
    key = _chosen(noise.private_key_path, directory / "node.key")
    return ClusterFiles(
        directory=directory,
        key=key,
        previous_key=_chosen(noise.previous_key_path, key.with_name(f"{key.name}.previous")),
        token=directory / "cluster.token",
        known_peers=_chosen(noise.known_peers_path, directory / "known_peers"),
        peers=directory / "peers",
    )


def _chosen(path: str | None, default: Path) -> Path:
    return default if path is None else Path(path).expanduser()
