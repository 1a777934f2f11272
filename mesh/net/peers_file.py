"""The file ``peers``: addresses of nodes, one host:port a line, which ``llama-mesh join`` writes and discovery reads.

Comments (``#``) and what is not touched stay as they are. A line that is no address is skipped: a mistake in one
must not cost the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from mesh.config.address import join_address, split_address
from mesh.files import PRIVATE, locked, private_directory, read_file, replace_file
from mesh.logs import Log

_log = Log(__name__)


def read_peers(path: Path) -> tuple[str, ...]:
    """Return the addresses in the file, each once, in its order; none if it is not there. Raise ``OSError``."""
    addresses = []
    for number, line in enumerate(_lines(path), 1):
        text = _address(line)
        try:
            if text:
                addresses.append(normal_address(text))
        except ValueError as error:
            _complain(str(path), number, text, str(error))
    return tuple(dict.fromkeys(addresses))


def add_peer(path: Path, address: str) -> bool:
    """Add *address* at the end; False if it is there already. Raise ``OSError`` or, if it is none, ``ValueError``."""
    address = normal_address(address)

    def add(lines: list[str]) -> list[str]:
        return lines if any(_is(line, (address,)) for line in lines) else [*lines, address]

    return _edit(path, add)


def remove_peer(path: Path, address: str) -> bool:
    """Remove *address*; False if it is not there. Raise ``OSError`` or, if it is none, ``ValueError``."""
    return remove_peers(path, (normal_address(address),))


def remove_peers(path: Path, addresses: Iterable[str]) -> bool:
    """Remove all of *addresses*, as ``read_peers`` returned them; False if none is there. Raise ``OSError``."""
    unwanted = tuple(addresses)
    return path.exists() and _edit(path, lambda lines: [line for line in lines if not _is(line, unwanted)])


def normal_address(text: str) -> str:
    """Return host:port in one spelling; raise ``ValueError`` if it is none that can be dialled."""
    host, port = split_address(text)
    if port == 0:
        raise ValueError("port 0 cannot be dialled")
    return join_address(host.lower(), port)


def _edit(path: Path, change: Callable[[list[str]], list[str]]) -> bool:
    target = Path(os.path.realpath(path))
    private_directory(target.parent)
    with locked(target):
        before = _lines(target)
        after = change(before)
        if after == before:
            return False
        content = "".join(f"{line}\n" for line in after)
        replace_file(target, content.encode("utf-8", "surrogateescape"), mode=PRIVATE)
    return True


def _lines(path: Path) -> list[str]:
    try:
        content, _ = read_file(path)
    except FileNotFoundError:
        return []
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _address(line: str) -> str:
    return line.partition("#")[0].strip()


def _is(line: str, addresses: tuple[str, ...]) -> bool:
    try:
        return bool(_address(line)) and normal_address(_address(line)) in addresses
    except ValueError:
        return False


@lru_cache(maxsize=256)  # once for each such line, however often the file is read
def _complain(path: str, number: int, text: str, reason: str) -> None:
    _log.warning("a line of the peers file is no address and is skipped", file=f"{path}:{number}", reason=reason)
