"""mesh.logs: what a line looks like, and that nothing which goes wrong with logging reaches a request."""

from __future__ import annotations

import gzip
import json
import logging
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from mesh.logs import AccessLog, Log, Logging, configure, encode_record
from mesh.logs.sinks import FdSink, FileSink, compress_and_prune
from mesh.logs.writer import LineWriter


@dataclass
class Settings:
    enabled: bool = False
    directory: str = "./logs"
    filename: str = "proxy.log"
    max_keep_files: int = 7
    compression: bool = True
    level: str = "info"
    access_log: bool = True


class Output:
    """A file in the place of stdout."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    out = Output(tmp_path / "stdout")
    yield out
    os.close(out.fd)


@pytest.fixture
def logging_on(output: Output) -> Iterator[Logging]:
    levels = logging.getLogger("mesh").level, logging.getLogger().level
    logs = configure(Settings(), fd=output.fd)
    yield logs
    logs.close()
    logging.getLogger("mesh").setLevel(levels[0])
    logging.getLogger().setLevel(levels[1])


def test_a_line_has_timestamp_level_target_and_fields(output: Output, logging_on: Logging) -> None:
    Log("mesh.here").info("instance ready", instance="i-1", slots=4, path=Path("/m"))
    assert logging_on.flush()
    (line,) = output.lines()
    assert datetime.fromisoformat(line["timestamp"]).tzinfo is not None
    assert (line["level"], line["target"]) == ("INFO", "mesh.here")
    assert line["fields"] == {"message": "instance ready", "instance": "i-1", "slots": 4, "path": "/m"}


def test_levels_and_libraries(output: Output, logging_on: Logging) -> None:
    Log("mesh.here").debug("not shown")
    logging.getLogger("httpx").info("not shown: the url may hold a key")
    logging.getLogger("httpx").warning("shown")
    logging_on.flush()
    assert [line["fields"]["message"] for line in output.lines()] == ["shown"]


def test_an_exception_is_one_line(output: Output, logging_on: Logging) -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        Log("mesh.here").exception("it 100% failed")
    logging_on.flush()
    (line,) = output.lines()
    assert line["fields"]["message"] == "it 100% failed"
    assert "ValueError: first\nsecond" in line["fields"]["exception"]


def test_secrets_are_redacted_by_name(output: Output, logging_on: Logging) -> None:
    """trap 101"""
    headers = {"Authorization": "Bearer s3cret", "Cookie": "s3cret", "Host": "h"}
    Log("mesh.here").info("x", api_key="s3cret", cluster_token="s3cret", headers=headers, key="model:default")
    logging_on.access.write(
        request_id="r", client="c", method="GET", path="/props?api_key=s3cret", status=200, duration_s=0.1
    )
    logging_on.flush()
    assert "s3cret" not in json.dumps(output.lines())
    assert output.lines()[0]["fields"]["key"] == "model:default"
    assert output.lines()[1]["fields"]["path"] == "/props"


def test_text_that_json_cannot_hold_is_shown_escaped(output: Output, logging_on: Logging) -> None:
    Log("mesh.here").info("bad \udcff", name="\udcfe", odd=object, newline="a\nb")
    logging_on.access.write(request_id="\udcff", client="c", method="GET", path="/", status=200, duration_s=0)
    logging_on.access.write(request_id="next", client="c", method="GET", path="/", status=200, duration_s=0)
    logging_on.flush()
    lines = output.lines()
    assert lines[0]["fields"]["message"] == "bad \\udcff"
    assert lines[-1]["fields"]["request_id"] == "next"
    assert len(lines) == 3


def test_an_access_line_leaves_out_what_is_not_known(output: Output, logging_on: Logging) -> None:
    logging_on.access.write(
        request_id="r-1",
        client="10.0.0.1",
        method="POST",
        path="/v1/chat/completions",
        status=200,
        duration_s=1.2345678,  # rounded, not cut: 1.88 s are no 1879.999 ms
        model="smol",
        instance="i-1",
        bytes_out=99,
        ttft_s=0.25,
        tokens=12,
    )
    logging_on.flush()
    (line,) = output.lines()
    assert line["target"] == "mesh.access"
    assert line["fields"] == {
        "message": "request",
        "request_id": "r-1",
        "client": "10.0.0.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "duration_ms": 1234.568,
        "model": "smol",
        "instance": "i-1",
        "bytes_out": 99,
        "ttft_ms": 250.0,
        "tokens": 12,
    }


def test_a_disabled_access_log_writes_nothing() -> None:
    AccessLog().write(request_id="r", client="c", method="GET", path="/", status=200, duration_s=0)
    assert not AccessLog().enabled


def test_close_writes_what_is_pending_and_takes_the_handler_off(output: Output) -> None:
    before = list(logging.getLogger().handlers)
    logs = configure(Settings(), fd=output.fd)
    for number in range(1000):
        logs.access.write(request_id=str(number), client="c", method="GET", path="/", status=200, duration_s=0)
    logs.close()
    logs.close()
    assert [line["fields"]["request_id"] for line in output.lines()] == [str(n) for n in range(1000)]
    assert logging.getLogger().handlers == before


def test_lines_of_many_threads_all_arrive_whole(output: Output) -> None:
    writer = LineWriter([FdSink(output.fd)])
    access = AccessLog(writer)

    def work(name: int) -> None:
        for number in range(500):
            request_id = f"{name}-{number}"
            access.write(request_id=request_id, client="c", method="GET", path="/", status=200, duration_s=0)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close(5)
    assert len({line["fields"]["request_id"] for line in output.lines()}) == 2000


def test_a_reader_that_stopped_reading_blocks_nobody() -> None:
    """trap 108: the caller never waits for stdout; lines beyond the bound are dropped and counted."""
    read_end, write_end = os.pipe()
    writer = LineWriter([FdSink(write_end)])
    access = AccessLog(writer)

    def write_many() -> None:
        for _ in range(110_000):
            access.write(request_id="r" * 100, client="c", method="GET", path="/", status=200, duration_s=0)

    write_many()
    assert not writer.flush(0.3)
    write_many()  # by now the writer is stuck, so nobody makes room
    assert writer.dropped > 0
    os.close(read_end)  # the writer's blocked write fails, and it goes on
    assert writer.flush(5)
    writer.close(5)
    os.close(write_end)


@contextmanager
def full_disk() -> Iterator[None]:
    """Writes past 4 KiB of a file fail, as on a full disk.

    Inside a test only: pytest's own report may go to a file too, and a fixture would be in force while it is written.
    """
    old_action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_action)


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bad input list: a full disk for logs. Lines after it are whole again."""
    sink = FileSink(tmp_path / "proxy.log", max_keep_files=7, compress=True)
    line = b'{"n":"%s"}\n' % (b"x" * 1000)
    with full_disk():
        for _ in range(10):
            sink.write(line)
        (tmp_path / "proxy.log").write_bytes((tmp_path / "proxy.log").read_bytes()[:1100])  # somebody makes room
        sink.write(line)
    sink.close()
    err = capfd.readouterr().err
    assert err.count("cannot write the log file") == 1
    assert "logging goes on without it" in err
    assert json.loads((tmp_path / "proxy.log").read_text().splitlines()[-1])["n"]


