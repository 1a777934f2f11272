"""Splits ``llama_server_args`` exactly as llamesh does (the Rust crate ``shlex``), and quotes words back.

Python's ``shlex.split`` differs: it keeps the backslash of ``"\\$"``, starts comments inside words and treats CR as a
space. One difference to the crate is meant: a backslash at the end of a line between two words is only a line break,
as in every shell; the crate makes an empty word of it, which llama-server then refuses.
"""

from __future__ import annotations

import re

_SPACE = " \t\n"
_ESCAPABLE_IN_DOUBLE_QUOTES = '$`"\\'
_SAFE = re.compile(r"[A-Za-z0-9_@%+=:,./^-]+")


class ShellSyntaxError(ValueError):
    """The text ends inside a quote or after a backslash."""


def split(text: str) -> list[str]:
    """Return the words of *text*; raise ``ShellSyntaxError`` naming the quote that is not closed."""
    words: list[str] = []
    at = _next_word(text, 0)
    while at < len(text):
        word, at = _word(text, at)
        words.append(word)
        at = _next_word(text, at)
    return words


def _next_word(text: str, at: int) -> int:
    """Return where the next word starts: behind spaces, line breaks and comments."""
    while at < len(text):
        if text[at] in _SPACE:
            at += 1
        elif text.startswith("\\\n", at):
            at += 2
        elif text[at] == "#":
            at = (text.find("\n", at) + 1) or len(text)
        else:
            break
    return at


def _word(text: str, at: int) -> tuple[str, int]:
    parts: list[str] = []
    while at < len(text) and text[at] not in _SPACE:
        if text[at] == "'":
            part, at = _single_quoted(text, at)
        elif text[at] == '"':
            part, at = _double_quoted(text, at)
        elif text[at] == "\\":
            part, at = _escaped(text, at)
        else:
            part, at = text[at], at + 1
        parts.append(part)
    return "".join(parts), at


def _escaped(text: str, at: int) -> tuple[str, int]:
    if at + 1 == len(text):
        raise ShellSyntaxError(f"the backslash at the end (character {at + 1}) escapes nothing")
    return text[at + 1].replace("\n", ""), at + 2


def _single_quoted(text: str, at: int) -> tuple[str, int]:
    end = text.find("'", at + 1)
    if end < 0:
        raise ShellSyntaxError(f"the single quote at character {at + 1} is never closed")
    return text[at + 1 : end], end + 1


def _double_quoted(text: str, start: int) -> tuple[str, int]:
    parts: list[str] = []
    at = start + 1
    while at < len(text):
        char = text[at]
        if char == '"':
            return "".join(parts), at + 1
        if char == "\\" and at + 1 < len(text):
            escaped = text[at + 1]
            parts.append(
                "" if escaped == "\n" else escaped if escaped in _ESCAPABLE_IN_DOUBLE_QUOTES else "\\" + escaped
            )
            at += 2
        else:
            parts.append(char)
            at += 1
    raise ShellSyntaxError(f"the double quote at character {start + 1} is never closed")


def quote(word: str) -> str:
    """Return *word* so that ``split`` gives it back as one word; plain words stay as they are."""
    if _SAFE.fullmatch(word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"


def join(words: list[str] | tuple[str, ...]) -> str:
    """Return one line that ``split`` takes apart into *words*."""
    return " ".join(map(quote, words))
