"""Certificates: refused when unusable, warned about when old, taken over when replaced, kept when the new is bad."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.net.tls import ServerCertificate
from tests.net.certificates import write_certificate


def test_a_replaced_certificate_is_used(tmp_path: Path) -> None:
    paths = write_certificate(tmp_path)
    certificate = ServerCertificate(*paths)
    first = certificate.context()
    assert certificate.context() is first
    write_certificate(tmp_path)
    assert certificate.context() is not first


@pytest.mark.parametrize("damage", ["garbage", "missing", "expired"])
def test_a_bad_replacement_changes_nothing(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_certificate(tmp_path)
    certificate = ServerCertificate(*paths)
    first = certificate.context()
    if damage == "garbage":
        paths[0].write_text("no certificate")
    elif damage == "missing":
        paths[0].unlink()
    else:
        write_certificate(tmp_path, days=-0.5)
    for _ in range(3):
        assert certificate.context() is first
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    write_certificate(tmp_path)
    assert certificate.context() is not first


def test_startup_refuses_what_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expired on"):
        ServerCertificate(*write_certificate(tmp_path, days=-0.5))
    with pytest.raises(ConfigError, match="not valid before"):
        ServerCertificate(*write_certificate(tmp_path, age_days=-1))
    cert, key = write_certificate(tmp_path)
    with pytest.raises(ConfigError, match=r"none\.pem"):
        ServerCertificate(tmp_path / "none.pem", key)
    other = tmp_path / "other"
    other.mkdir()
    _, foreign_key = write_certificate(other)
    with pytest.raises(ConfigError, match="belong together"):
        ServerCertificate(cert, foreign_key)


def test_a_warning_when_it_expires_soon(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ServerCertificate(*write_certificate(tmp_path, days=5))
    assert "expires soon" in caplog.text
