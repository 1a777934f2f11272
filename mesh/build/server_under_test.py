"""One llama-server on a model that we know, as a build's test runs it: start, readiness, questions, end.

Owns the process and leaves none behind. Whatever goes wrong with it is a ``ServerFailedError``, with exit status and
last lines; what that means for the build is for the caller to say. Has nothing to do with instances.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import httpx

from mesh.build import child
from mesh.core.exits import Cause, classify, describe_exit
from mesh.errors import BuildError, InstanceError
from mesh.host.logring import LogRing
from mesh.host.ports import PortAllocator, is_free
from mesh.host.warden import Warden

#: a first start may wait for the GPU's driver to compile kernels for a new kind of GPU
READY_LIMIT_S: Final = 300.0
#: how long SIGTERM may take
STOP_LIMIT_S: Final = 10.0
#: how long after a broken connection the process may take to be gone, to tell a crash from a bad answer
CRASH_LIMIT_S: Final = 3.0
PROBE_PAUSE_S: Final = 0.025
PROBE_LIMIT_S: Final = 2.0
TAIL_LINES: Final = 40
CAUSE_LINES: Final = 200
HOST: Final = "127.0.0.1"

#: no backend finds a GPU then
GPUS_HIDDEN: Final = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""}
#: an operator's defaults for all llama-servers are meant for real models; a key would lock us out
_WITHHELD: Final = re.compile(r"LLAMA_ARG_|LLAMA_API_KEY$")
#: Known to every llama-server since 2024. Without -ngl the build decides whether it uses the GPU. With a thread on each
#: core all would wait for whatever else runs on one of them: on half of the cores the scatter is far smaller.
_ARGS: Final = ("-c", "2048", "-np", "1", "-t", str(max(1, (os.cpu_count() or 1) // 2)))
_SHOWN_CHARACTERS: Final = 300
#: an honest answer has some kilobytes
MAX_ANSWER_BYTES: Final = 4 * 1024**2
#: what a line takes of our memory beside its text
_LINE_BYTES: Final = 128


class ServerFailedError(BuildError):
    """The server did not start, ended by itself, or gave no good answer.

    ``http_status`` is that of a refusal, None if there was no answer; ``cause`` tells whether more memory may help.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_status: int | None = None,
        log_tail: Sequence[str] = (),
        cause: Cause = Cause.OTHER,
        http_status: int | None = None,
    ) -> None:
        super().__init__(message, exit_status=exit_status, log_tail=log_tail)
        self.cause = cause
        self.http_status = http_status


class Line(NamedTuple):
    """A line of an answer and when it came, on the loop's clock."""

    at: float
    text: str


