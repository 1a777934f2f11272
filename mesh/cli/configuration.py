"""The one way in which commands load the configuration: the file flags, and this process's environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh.config.loader import Loaded, load

#: Which node commands talk to. They are no settings, and the loader knows so.
URL_VARIABLE = "LLAMESH_URL"
KEY_VARIABLE = "LLAMESH_API_KEY"

#: The files, where no flag names them.
CONFIG_VARIABLE = "LLAMESH_CONFIG"
COOKBOOK_VARIABLE = "LLAMESH_COOKBOOK"
SECRETS_VARIABLE = "LLAMESH_SECRETS"

#: Stands for a cookbook when a command needs the settings only: a mistake in it must not get in the way.
NO_COOKBOOK = Path(os.devnull)


def load_from(
    arguments: argparse.Namespace, *, cookbook: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Loaded:
    """Load what the flags of *arguments* name, else the environment, else the default files.

    *cookbook* is for commands without that flag.
    """
    return load(
        config=arguments.config or _from_environment(CONFIG_VARIABLE),
        cookbook=cookbook or arguments.cookbook or _from_environment(COOKBOOK_VARIABLE),
        secrets=arguments.secrets or _from_environment(SECRETS_VARIABLE),
        overrides=overrides,
        environ=os.environ,
    )


def _from_environment(name: str) -> Path | None:
    return Path(value) if (value := os.environ.get(name)) else None
