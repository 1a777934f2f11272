"""A file in a form, piece by piece, and what is shown meanwhile."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from mesh.cli.failure import CliError
from mesh.cli.upload import PIECE_BYTES, FileForm, UploadView, size_of


def silent() -> UploadView:
    return UploadView("x", None, as_json=True, console=Console(file=io.StringIO()))


def test_the_length_that_is_told_is_the_length_that_is_sent() -> None:
    form = FileForm({"model": "é", "prompt": ""}, io.BytesIO(b"12345"), 'a"b\r\n.wav', 5, boundary="B")
    body = b"".join(form.pieces(silent()))
    assert (
        body
        == (
            '--B\r\nContent-Disposition: form-data; name="model"\r\n\r\né\r\n'
            '--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\r\n'
            '--B\r\nContent-Disposition: form-data; name="file"; filename="a%22b%0D%0A.wav"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n12345\r\n--B--\r\n"
        ).encode()
    )
    assert form.headers["Content-Length"] == str(len(body))


def test_boundaries_differ_and_are_in_the_header() -> None:
    one, other = (FileForm({}, io.BytesIO(), "f") for _ in range(2))
    assert one.boundary != other.boundary
    assert one.headers == {"Content-Type": f"multipart/form-data; boundary={one.boundary}"}


def test_only_a_piece_at_a_time_is_read() -> None:
    class Counting(io.BytesIO):
        most = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            self.most = max(self.most, size)
            return super().read(size)

    file = Counting(bytes(3 * PIECE_BYTES + 1))
    pieces = list(FileForm({}, file, "f", 3 * PIECE_BYTES + 1).pieces(silent()))
    assert (len(pieces), file.most) == (1 + 4 + 1, PIECE_BYTES)


def test_a_file_that_grows_is_sent_as_long_as_it_was() -> None:
    form = FileForm({}, io.BytesIO(b"123456789"), "f", 4)
    assert len(b"".join(form.pieces(silent()))) == int(form.headers["Content-Length"])


def test_a_file_that_shrinks_is_an_error() -> None:
    with pytest.raises(CliError, match="f became shorter"):
        list(FileForm({}, io.BytesIO(b"123"), "f", 4).pieces(silent()))


def test_a_file_that_cannot_be_read_is_an_error() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(CliError, match="cannot read f: Input/output error"):
        list(FileForm({}, Broken(), "f", 4).pieces(silent()))


def test_the_size_is_known_of_files_only(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    with path.open("rb") as file:
        file.read(2)
        assert size_of(file) == 3
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert size_of(pipe) is None


def test_a_terminal_gets_a_bar_then_a_stopwatch_and_is_left_clean() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    with UploadView("a[b].wav", 2_000_000, console=console) as view:
        view.sent(500_000)
        assert "0.5/2.0 MB" in _frame(view)
        view.waiting()
        assert "transcribing …" in _frame(view)
        assert "0:00:0" in _frame(view)
        assert "MB" not in _frame(view)
    assert view._shown is None
    assert file.getvalue().endswith("\x1b[1A\x1b[2K"), "the line is gone"


def _frame(view: UploadView) -> str:
    assert view._shown is not None
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as capture:
        console.print(view._shown.get_renderable())
    return capture.get()


@pytest.mark.parametrize(("as_json", "lines"), [(False, ["uploading a[b].wav (2.0 MB)", "transcribing …"]), (True, [])])
def test_elsewhere_a_line_for_each_step(as_json: bool, lines: list[str]) -> None:
    file = io.StringIO()
    with UploadView("a[b].wav", 2_000_000, as_json=as_json, console=Console(file=file)) as view:
        view.sent(1)
        view.waiting()
    assert file.getvalue().splitlines() == lines


def test_without_a_size_none_is_told() -> None:
    file = io.StringIO()
    with UploadView("stdin", None, console=Console(file=file)):
        pass
    assert file.getvalue() == "uploading stdin\n"