class Connection:
    """Asks a llama-server over HTTP. A socket for each question: a kept one may be closed just when it is used."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx.Limits(max_keepalive_connections=0),
            verify=False,
            trust_env=False,
        )

    async def healthy(self) -> bool:
        """Whether GET /health answers 200."""
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with (
                asyncio.timeout(PROBE_LIMIT_S),
                self._client.stream("GET", "/health", timeout=None) as response,  # who knows how much it answers
            ):
                return response.status_code == 200
        return False

    async def post(self, path: str, body: Mapping[str, Any], limit_s: float) -> list[Line]:
        """Return the lines that answer a POST; raise ``ServerFailedError`` if it is refused or not answered in full."""
        try:
            async with (
                asyncio.timeout(limit_s),
                self._client.stream("POST", path, json=dict(body), timeout=None) as response,
            ):
                lines = await _lines(response, path)
        except TimeoutError as error:
            raise ServerFailedError(f"POST {path} was not answered within {limit_s:.0f} s") from error
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise ServerFailedError(f"POST {path} was not answered ({why})") from error
        if (status := response.status_code) != 200:
            text = " ".join(line.text for line in lines)[:_SHOWN_CHARACTERS]
            raise ServerFailedError(f"POST {path} was answered {status}: {text}", http_status=status)
        return lines

    async def close(self) -> None:
        await self._client.aclose()


async def _lines(response: httpx.Response, path: str) -> list[Line]:
    """Return the lines of *response*. Raise ``ServerFailedError`` if there is no end to it: it is our memory."""
    loop, lines, size, rest = asyncio.get_running_loop(), list[Line](), 0, bytearray()
    async for data in response.aiter_bytes():
        size += len(data) + _LINE_BYTES * data.count(b"\n")
        if size > MAX_ANSWER_BYTES:
            raise ServerFailedError(f"POST {path} was answered with more than {MAX_ANSWER_BYTES >> 20} MiB")
        rest += data
        if b"\n" in data:
            *whole, rest = rest.split(b"\n")
            lines += [Line(loop.time(), _text(line)) for line in whole]
    return [*lines, Line(loop.time(), _text(rest))] if rest else lines


def _text(line: bytearray) -> str:
    return line.decode("utf-8", "replace").removesuffix("\r")


class Child:
    """A process, the promise of its end, and what it printed."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], warden: Warden | None = None) -> None:
        """Start *argv*; raise ``ServerFailedError`` if that is impossible. With a *warden* it dies with the node."""
        self.ring = LogRing()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        env = {name: value for name, value in env.items() if not _WITHHELD.match(name)}
        env.setdefault(
            "OMP_WAIT_POLICY", "passive"
        )  # spinning at barriers beside other load, it would be that we measure
        try:
            self._process = child.start(argv, env=env, on_exit=self._ended.set_result, ring=self.ring, warden=warden)
        except InstanceError as error:
            raise ServerFailedError(error.message) from error

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def signal(self, number: signal.Signals) -> None:
        self._process.signal_group(number)

    async def ended(self, limit_s: float) -> int | None:
        """Wait for the end and return the exit code; None if it takes longer than *limit_s*."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(self._ended)
        return None

    async def kill(self) -> None:
        """End it and whatever it started. Harmless after the end."""
        self.signal(signal.SIGKILL)
        await self.ended(STOP_LIMIT_S)  # one that hangs in a driver cannot be ended by anybody

    def failure(self, what: str, *, http_status: int | None = None) -> ServerFailedError:
        """Return the error that says *what* went wrong, and how the process ended if it did."""
        tail, returncode = self.ring.tail(TAIL_LINES), self.returncode
        if returncode is None:
            return ServerFailedError(what, log_tail=tail, http_status=http_status)
        cause = classify(returncode, self.ring.tail(CAUSE_LINES))
        message = f"{what}: {describe_exit(returncode, tail)}"
        return ServerFailedError(message, exit_status=returncode, log_tail=tail, cause=cause)


class ServerUnderTest:
    """``async with ServerUnderTest(...)``: ready inside, gone afterwards, also after a cancellation."""

    def __init__(
        self,
        argv: Sequence[str],
        model: Path,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str],
        warden: Warden | None = None,
    ) -> None:
        """*args* come after our own and so win over them."""
        self._argv = (*argv, "-m", str(model), *_ARGS, *args, "--host", HOST)
        self._env = env
        self._warden = warden
        self._child: Child | None = None
        self._connection: Connection | None = None

    async def __aenter__(self) -> Self:
        ports = PortAllocator()
        port = ports.reserve()
        try:
            await self._start(port)
        except ServerFailedError:
            if is_free(port):
                raise
            await self._start(ports.reserve())  # somebody else took the port between our look and its bind
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def post(self, path: str, body: Mapping[str, Any], limit_s: float) -> list[Line]:
        """As ``Connection.post``; if the process ended, the error says how."""
        assert self._child is not None
        assert self._connection is not None
        try:
            return await self._connection.post(path, body, limit_s)
        except ServerFailedError as error:
            if error.http_status is None:
                await self._child.ended(CRASH_LIMIT_S)
            raise self._child.failure(error.message, http_status=error.http_status) from error

    def failure(self, what: str) -> ServerFailedError:
        """Return the error for an answer in which *what* is wrong."""
        assert self._child is not None
        return self._child.failure(what)

    async def stop(self) -> int | None:
        """Send SIGTERM and return the exit code; None if it does not obey. Then only leaving the context ends it."""
        assert self._child is not None
        self._child.signal(signal.SIGTERM)
        return await self._child.ended(STOP_LIMIT_S)

    async def _start(self, port: int) -> None:
        self._child = Child((*self._argv, "--port", str(port)), self._env, self._warden)
        self._connection = Connection(f"http://{HOST}:{port}")
        try:
            await _ready(self._child, self._connection)
        except BaseException:
            await self._close()
            raise

    async def _close(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGKILL)  # before anything that may be cancelled
            await self._child.kill()
        if self._connection is not None:
            await self._connection.close()


async def _ready(server: Child, connection: Connection) -> None:
    """Return once *server* is healthy; raise if it ends before, or takes too long."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + READY_LIMIT_S
    while loop.time() < deadline:
        if await server.ended(PROBE_PAUSE_S) is not None:
            raise server.failure("it did not start")
        if await connection.healthy() and server.returncode is None:
            return
    raise server.failure(f"it was not ready within {READY_LIMIT_S:.0f} s")


def data_of(lines: Sequence[Line]) -> Iterator[Line]:
    """Yield the data of server-sent events, one line each as llama-server sends them."""
    for at, text in lines:
        if text.startswith("data:"):
            yield Line(at, text.removeprefix("data:").strip())
