"""The server's TLS context: loaded once, loaded again when the certificate's files change. Opens no sockets."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from mesh.errors import ConfigError
from mesh.logs import Log

_log = Log(__name__)

_EXPIRY_WARNING = timedelta(days=30)


class ServerCertificate:
    """A certificate and its key on disk. ``context()`` is for the next connection; running ones keep theirs."""

    def __init__(self, cert_path: str | os.PathLike[str], key_path: str | os.PathLike[str]) -> None:
        """Load both; raise ``ConfigError`` if they cannot be used, an expired certificate included."""
        self._cert_path = Path(cert_path).expanduser()
        self._key_path = Path(key_path).expanduser()
        self._stamp = self._read_stamp()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """Return the current context. Files that changed are loaded now; if that fails, the old ones stay in use."""
        stamp = self._read_stamp()
        if stamp != self._stamp:
            self._stamp = stamp  # also if it fails: one error per change, not per connection
            try:
                self._context = self._load()
                _log.info("TLS certificate reloaded", path=str(self._cert_path))
            except ConfigError as error:
                _log.error("TLS certificate not reloaded, the old one stays in use", reason=error.message)
        return self._context

    def _read_stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in (self._cert_path, self._key_path))

    def _load(self) -> ssl.SSLContext:
        self._check_dates(datetime.now(UTC))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert_path, self._key_path)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"server_tls: cannot use {self._cert_path} with {self._key_path}: {error}; "
                "both must be PEM files that belong together, the key without a passphrase"
            ) from error
        return context

    def _check_dates(self, now: datetime) -> None:
        try:
            certificate = x509.load_pem_x509_certificate(self._cert_path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"server_tls.cert_path: cannot read {self._cert_path}: {error}") from error
        ends = certificate.not_valid_after_utc
        if now > ends:
            raise ConfigError(f"server_tls.cert_path: {self._cert_path} expired on {ends:%Y-%m-%d}; renew it")
        if now < certificate.not_valid_before_utc:
            begins = certificate.not_valid_before_utc
            raise ConfigError(
                f"server_tls.cert_path: {self._cert_path} is not valid before {begins:%Y-%m-%d %H:%M} UTC"
            )
        if ends - now < _EXPIRY_WARNING:
            _log.warning("the TLS certificate expires soon", path=str(self._cert_path), expires=ends.isoformat())


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written, replaced, or its symlink is moved (trap 81)."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
