"""What a file is taken for. That whisper-server agrees: ``tests/engine/test_whisper_real.py``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.audio_format import HEAD_BYTES, AudioFormat, Readable, sign_of_a_list, sniff, tags_bytes

OGG = b"OggS" + bytes(24)
#: MPEG 1 layer 3, 128 kbit/s, 44.1 kHz: 417 bytes
MP3_FRAME = b"\xff\xfb\x90\x00" + bytes(413)
#: MPEG 2 layer 2, 64 kbit/s, 16 kHz: 576 bytes
MP2_FRAME = b"\xff\xf5\x88\xc4" + bytes(572)
#: MPEG 2 layer 3, 24 kbit/s, 16 kHz: 108 bytes
LOW_FRAME = b"\xff\xf3\x38\xc4" + bytes(104)
#: MPEG 1 layer 1, 384 kbit/s, 48 kHz: 384 bytes
MP1_FRAME = b"\xff\xff\xc4\x00" + bytes(380)


#: as DASH's, in an encoding that is none of text that we know
MANIFEST = b'<?xml version="1.0" encoding="ISO-8859-1"?><!--\xe9--><MPD><BaseURL>file:/etc/x.m4a</BaseURL></MPD>'


def id3(follows: bytes, size: int = 200) -> bytes:
    return b"ID3\x04\x00\x00" + bytes((0, size >> 14, size >> 7 & 0x7F, size & 0x7F)) + bytes(size) + follows


@pytest.mark.parametrize(
    "head",
    [
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
        b"RF64\xff\xff\xff\xffWAVEds64",
        b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb",
        b"FORM\x00\x05\x5f\x00AIFFCOMM",
        b"fLaC\x00\x00\x00\x22",
        OGG + b"\x01vorbis",
        id3(MP3_FRAME),
        id3(MP3_FRAME, size=100_000),
        id3(id3(MP3_FRAME)),
        id3(bytes(1000) + MP3_FRAME * 3),
        id3(b"fLaC\x00"),
        MP3_FRAME * 3,
        MP2_FRAME * 3,
        LOW_FRAME * 3,
        MP1_FRAME * 3,
        MP3_FRAME * 2,
        MP3_FRAME[100:] + MP3_FRAME * 3,
        bytes(1000) + MP3_FRAME * 3,
    ],
)
def test_what_it_reads(head: bytes) -> None:
    assert sniff(head).readable is Readable.YES


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\x00\x00\x00\x1cftypM4A \x00", "MP4 (m4a, mp4)"),
        (b"\x00\x00\x00\x14ftypqt  \x00", "QuickTime (mov)"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x84webm", "WebM"),
        (b"\x1aE\xdf\xa3\xa3B\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x88matroska", "Matroska (mkv)"),
        (OGG + b"OpusHead", "Ogg Opus"),
        (OGG + b"\x80theora", "Ogg of another kind than Vorbis"),
        (b"\xff\xf1\x60\x40\x03\x5f\xfc" * 100, "AAC (ADTS)"),
        (id3(b"\xff\xf1\x60\x40\x03\x5f\xfc"), "AAC (ADTS)"),
        (b"0&\xb2u\x8ef\xcf\x11\xa6\xd9", "ASF (wma, wmv)"),
        (b"#!AMR-WB\n\x04", "AMR"),
        (b"\x7f\xfe\x80\x01\xfc", "DTS"),
        (b"TTA1\x01\x00", "True Audio (tta)"),
        (b"Creative Voice File\x1a\x1a", "VOC"),
        (b".RMF\x00\x00", "RealMedia"),
    ],
)
def test_what_must_be_converted(head: bytes, name: str) -> None:
    assert sniff(head) == AudioFormat(name, Readable.CONVERTED)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"GIF89a\x01\x00", "a GIF image"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a JPEG image"),
        (b"\x00\x00\x00\x1cftypheic\x00", "an HEIC or AVIF image"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"PK\x03\x04\x14", "a zip archive"),
        (b"MThd\x00\x00\x00\x06", "MIDI, which holds notes and no sound"),
        (b"no audio", "text"),
        (("x" * (HEAD_BYTES - 1) + "ä").encode()[:HEAD_BYTES], "text"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "text"),
        (b"  <!DOCTYPE html>\n", "an HTML page"),
        (b'{"text": 1}', "JSON"),
        (MP3_FRAME + b"no other frame", "nothing that is known"),
        (b"\x01\x02\x03\x04", "nothing that is known"),
        (MANIFEST, "nothing that is known"),
        (b"ffconcat version 1.0\nfile secret.wav\n#\xff", "nothing that is known"),
        (b"<!--moov -->\xff" + MANIFEST, "nothing that is known"),
        (b"<!--ftyp -->\xff" + MANIFEST, "nothing that is known"),
        (id3(b"ffconcat version 1.0\nfile secret.wav\n#\xff"), "an ID3 tag without audio behind it"),
        (id3(MANIFEST, size=100_000), "an ID3 tag without audio behind it"),
    ],
)
def test_what_nobody_reads(head: bytes, name: str) -> None:
    assert sniff(head) == AudioFormat(name, Readable.NO)


def test_a_tag_that_ends_out_of_sight_is_for_those_who_cannot_be_led_elsewhere() -> None:
    head = id3(MP3_FRAME, size=100_000)[:HEAD_BYTES]
    assert sniff(head) == AudioFormat("MP3 behind a long ID3 tag", Readable.UNSEEN)


def test_how_long_tags_are() -> None:
    assert tags_bytes(id3(b"x", size=300)) == 310
    assert tags_bytes(memoryview(id3(id3(b"x")))) == 420
    assert tags_bytes(id3(b"").replace(b"\x04\x00\x00", b"\x04\x00\x10") + bytes(10)) == 220  # it has a footer
    assert tags_bytes(b"ID3\x04\x00\x00\x00\x00\x00\x80" + bytes(200)) == 0  # no length
    assert tags_bytes(b"RIFF") == 0


@pytest.mark.parametrize(
    ("file", "sign"),
    [
        (MANIFEST, "<MPD"),
        (b"<?xml version='1.0'?><!--\xe9-->", "<"),
        (b"\xef\xbb\xbf \n<!--\xff\xfb", "<"),
        (b"RIFF....WAVE\x00\x01" + b"#extm3u", "#extm3u"),
        (b"\xff\nffconcat version 1.0\n", "ffconcat"),
        (MP3_FRAME * 3 + b"concat:a|b", "concat:"),
        (MP3_FRAME * 3 + b"\nv=0\r\nc=IN IP4 1.2.3.4\r\n", "c=IN IP"),
        (b"\x00\x00\x00\x1cftypM4A <smoothstreamingMedia", "<smoothstreaming"),
        (id3(b"\x00#EXT-X-VERSION:3", size=100_000), "#EXT-X-"),
        (id3(b" <!-- \xff", size=100_000), "<"),
        (b"fLaC is text", "text"),
        (MP3_FRAME * 3, None),
        (id3(MP3_FRAME * 3), None),
        (b"RIFF\x00\x00\x00\x00WAVEiXML<?xml version='1.0'?><BWFXML>", None),
    ],
)
def test_signs_of_lists(file: bytes, sign: str | None) -> None:
    found = sign_of_a_list(file)
    assert (found and found.lower()) == (sign and sign.lower())


@given(st.binary(max_size=3000))
def test_any_bytes_have_a_name(head: bytes) -> None:
    assert sniff(head).name


@given(st.binary(max_size=400), st.sampled_from((MP3_FRAME, MP2_FRAME, LOW_FRAME, MP1_FRAME)))
def test_frames_are_found_behind_what_is_in_front(junk: bytes, frame: bytes) -> None:
    assert sniff(b"\x01" + junk + frame * 4).readable is Readable.YES