def test_an_unwritable_directory_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a directory")
    sink = FileSink(tmp_path / "file" / "logs" / "proxy.log", max_keep_files=7, compress=True)
    sink.write(b"{}\n")
    sink.write(b"{}\n")
    sink.close()
    assert capfd.readouterr().err.count("cannot write the log file") == 1


def test_a_broken_sink_does_not_disturb_the_other(
    tmp_path: Path, output: Output, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    logs = configure(Settings(enabled=True, directory=str(tmp_path / "file")), fd=output.fd)
    Log("mesh.here").warning("still here")
    logs.close()
    assert [line["fields"]["message"] for line in output.lines()] == ["still here"]
    assert "cannot write the log file" in capfd.readouterr().err


class Calendar:
    def __init__(self) -> None:
        self.day = date(2026, 1, 1)

    def __call__(self) -> date:
        return self.day


def test_the_file_rotates_daily_is_compressed_and_pruned(tmp_path: Path) -> None:
    """trap 98"""
    calendar = Calendar()
    sink = FileSink(tmp_path / "proxy.log", max_keep_files=3, compress=True, today=calendar)
    for day in range(1, 8):
        calendar.day = date(2026, 1, day)
        sink.write(b"day %d\n" % day)
    sink.close()
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["proxy.log", *(f"proxy.log.2026-01-0{n}.gz" for n in (4, 5, 6))]
    assert (tmp_path / "proxy.log").read_bytes() == b"day 7\n"
    assert gzip.decompress((tmp_path / "proxy.log.2026-01-05.gz").read_bytes()) == b"day 5\n"


def test_a_file_that_an_earlier_run_left_is_rotated_too(tmp_path: Path) -> None:
    path = tmp_path / "proxy.log"
    path.write_bytes(b"old\n")
    old = datetime(2025, 12, 30, 12, tzinfo=UTC).timestamp()
    os.utime(path, (old, old))
    (tmp_path / "proxy.log.2025-12-30").write_bytes(b"older\n")
    sink = FileSink(path, max_keep_files=7, compress=False)
    sink.write(b"new\n")
    sink.close()
    assert path.read_bytes() == b"new\n"
    assert (tmp_path / "proxy.log.2025-12-30").read_bytes() == b"older\n"
    assert (tmp_path / "proxy.log.2025-12-30.1").read_bytes() == b"old\n"


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "proxy.log", max_keep_files=7, compress=False)
    sink.write(b"one\n")
    (tmp_path / "proxy.log").rename(tmp_path / "elsewhere")
    sink.write(b"two\n")
    sink.close()
    assert (tmp_path / "proxy.log").read_bytes() == b"two\n"


def test_tidying_repairs_an_interrupted_run_and_spares_strangers(tmp_path: Path) -> None:
    for name in ("proxy.log.2026-01-01", "proxy.log.2026-01-01.gz.tmp", "proxy.log.old", "other.log.2026-01-01"):
        (tmp_path / name).write_bytes(b"x\n")
    for _ in range(2):
        compress_and_prune(tmp_path / "proxy.log", max_keep_files=7, compress=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.log.2026-01-01",
        "proxy.log.2026-01-01.gz",
        "proxy.log.old",
    ]


def test_a_record_that_cannot_be_formatted_still_gives_a_line(output: Output, logging_on: Logging) -> None:
    bad = logging.LogRecord("mesh.here", logging.WARNING, "f", 1, "%d", ("not a number",), None)
    ours = next(h for h in logging.getLogger().handlers if type(h).__module__ == "mesh.logs")
    ours.emit(bad)  # not through the logger: pytest's own handler raises
    logging_on.flush()
    assert output.lines()[0]["level"] == "ERROR"


def test_encode_record_is_one_line_of_json() -> None:
    record = logging.LogRecord("n", logging.INFO, "f", 1, "a\nb", (), None)
    assert b"\n" not in encode_record(record)
