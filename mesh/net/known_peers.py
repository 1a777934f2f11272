"""The file ``known_peers``: one key a line, with the name of its node and what is thought of it; people may edit it.

    node_id  ed25519:...  [trusted | revoked | rotated]  [since, a date]  [the key that replaced it, unless trusted]

Comments (``#``) and lines that are not touched stay as they are. A key has one line; of the lines that are trusted,
each has another name. A file that breaks these rules is refused as a whole, with its lines, and never written over.
Every change re-reads the file under a lock, so that commands and a running node do not lose each other's lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from mesh.config.diagnostics import ConfigErrors, Diagnostic
from mesh.core.node_state import PeerKey
from mesh.errors import ConfigError
from mesh.files import PRIVATE, locked, private_directory, read_file, replace_file
from mesh.net.keys import key_text, parse_key

#: The name of a line that revokes a key of which no name is known.
NAMELESS = "-"

_SPACE = " \t\r\f\v"
_DATE = re.compile(r"\d{4}-\d\d-\d\d(T\S*)?")
_UNENCODED = bytes(code for code in range(0x21, 0x7F) if code not in b"%#").decode()


class Standing(StrEnum):
    TRUSTED = "trusted"
    REVOKED = "revoked"  # refused until somebody trusts it again by hand
    ROTATED = "rotated"  # its owner replaced it; refused like a revoked one. Revoked later, it keeps its successor


@dataclass(frozen=True, slots=True)
class Entry:
    """One key."""

    node_id: str
    key: PeerKey
    standing: Standing = Standing.TRUSTED
    since: str = ""
    successor: PeerKey | None = None
    comment: str = ""  #: with its "#"

    def __str__(self) -> str:
        words = [encode_name(self.node_id), key_text(self.key), str(self.standing), self.since]
        words += [key_text(self.successor) if self.successor else "", self.comment]
        return " ".join(filter(None, words))


@dataclass(frozen=True, slots=True)
class _Line:
    text: str  #: as written
    entry: Entry | None = None


#: What changes one time at which the file was written into another; None = there was none.
Stamp = tuple[int, int, int] | None
Change = Callable[["KnownPeers"], "KnownPeers"]


class KnownPeers:
    """What is in the file. Immutable; ``with_entry`` and ``without`` return another one."""

    def __init__(self, lines: Iterable[_Line] = ()) -> None:
        self._lines = tuple(lines)
        self.by_key = {line.entry.key: line.entry for line in self._lines if line.entry}
        trusted = (entry for entry in self.by_key.values() if entry.standing is Standing.TRUSTED)
        self.by_name = {entry.node_id: entry for entry in trusted}
        self._revoked_names = {
            entry.node_id: entry
            for entry in self.by_key.values()
            if entry.standing is Standing.REVOKED and entry.successor is None and entry.node_id != NAMELESS
        }

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self.by_key.values())

    def refused(self, key: PeerKey) -> bool:
        """Whether *key* is not to be accepted, whatever else speaks for it."""
        entry = self.by_key.get(key)
        return entry is not None and entry.standing is not Standing.TRUSTED

    def reserved(self, node_id: str) -> Entry | None:
        """Return the revoked entry that keeps *node_id* from others: a name that is known must not pass on by itself.

        None if somebody is trusted under it, or its owner only replaced the key.
        """
        return None if node_id in self.by_name else self._revoked_names.get(node_id)

    @property
    def refusals(self) -> tuple[Entry, ...]:
        """The entries that are not trusted."""
        return tuple(entry for entry in self.by_key.values() if entry.standing is not Standing.TRUSTED)

    def with_others(self, entries: Iterable[Entry]) -> KnownPeers:
        """Return these with those of *entries* at the end whose keys are not here."""
        new = [entry for entry in entries if entry.key not in self.by_key]
        return KnownPeers((*self._lines, *(_Line(str(entry), entry) for entry in new))) if new else self

    def with_entry(self, entry: Entry) -> KnownPeers:
        """Return these with *entry* in the place of its key's line, or at the end; the line's comment stays."""
        old = self.by_key.get(entry.key)
        if old is None:
            return KnownPeers((*self._lines, _Line(str(entry), entry)))
        entry = replace(entry, comment=entry.comment or old.comment)
        if entry == old:
            return self
        line = _Line(str(entry), entry)
        return KnownPeers(line if other.entry is old else other for other in self._lines)

    def without(self, key: PeerKey) -> KnownPeers:
        """Return these without the line of *key*."""
        return KnownPeers(line for line in self._lines if line.entry is None or line.entry.key != key)

    def render(self) -> bytes:
        """Return the file's content."""
        return "".join(f"{line.text}\n" for line in self._lines).encode("utf-8", "surrogateescape")


def parse(content: bytes, source: str) -> KnownPeers:
    """Return what *content* says. Raise ``ConfigErrors`` with every line that is wrong; *source* is its name there."""
    lines: list[_Line] = []
    problems: list[Diagnostic] = []
    keys: dict[PeerKey, int] = {}
    names: dict[str, int] = {}
    texts = content.decode("utf-8", "surrogateescape").split("\n")
    for number, text in enumerate(texts[:-1] if texts[-1] == "" else texts, 1):
        try:
            line = _Line(text, _parse_line(text))
            _check_unique(line.entry, number, keys, names)
        except ValueError as error:
            problems.append(Diagnostic(source, number, "", str(error)))
        else:
            lines.append(line)
    if problems:
        raise ConfigErrors(problems)
    return KnownPeers(lines)


