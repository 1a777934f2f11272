"""Forms by offsets, wherever the bytes are cut; whatever is no form is refused in words."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.api.form_reader import (
    MAX_FIELD_BYTES,
    MAX_PARTS,
    MAX_TEXT_BYTES,
    FormParser,
    FormReader,
    NotAFormError,
    ReceivedForm,
)
from mesh.core.form import Form
from mesh.errors import BodyTooLargeError, RequestError
from tests.api.forms import BOUNDARY, field, file, form

TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def parse(body: bytes, *cuts: int) -> Form:
    parser = FormParser(TYPE)
    edges = [0, *sorted(cuts), len(body)]
    for start, end in pairwise(edges):
        parser.feed(body[start:end])
    assert parser.complete
    return parser.form


def reader(length: int | None, limit_bytes: int = 10**9, memory_bytes: int = 10**9) -> FormReader:
    return FormReader(TYPE, length, limit_bytes=limit_bytes, memory_bytes=memory_bytes)


def read(body: bytes) -> ReceivedForm:
    taker = reader(len(body))
    taker.feed(body, 0)
    return taker.finish()


def test_fields_and_files_in_any_order() -> None:
    body = form(file(b"RIFF"), field("model", "a"), field("prompt", "grüße"), field("model", "b"), file(b"", "x", "ü"))
    parsed = parse(body)
    assert parsed.fields == (("model", "a"), ("prompt", "grüße"), ("model", "b"))
    assert parsed.get("model") == "b"
    assert [(f.name, f.filename, body[f.start : f.end]) for f in parsed.files] == [
        ("file", "a.wav", b"RIFF"),
        ("x", "ü", b""),
    ]


NEARLY = f"\r\n--{BOUNDARY}"


@given(
    content=st.lists(
        st.one_of(
            st.binary(max_size=8),
            st.integers(1, len(NEARLY) - 1).map(lambda n: NEARLY[:n].encode()),
            st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"\r\n--", NEARLY.encode() + b"x", NEARLY.encode() + b"-x"]),
        ),
        max_size=6,
    ).map(b"".join),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    single=st.booleans(),
)
def test_offsets_are_right_wherever_it_is_cut(content: bytes, cuts: list[int], single: bool) -> None:
    """What looks like the beginning of a boundary, and is none, is content."""
    body = form(field("a", "1"), file(content), field("b", content.replace(b"\r", b"").replace(b"\n", b"")))
    places = range(len(body)) if single else [min(cut, len(body)) for cut in cuts]
    parsed = parse(body, *places)
    (found,) = parsed.files
    assert body[found.start : found.end] == content
    assert parsed.fields[0] == ("a", "1")


@given(body=st.binary(max_size=200), cut=st.integers(0, 200))
def test_garbage_is_refused_and_never_crashes(body: bytes, cut: int) -> None:
    taker = reader(len(body) or None)
    try:
        taker.feed(body[:cut], 0)
        if not taker.body_complete:
            taker.feed(body[cut:], 0)
        received = taker.finish()
    except RequestError:
        return
    received.body.close()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (form(field("model", "a"))[:-6], "ends before its closing boundary"),
        (b"{}" * 20, "does not begin with the boundary"),
        (b"a preamble\r\n" + form(field("model", "a")), "does not begin with the boundary"),
        (form(b'Content-Disposition: form-data; filename="a"\r\n\r\nx'), "no Content-Disposition with a name"),
        (form(b"Content-Disp\x00osition: form-data\r\n\r\nx"), "malformed multipart form"),
        (form(*[field("a", "")] * (MAX_PARTS + 1)), "more than 1000 parts"),
    ],
)
def test_a_broken_form_is_refused_in_words(body: bytes, text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        read(body)
    assert caught.value.status == 400


def test_as_much_as_may_be() -> None:
    received = read(form(*[field("a", "")] * (MAX_PARTS - 1), field("b", "x" * MAX_FIELD_BYTES)))
    assert len(received.form.fields) == MAX_PARTS
    with pytest.raises(BodyTooLargeError, match=r"'b'.*a file needs a filename"):
        read(form(field("b", "x" * (MAX_FIELD_BYTES + 1))))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("application/json", "the request is application/json"),
        ("", "has no Content-Type"),
        ("application/x-www-form-urlencoded; boundary=x", "x-www-form-urlencoded"),
    ],
)
def test_what_is_no_form_is_a_415_that_says_what_is_expected(kind: str, text: str) -> None:
    with pytest.raises(NotAFormError, match=text) as caught:
        FormParser(kind)
    assert caught.value.status == 415
    assert "multipart/form-data form with the audio in its field 'file'" in caught.value.message


@pytest.mark.parametrize("boundary", ["", "; boundary=", '; boundary="a b "', f"; boundary={'x' * 71}", "; boundary=ä"])
def test_a_form_needs_a_boundary(boundary: str) -> None:
    with pytest.raises(RequestError, match="no valid boundary"):
        FormParser(f"multipart/form-data{boundary}")


def test_the_body_ends_where_its_length_says() -> None:
    body = form(file(b"x"))
    taker = reader(len(body))
    assert taker.feed(b"??" + body[:10], 2) == 12
    assert not taker.body_complete
    assert taker.feed(body[10:] + b"GET /", 0) == len(body) - 10
    assert taker.body_complete
    assert bytes(taker.finish().body.view) == body


def test_chunks_are_taken_apart() -> None:
    body = form(file(b"x" * 100))
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))
    taker = reader(None)
    assert taker.feed(chunked + b"0\r\n\r\nGET", 0) == len(chunked) + 5
    assert taker.body_complete
    received = taker.finish()
    assert bytes(received.body.view) == body
    assert len(received.form.files) == 1


def test_the_limit_counts_for_chunks_too() -> None:
    taker = reader(None, limit_bytes=10)
    with pytest.raises(BodyTooLargeError, match=r"http.upload_limit_bytes \(10\)"):
        taker.feed(b"14\r\n" + b"x" * 20 + b"\r\n", 0)


def test_a_short_rest_of_a_broken_form_is_read_and_a_long_one_is_not() -> None:
    short, long = reader(1000), reader(10_000_000)
    assert short.feed(b"?" * 100, 0) == 100
    assert short.feed(b"?" * 1000, 0) == 900
    with pytest.raises(RequestError, match="malformed"):
        short.finish()
    with pytest.raises(RequestError, match="malformed"):
        long.feed(b"?" * 100, 0)


def test_all_texts_together_have_a_limit_too() -> None:
    many = MAX_TEXT_BYTES // MAX_FIELD_BYTES
    most = field("a", "x" * (MAX_FIELD_BYTES - 100))
    read(form(*[most] * many, file(b"x" * MAX_TEXT_BYTES)))
    for part in (field("a", "x" * 2000), file(b"", filename="n" * 2000)):
        with pytest.raises(BodyTooLargeError, match=f"more than {MAX_TEXT_BYTES} bytes together") as caught:
            read(form(*[most] * many, part))
        assert caught.value.status == 413


def test_small_chunks_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    body, pieces = form(file(b"x" * 1000)), list[bytes]()
    taker = reader(None)
    monkeypatch.setattr(taker._spool, "write", pieces.append)
    taker.feed(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n", 0)
    assert taker.body_complete
    assert pieces == [body]


def test_an_empty_body_is_no_form() -> None:
    with pytest.raises(RequestError, match="the body is empty"):
        reader(0)
