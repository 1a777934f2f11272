"""Makes words of whisper-server's tokens, each with its own time. Pure.

A token is a word, a part of one, a punctuation mark, or some bytes of a character; then it is a replacement character,
and only the segment's text has the real one. A word begins with a blank, but in languages that are written without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_HALF = "\ufffd"


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Word:
    text: str  #: without blanks around it
    start: float
    end: float


def words(tokens: Sequence[Token], text: str, *, spaced: bool) -> list[Word]:
    """Return the words of a segment that says *text*; *spaced*: its language puts blanks between them."""
    groups = list(_groups(tokens, spaced=spaced))
    found, at = [], 0
    for number, group in enumerate(groups):
        following = groups[number + 1][0].text if number + 1 < len(groups) else ""
        said, at = _said(group, following, text, at)
        if said.strip():
            found.append(Word(said.strip(), group[0].start, group[-1].end))
    return found


def _groups(tokens: Sequence[Token], *, spaced: bool) -> Iterator[list[Token]]:
    """Yield the tokens of each word."""
    group: list[Token] = []
    for token in tokens:
        if group and _begins(token, group[-1], spaced=spaced):
            yield group
            group = []
        group.append(token)
    if group:
        yield group


def _begins(token: Token, before: Token, *, spaced: bool) -> bool:
    """Whether *token* begins a word."""
    if spaced or token.text.startswith(" "):
        return token.text.startswith(" ")
    if token.text.startswith(_HALF):
        return not before.text.endswith(_HALF)
    return any(character.isalnum() for character in token.text)


def _said(group: Sequence[Token], following: str, text: str, at: int) -> tuple[str, int]:
    """Return what *group* says, and where in *text* that ends; *text* has it from *at* on, if they agree at all."""
    said = "".join(token.text for token in group)
    if _HALF not in said:
        end = at + len(said)
        return said, end if text.startswith(said, at) else at
    sure = said.partition(_HALF)[0]
    next_sure = following.partition(_HALF)[0]
    end = text.find(next_sure, at + len(sure) + 1) if next_sure else len(text)
    if not text.startswith(sure, at) or end < 0:
        return said, at
    return text[at:end], end