def _check_unique(entry: Entry | None, number: int, keys: dict[PeerKey, int], names: dict[str, int]) -> None:
    if entry is None:
        return
    if (first := keys.setdefault(entry.key, number)) != number:
        raise ValueError(f"this key is in line {first} already; remove one of the two lines")
    if entry.standing is Standing.TRUSTED and (first := names.setdefault(entry.node_id, number)) != number:
        raise ValueError(f"line {first} trusts another key of this node; remove one, or write 'revoked' behind its key")


def _parse_line(text: str) -> Entry | None:
    """Return the entry in a line, None if it is blank or a comment."""
    body, comment = _split_comment(text.strip(_SPACE))
    if not body:
        return None
    if any("\udc80" <= character <= "\udcff" for character in body):
        raise ValueError("is not UTF-8")
    name, *words = re.split(f"[{_SPACE}]+", body)
    if not words:
        raise ValueError("expected a node's name and its key: NODE ed25519:...")
    try:
        key = parse_key(words.pop(0))
    except ValueError as error:
        raise ValueError(f"what follows the node's name {error}") from error
    standing = Standing.TRUSTED
    if words and words[0].lower() in list(Standing):
        standing = Standing(words.pop(0).lower())
    since = words.pop(0) if words and _DATE.fullmatch(words[0]) else ""
    successor = None
    if words and standing is not Standing.TRUSTED:
        successor = parse_key(words.pop(0))
    if words:
        raise ValueError(f"{words[0]!r} is not understood; behind the key: trusted, revoked or rotated, then a date")
    return Entry(decode_name(name), key, standing, since, successor, comment)


def _split_comment(text: str) -> tuple[str, str]:
    """Return *text* up to a word that begins with "#", and from there on."""
    found = re.search(rf"(?:^|[{_SPACE}])#", text)
    if found is None:
        return text, ""
    start = found.end() - 1
    return text[:start].rstrip(_SPACE), text[start:]


def encode_name(node_id: str) -> str:
    """Return *node_id* as one word of printable ASCII: a peer chose it, and it is shown on terminals."""
    return quote_from_bytes(node_id.encode("utf-8", "replace"), safe=_UNENCODED)


def decode_name(word: str) -> str:
    """Return the name that *word* encodes; names that need no encoding may be written as they are."""
    try:
        name = unquote_to_bytes(word).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{word!r} is not a node's name") from error
    if not name:
        raise ValueError("a node's name is empty")
    return name


def read(path: Path) -> tuple[KnownPeers, Stamp]:
    """Return what is in the file at *path*, and its stamp; a file that is not there is an empty one.

    Raise ``ConfigError`` if it cannot be read or is not valid.
    """
    try:
        content, status = read_file(path)
    except FileNotFoundError:
        return KnownPeers(), None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return parse(content, str(path)), _stamp(status)


def stamp(path: Path) -> Stamp:
    """Return what identifies the present content of *path*, without reading it (trap 81)."""
    try:
        return _stamp(path.stat())
    except FileNotFoundError:
        return None
    except OSError as error:
        return -1, error.errno or 0, 0


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size


def update(path: Path, change: Change) -> tuple[KnownPeers, Stamp]:
    """Apply *change* to what is in the file now, and write that. Blocks.

    Raise ``ConfigError`` if the file is not valid, so that nothing in it gets lost, and ``OSError`` if it cannot be
    written.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    private_directory(target.parent)
    with locked(target):
        known, seen = read(target)
        changed = change(known)
        if changed is known:
            return known, seen
        return changed, _stamp(replace_file(target, changed.render(), mode=PRIVATE))


def learn(
    known: KnownPeers, node_id: str, key: PeerKey, today: str, *, instead_of: PeerKey | None = None
) -> KnownPeers:
    """Return *known* with *key* trusted as *node_id*'s, be it new or renamed; what was decided meanwhile goes first.

    The name may be taken from *instead_of*, whose line goes.
    """
    holder = known.by_name.get(node_id)
    if known.refused(key) or (holder is not None and holder.key not in (key, instead_of)):
        return known
    if holder is not None and holder.key != key:
        known = known.without(holder.key)
    old = known.by_key.get(key)
    return known.with_entry(replace(old, node_id=node_id) if old else Entry(node_id, key, since=today))


def rotate(
    known: KnownPeers, old: PeerKey, new: PeerKey, node_id: str, today: str, *, instead_of: PeerKey | None = None
) -> KnownPeers:
    """Return *known* with *new* in the place of *old*, which is refused from now on. *instead_of* as in ``learn``."""
    entry = known.by_key.get(old, Entry(node_id, old))
    if known.refused(new):
        return known
    if entry.standing is Standing.TRUSTED:
        entry = replace(entry, standing=Standing.ROTATED, since=today, successor=new)
    elif entry.successor != new:
        return known
    return learn(known.with_entry(entry), node_id, new, today, instead_of=instead_of)


def trust(known: KnownPeers, node_id: str, key: PeerKey, today: str) -> KnownPeers:
    """Return *known* after somebody said that *key* is *node_id*'s: it counts again, the node's other key no more."""
    holder = known.by_name.get(node_id)
    if holder is not None and holder.key != key:
        known = revoke(known, holder.key, today)
    old = known.by_key.get(key)
    if old is not None and old.standing is Standing.TRUSTED:
        return known.with_entry(replace(old, node_id=node_id))
    return known.with_entry(Entry(node_id, key, since=today))


def revoke(known: KnownPeers, key: PeerKey, today: str) -> KnownPeers:
    """Return *known* with *key* refused, be it known or not. What took its place is another key and keeps its trust."""
    entry = known.by_key.get(key, Entry(NAMELESS, key))
    if entry.standing is Standing.REVOKED:
        return known
    return known.with_entry(replace(entry, standing=Standing.REVOKED, since=today))
