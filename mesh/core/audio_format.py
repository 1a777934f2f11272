"""What a file is, by its first bytes: whether whisper-server reads it, and what to call it if not. Pure.

What is readable was tried with whisper-server 1.8.5, which reads by miniaudio and stb_vorbis. What no row knows may
still be MP3: a recording of a stream starts anywhere, and its decoder looks for the first frame.

ffmpeg reads playlists and manifests as well, and then the files that those name, whoever's they are. So it gets only
what is known by its magic numbers (``sniff``) and shows no sign of a list (``sign_of_a_list``).
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from enum import Enum

#: how much of a file has to be given; what stands before an MP3's first frame may be long
HEAD_BYTES = 16 * 1024

#: as an error message lists them
READABLE = "WAV, AIFF, MP3, FLAC and Ogg Vorbis"


class Readable(Enum):
    YES = "by itself"
    UNSEEN = "by itself; but what it is, and what ffmpeg would make of it, is out of sight"
    CONVERTED = "after ffmpeg made WAV of it"
    NO = "not at all"


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """A name for people, with its article where it needs one."""

    name: str
    readable: Readable


def _rows(readable: Readable, *rows: tuple[str, bytes]) -> tuple[tuple[re.Pattern[bytes], AudioFormat], ...]:
    return tuple((re.compile(pattern, re.DOTALL), AudioFormat(name, readable)) for name, pattern in rows)


#: Patterns at the start of a file; the first that matches counts.
_KNOWN = (
    *_rows(
        Readable.YES,
        ("WAV", rb"(?:RIFF|RIFX|RF64|BW64).{4}WAVE|riff\x2e\x91\xcf\x11"),
        ("AIFF", rb"FORM.{4}AIF[FC]"),
        ("FLAC", rb"fLaC"),
        ("Ogg Vorbis", rb"OggS.{24}\x01vorbis"),
    ),
    *_rows(
        Readable.CONVERTED,
        ("Ogg Opus", rb"OggS.{24}OpusHead"),
        ("Ogg FLAC", rb"OggS.{24}\x7fFLAC"),
        ("Ogg Speex", rb"OggS.{24}Speex"),
        ("Ogg of another kind than Vorbis", rb"OggS\x00"),
        # their first four bytes are a length: no text has the bytes that a plausible one begins with
        ("QuickTime (mov)", rb"\x00\x00.{2}ftypqt  "),
        ("3GP", rb"\x00\x00.{2}ftyp3g"),
        ("MP4 (m4a, mp4)", rb"\x00\x00.{2}ftyp(?!avif|heic|heix|mif1)|[\x00-\x08].{3}moov"),
        ("WebM", rb"\x1aE\xdf\xa3.{0,40}webm"),
        ("Matroska (mkv)", rb"\x1aE\xdf\xa3"),
        ("AVI", rb"RIFF.{4}AVI "),
        ("ASF (wma, wmv)", rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
        ("AAC (ADTS)", rb"\xff[\xf0\xf1\xf8\xf9]|ADIF"),
        ("AC-3", rb"\x0b\x77"),
        ("AMR", rb"#!AMR(?:-WB)?(?:_MC1\.0)?\n"),
        ("CAF", rb"caff"),
        ("AU", rb"\.snd"),
        ("WavPack", rb"wvpk"),
        ("Monkey's Audio (ape)", rb"MAC "),
        ("Musepack", rb"MPCK|MP\+"),
        ("FLV", rb"FLV\x01"),
        ("DTS", rb"\x7f\xfe\x80\x01"),
        ("True Audio (tta)", rb"TTA1"),
        ("VOC", rb"Creative Voice File\x1a"),
        ("RealMedia", rb"\.RMF\x00"),
        ("an MPEG stream (ts, mpg)", rb"G.{187}G|\x00\x00\x01\xba"),
    ),
    *_rows(
        Readable.NO,
        ("MIDI, which holds notes and no sound", rb"MThd"),
        ("a GIF image", rb"GIF8"),
        ("a PNG image", rb"\x89PNG"),
        ("a JPEG image", rb"\xff\xd8\xff"),
        ("a WebP image", rb"RIFF.{4}WEBP"),
        ("an HEIC or AVIF image", rb".{4}ftyp(?:avif|heic|heix|mif1)"),
        ("a PDF document", rb"%PDF"),
        ("a zip archive", rb"PK\x03\x04"),
        ("a gzip archive", rb"\x1f\x8b"),
        ("a program", rb"\x7fELF|\xcf\xfa\xed\xfe|MZ.{56,}?PE\x00\x00"),
    ),
)
_MP3 = AudioFormat("MP3", Readable.YES)
_TEXT = AudioFormat("text", Readable.NO)
_HTML = AudioFormat("an HTML page", Readable.NO)
_JSON = AudioFormat("JSON", Readable.NO)
_NOTHING = AudioFormat("nothing that is known", Readable.NO)
_TAG_ONLY = AudioFormat("an ID3 tag without audio behind it", Readable.NO)
_UNSEEN = AudioFormat("MP3 behind a long ID3 tag", Readable.UNSEEN)

_ID3_HEADER = re.compile(rb"ID3[^\xff][^\xff].[\x00-\x7f]{4}", re.DOTALL)
_ID3_HEADER_BYTES = 10
_ID3_FOOTER_FLAG = 0x10
_MOST_TAGS = 4


def sniff(file: bytes | memoryview) -> AudioFormat:
    """Return what *file* is, of which its start is enough; only what follows a tag must be there as well."""
    start = tags_bytes(file)
    head = bytes(file[start : start + HEAD_BYTES])
    if not start:
        return _known(head) or _text(head) or (_MP3 if _has_mp3_frames(head) else _NOTHING)
    if not head:
        return _UNSEEN
    return _known(head) or (_MP3 if _frame_bytes(head[:_HEADER_BYTES]) or _has_mp3_frames(head) else _TAG_ONLY)


def tags_bytes(file: bytes | memoryview) -> int:
    """Return how long the ID3 tags at its start are, which stand before AAC and FLAC, too."""
    at = 0
    for _ in range(_MOST_TAGS):
        header = bytes(file[at : at + _ID3_HEADER_BYTES])
        if not _ID3_HEADER.fullmatch(header):
            break
        size = 0
        for byte in header[6:]:
            size = size << 7 | byte
        at += size + _ID3_HEADER_BYTES * (2 if header[5] & _ID3_FOOTER_FLAG else 1)
    return at


#: What ffmpeg knows such files by. Not ``<?xml``: broadcast WAV has XML in it, and no list of XML is without these.
_SIGNS = re.compile(
    rb"#EXTM3U|#EXT-X-|ffconcat|concat:|<MPD|<SmoothStreaming|<CompositionPlaylist|c=IN IP|# VobSub", re.IGNORECASE
)
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*<")


def sign_of_a_list(file: bytes | memoryview) -> str | None:
    """Return what in *file* ffmpeg might take for a list of other files, whatever else the file is; None if nothing."""
    for start in {0, tags_bytes(file)}:
        head = bytes(file[start : start + HEAD_BYTES])
        if (found := _SIGNS.search(head)) is not None:
            return found[0].decode("ascii")
        if _MARKUP.match(head):
            return "<"
        if _text(head) is not None:
            return "text"
    return None


def _known(head: bytes) -> AudioFormat | None:
    return next((found for pattern, found in _KNOWN if pattern.match(head)), None)


_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def _text(head: bytes) -> AudioFormat | None:
    """Return the kind of text, if *head* is nothing else."""
    if not head or _CONTROLS.search(head):
        return None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    start = head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return _HTML
    return _JSON if start.startswith((b"{", b"[")) else _TEXT


# -- MPEG audio of layers 1 to 3

_KBITS = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_SYNC = re.compile(rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]")  # version and layer are none of the reserved ones
_FRAMES_IN_A_ROW = 3
_HEADER_BYTES = 4


def _has_mp3_frames(head: bytes) -> bool:
    return any(_is_row(head, match.start()) for match in _SYNC.finditer(head))


def _is_row(head: bytes, at: int) -> bool:
    """Whether frames follow each other from *at* on, up to the end; fewer than two are an accident."""
    for number in range(_FRAMES_IN_A_ROW):
        if number > 1 and at + _HEADER_BYTES > len(head):
            return True
        size = _frame_bytes(head[at : at + _HEADER_BYTES])
        if not size:
            return False
        at += size
    return True


def _frame_bytes(header: bytes) -> int:
    """Return the length of the frame that *header* begins; 0 if it begins none."""
    if len(header) < _HEADER_BYTES or not _SYNC.match(header):
        return 0
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bits, rate, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version not in _RATES_HZ or rate == 3 or not 0 < bits < 15:
        return 0
    key = (1, layer) if version == 3 else (2, min(layer, 2))
    bits_per_s, hz = _KBITS[key][bits - 1] * 1000, _RATES_HZ[version][rate]
    if layer == 1:
        return (12 * bits_per_s // hz + padding) * 4
    samples_of_8 = 72 if layer == 3 and version != 3 else 144
    return samples_of_8 * bits_per_s // hz + padding
