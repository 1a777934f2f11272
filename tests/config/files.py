"""A working directory with configuration files, loaded the way ``serve`` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mesh.config.loader import ConfigErrors, Loaded, load


class Files:
    """Writes files into the working directory and loads them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.directory / name
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    def load(
        self,
        config: str | None = None,
        cookbook: str | None = None,
        secrets: str | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Loaded:
        for name, text in (("config", config), ("cookbook", cookbook), ("secrets", secrets)):
            if text is not None:
                self.write(f"{name}.yaml", text)
        return load(config=None, cookbook=None, secrets=None, overrides=overrides, environ=environ or {})

    def errors(self, *texts: str | None, **more: Any) -> list[str]:
        with pytest.raises(ConfigErrors) as caught:
            self.load(*texts, **more)
        assert str(caught.value).splitlines() == [str(found) for found in caught.value.diagnostics]
        return [str(found) for found in caught.value.diagnostics]

    def warnings(self, *texts: str | None, **more: Any) -> list[str]:
        return [str(found) for found in self.load(*texts, **more).warnings]
