#!/usr/bin/env python3
"""A llama-server for tests: its command line, its routes, its manners over HTTP, and any fault on demand.

Standard library only, so that it starts in some 30 ms: ``python -I -S tests/fake_llama_server.py -m x --port N``.
Every fault is a field of ``Faults``: a switch ``--fake-load-s 2`` or an environment variable ``FAKE_LOAD_S=2``;
switches win. What it received is told by ``GET /fake/log``; ``GET /fake/state`` tells pid, grandchild and slots. One
thread for each connection, as llama-server has. Answers are the words of ``say``, a token each, repeated if
``ignore_eos`` is asked for. One file, though long: it runs isolated from every import path.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, get_type_hints

#: llama-server's flags that take a value, as far as tests use them; every other unknown flag is refused with rc 1
VALUE_FLAGS = {
    *("-m", "--model", "-hfr", "--hf-repo", "-hff", "--hf-file", "-hf", "--host", "--port", "-np", "--parallel"),
    *("-c", "--ctx-size", "-n", "--predict", "-t", "--threads", "-b", "--batch-size", "-ub", "--ubatch-size"),
    *("-ngl", "--n-gpu-layers", "-a", "--alias", "--api-key", "--api-key-file", "--fit", "--pooling", "--mmproj"),
    *("-ctk", "-ctv", "-cram", "--cache-ram", "--chat-template", "--temp", "--seed", "--slot-save-path", "--timeout"),
}
BARE_FLAGS = {"--embedding", "--embeddings", "--rerank", "--reranking", "--jinja", "--metrics", "--slots"}
BARE_FLAGS |= {"--no-slots", "--no-warmup", "--no-webui", "--verbose", "-v", "--mlock", "--no-mmap"}
Message = dict[str, Any]


@dataclasses.dataclass
class Faults:
    """How this server misbehaves; the defaults are a healthy, instant one."""

    say: str = ""  # the answer, one token for each word; default "hello from <alias or model file>"
    smoke_say: str = ""  # and the answer with the model by which builds are tested (mesh.models.tiny_model)
    load_s: float = 0.0  # /health answers 503 for so long
    silent_load: bool = False  # and nothing is logged meanwhile
    busy_load: bool = False  # and a CPU is kept busy meanwhile
    never_listen: bool = False  # the port stays closed
    hang_health: bool = False  # /health accepts the request and never answers
    health_status: int = 0  # what /health says instead of 200 once loaded
    tokens_per_s: float = 0.0  # 0: as fast as it goes
    prefill_s: float = 0.0  # from the request to the first token
    reply_bytes: int = 0  # size of non-streamed answers, padded to
    crash_at_load: int = 0  # exit code instead of becoming ready
    crash_after: int = -1  # die when inference request number n + 1 arrives
    crash_mid_stream: int = -1  # die after n tokens of an answer
    crash_code: int = 134  # exit code of the crashes; negative: by that signal
    half_event_after: int = -1  # after n tokens send half an SSE event, then close the connection
    error_event_after: int = -1  # after n tokens send an SSE error event and end without [DONE]
    stall_after: int = -1  # after n tokens send nothing any more
    error_status: int = 0  # every inference request is answered with this status
    ignore_sigterm: bool = False
    hang_on_busy_term: bool = False  # SIGTERM waits for requests in progress, as the real one does
    log_line_bytes: int = 0  # one log line of so many bytes before listening
    grandchild: bool = False  # a process of the same group that holds stdout and ignores SIGTERM
    wrong_model_path: str = ""  # what /props says instead of -m
    version: str = "0 (fake)"  # what --version and /props tell, as "build number (commit)"
    version_code: int = 0  # exit code of --version
    help_code: int = 0  # exit code of --help; it lists nothing then
    told_prefill_tps: float = 1000.0  # what `timings` tells
    told_decode_tps: float = 0.0  # 0: tokens_per_s, or 100 if that is not limited
    no_timings: bool = False  # answers have none
    keepalive_s: float = 5.0  # idle connections are closed after
    keepalive_max: int = 100  # requests per connection
    check_model: bool = False  # a missing -m file is an error, as in the real one


def parse(argv: list[str]) -> tuple[dict[str, str], Faults]:
    """Return llama-server's flags (long and short as given) and the faults; exit 1 on a flag neither knows."""
    flags: dict[str, str] = {}
    faults = {n.removeprefix("FAKE_").lower(): v for n, v in os.environ.items() if n.startswith("FAKE_")}
    rest = iter(argv)
    for flag in rest:
        if flag in ("--version", "--help", "-h"):
            flags[flag] = ""
        elif flag.startswith("--fake-"):
            faults[flag.removeprefix("--fake-").replace("-", "_")] = next(rest)
        elif flag in BARE_FLAGS:
            flags[flag] = ""
        elif flag in VALUE_FLAGS:
            flags[flag] = next(rest, "")
        else:
            fail(f"error: invalid argument: {flag}")
    types = get_type_hints(Faults)
    return flags, Faults(**{n: _value(types[n], v) for n, v in faults.items()})


def answer_and_exit(flags: dict[str, str], faults: Faults) -> None:
    """Do what ``--version`` and ``--help`` ask for, in the form of the real one."""
    if "--version" in flags:
        if faults.version_code:
            fail("error: fake", faults.version_code)
        fail(f"version: {faults.version}\nbuilt with GNU 0.0.0 for Fake", 0)
    if {"--help", "-h"} & flags.keys():
        faulty = {f"--fake-{field.name.replace('_', '-')}" for field in dataclasses.fields(Faults)}
        lines = [f"{flag} VALUE".ljust(40) + "a value" for flag in sorted(VALUE_FLAGS | faulty)]
        lines += [flag.ljust(40) + "a switch" for flag in sorted({*BARE_FLAGS, "-h", "--help", "--version"})]
        if not faults.help_code:
            print("----- common params -----\n", *lines, sep="\n", flush=True)
        os._exit(faults.help_code)


def _value(kind: type, text: str) -> Any:
    return text.lower() in ("1", "true", "yes") if kind is bool else kind(text)


def log(text: str) -> None:
    os.write(2, f"0.00.000.000 I srv  fake: {text}\n".encode())


def fail(text: str, code: int = 1) -> None:
    os.write(2, f"{text}\n".encode())
    os._exit(code)


def is_smoke_model(path: str) -> bool:
    """Whether this is the model of mesh.models.tiny_model; its name stands at the beginning of the file."""
    try:
        with open(path, "rb") as file:
            return b"llama-mesh's tiny model" in file.read(512)
    except OSError:
        return False


class Slots:
    """As many generations at once as ``-np``; the rest waits, first come first served."""

    def __init__(self, count: int) -> None:
        self.busy = [False] * count
        self._line: list[object] = []
        self._changed = threading.Condition()

    def take(self, gone: Gone) -> int | None:
        """Return the number of a free slot, or None if the client left while waiting for one."""
        me = object()
        with self._changed:
            self._line.append(me)
            try:
                while self._line[0] is not me or all(self.busy):
                    self._changed.wait(0.02)
                    if gone():
                        return None
                slot = self.busy.index(False)
                self.busy[slot] = True
                return slot
            finally:
                self._line.remove(me)
                self._changed.notify_all()

    def give(self, slot: int) -> None:
        with self._changed:
            self.busy[slot] = False
            self._changed.notify_all()


class Gone:
    """Whether the client closed its side; ``wait`` sleeps at most so long and returns at once when it does."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __call__(self, wait_s: float = 0.0) -> bool:
        try:
            readable, _, _ = select.select([self._sock], [], [], wait_s)
            if not readable:
                return False
            if self._sock.recv(1, socket.MSG_PEEK) == b"":
                return True
        except (OSError, ValueError):
            return True
        time.sleep(wait_s)  # the next request is pipelined: the client is still there
        return False


class Server:
    """What all connections share."""

    def __init__(self, flags: dict[str, str], faults: Faults) -> None:
        self.flags, self.faults = flags, faults
        self.model_path = self.flag("-m", "--model") or ""
        self.alias = self.flag("-a", "--alias") or os.path.basename(self.model_path) or "fake"
        self.keys = [k for k in (self.flag("--api-key") or os.environ.get("LLAMA_API_KEY", "")).split(",") if k]
        self.slots = Slots(int(self.flag("-np", "--parallel") or 4))
        smoke_say = faults.smoke_say if faults.smoke_say and is_smoke_model(self.model_path) else ""
        self.say = (smoke_say or faults.say or f"hello from {self.alias}").split(" ")
        self.ready = threading.Event()
        self.requests: list[Message] = []
        self.inferences = 0
        self.grandchild: int | None = None

    def flag(self, *names: str) -> str | None:
        return next((self.flags[n] for n in names if n in self.flags), None)

    def crash(self) -> None:
        log("fake crash: GGML_ASSERT(fake) failed")
        code = self.faults.crash_code
        if code < 0:
            os.kill(os.getpid(), -code)
            time.sleep(60)
        os._exit(code)

    def load(self) -> None:
        """What happens before /health says ok, beside the listening socket."""
        faults, end = self.faults, time.monotonic() + self.faults.load_s
        while time.monotonic() < end:
            if not faults.silent_load:
                log("load_tensors: loading")
            pause = min(0.1, max(0.0, end - time.monotonic()))
            if faults.busy_load:
                stop = time.monotonic() + pause
                while time.monotonic() < stop:
                    pass
            else:
                time.sleep(pause)
        if faults.crash_at_load:
            log("E llama_model_load: error loading model: fake")
            fail("exiting due to model loading error", faults.crash_at_load)
        self.ready.set()
        if not faults.silent_load:
            log(f"model loaded, n_slots = {len(self.slots.busy)}")


class Connection:
    """One client connection: reads requests, answers each in turn."""

    def __init__(self, server: Server, sock: socket.socket, number: int) -> None:
        self.server, self.sock, self.number = server, sock, number
        self.input = sock.makefile("rb")
        self.gone = Gone(sock)
        self.keep = True

    def run(self) -> None:
        try:
            for count in range(1, self.server.faults.keepalive_max + 1):
                self.sock.settimeout(self.server.faults.keepalive_s)
                self.keep = count < self.server.faults.keepalive_max
                if not self._one() or not self.keep:
                    break
        except (OSError, ValueError):
            pass  # the client left, or sent nonsense
        finally:
            self.input.close()
            self.sock.close()

    def _one(self) -> bool:
        line = self.input.readline(65536).decode("latin-1").split()
        if len(line) != 3:
            return False
        method, target, version = line
        headers: list[list[str]] = []
        while raw := self.input.readline(65536).strip():
            name, _, value = raw.decode("latin-1").partition(":")
            headers.append([name.lower(), value.strip()])
        fields = dict(headers)
        self.sock.settimeout(None)
        if fields.get("expect", "").lower() == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._body(fields)
        if "close" in fields.get("connection", "").lower() or version == "HTTP/1.0":
            self.keep = False
        record: Message = {"method": method, "path": target, "headers": headers, "connection": self.number}
        record |= {"body": body[:65536].decode("utf-8", "replace"), "body_bytes": len(body), "done": False}
        if not target.startswith("/fake/"):
            self.server.requests.append(record)
        self._route(method, target.partition("?")[0], fields, body)
        record["done"] = True
        return True

    def _body(self, fields: dict[str, str]) -> bytes:
        if fields.get("transfer-encoding", "").lower() != "chunked":
            return self.input.read(int(fields.get("content-length", 0)))
        parts = []
        while size := int(self.input.readline().split(b";")[0], 16):
            parts.append(self.input.read(size))
            self.input.readline()
        self.input.readline()
        return b"".join(parts)

    # -- answers

    def _head(self, status: int, *more: str) -> None:
        keep = "Keep-Alive: timeout=5, max=100" if self.keep else "Connection: close"
        lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}", "Server: llama.cpp", keep, *more]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())

    def json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self._head(status, "Content-Type: application/json; charset=utf-8", f"Content-Length: {len(data)}")
        self.sock.sendall(data)

    def error(self, status: int, message: str, kind: str) -> None:
        self.json({"error": {"code": status, "message": message, "type": kind}}, status)

    def _route(self, method: str, path: str, fields: dict[str, str], body: bytes) -> None:
        server, faults = self.server, self.server.faults
        if path.startswith("/fake/"):
            return self.json(server.requests if path == "/fake/log" else self._state())
        if path in ("/health", "/v1/health") and faults.hang_health:
            self.gone(3600)
            raise OSError("hung as asked")
        if not server.ready.is_set():
            return self.error(503, "Loading model", "unavailable_error")
        if path in ("/health", "/v1/health"):
            return self.json({"status": "ok"}, faults.health_status or 200)
        key = fields.get("authorization", "").removeprefix("Bearer ") or fields.get("x-api-key", "")
        if server.keys and key not in server.keys:
            return self.error(401, "Invalid API Key", "authentication_error")
        if method == "GET":
            return self._get(path)
        try:
            request = json.loads(body or b"{}")
        except ValueError:
            return self.error(500, "syntax error while parsing value", "server_error")
        return self._post(path, request)

    def _state(self) -> Message:
        server = self.server
        return {"pid": os.getpid(), "grandchild": server.grandchild, "slots": server.slots.busy, "argv": sys.argv}

    def _get(self, path: str) -> None:
        server = self.server
        slots = [{"id": i, "n_ctx": 4096, "is_processing": busy} for i, busy in enumerate(server.slots.busy)]
        if path == "/slots" and "--no-slots" in server.flags:
            return self.error(501, "This server does not support slots endpoint.", "not_supported_error")
        answers: dict[str, Any] = {
            "/slots": slots,
            "/props": {
                "total_slots": len(slots),
                "model_path": server.faults.wrong_model_path or server.model_path,
                "model_alias": server.alias,
                "build_info": "b" + server.faults.version.replace(" (", "-").rstrip(")"),
            },
            "/v1/models": {"object": "list", "data": [{"id": server.alias, "object": "model", "owned_by": "llamacpp"}]},
            "/lora-adapters": [],
        }
        if path not in answers:
            return self.error(404, "File Not Found", "not_found_error")
        return self.json(answers[path])

    def _post(self, path: str, request: Message) -> None:
        words = " ".join(map(str, (request.get("content") or request.get("input") or request.get("prompt") or "a",)))
        plain = {
            "/tokenize": {"tokens": list(range(len(words.split())))},
            "/detokenize": {"content": "words"},
            "/apply-template": {"prompt": "template"},
            "/v1/messages/count_tokens": {"input_tokens": 7},
        }
        if path in plain:
            return self.json(plain[path])
        dialect = DIALECTS.get(path)
        if dialect is None:
            return self.error(404, "File Not Found", "not_found_error")
        return self._infer(dialect, request)

    def _infer(self, dialect: str, request: Message) -> None:
        server, faults = self.server, self.server.faults
        server.inferences += 1
        if 0 <= faults.crash_after < server.inferences:
            server.crash()
        if faults.error_status:
            return self.error(faults.error_status, "fake error", "server_error")
        slot = server.slots.take(self.gone)
        if slot is None:
            raise OSError("client left the queue")
        try:
            if dialect in ("embeddings", "rerank"):
                return self.json(VECTORS[dialect](request, server.alias))
            return self._generate(dialect, request)
        finally:
            server.slots.give(slot)

    def _tokens(self, request: Message) -> Iterator[tuple[int, str]]:
        """Yield each token when its time has come; stop when the client is gone."""
        faults, say = self.server.faults, self.server.say
        limit = (
            request.get("max_tokens") or request.get("max_completion_tokens") or request.get("n_predict") or len(say)
        )
        for n in range(limit if request.get("ignore_eos") else min(limit, len(say))):
            if n == faults.crash_mid_stream:
                self.server.crash()
            if n == faults.stall_after and self.gone(3600):
                raise OSError("client left a stalled answer")
            pause = 1 / faults.tokens_per_s if faults.tokens_per_s else 0.0
            if self.gone(pause):
                raise OSError("client left")
            yield n, (" " if n else "") + say[n % len(say)]

    def _generate(self, dialect: str, request: Message) -> None:
        if self.server.faults.prefill_s and self.gone(self.server.faults.prefill_s):
            raise OSError("client left during prefill")
        if not request.get("stream"):  # a streamed answer, too, has no head before its first token
            words = [word for _, word in self._tokens(request)]
            text = "".join(words).ljust(self.server.faults.reply_bytes)
            return self.json(whole(dialect, self.server.alias, text, len(words)) | self._timings(dialect, len(words)))
        self._head(200, "Content-Type: text/event-stream", "X-Accel-Buffering: no", "Transfer-Encoding: chunked")
        faults, count = self.server.faults, 0
        for n, word in self._tokens(request):
            event = f"data: {json.dumps(delta(dialect, self.server.alias, word))}\n\n"
            if n == faults.half_event_after:
                self._chunk(event[: len(event) // 2])
                raise OSError("half an event, as asked")
            if n == faults.error_event_after:
                self._chunk('data: {"error":{"code":500,"message":"fake","type":"server_error"}}\n\n')
                self.sock.sendall(b"0\r\n\r\n")
                return None
            self._chunk(event)
            count += 1
        last = delta(dialect, self.server.alias, "", stop=True) | usage(count) | self._timings(dialect, count)
        self._chunk(f"data: {json.dumps(last)}\n\n")
        self._chunk("data: [DONE]\n\n")
        self.sock.sendall(b"0\r\n\r\n")
        return None

    def _timings(self, dialect: str, predicted: int) -> Message:
        """Return llama-server's own measurements, which Anthropic's dialect has no place for."""
        faults = self.server.faults
        if faults.no_timings or dialect == "anthropic":
            return {}
        decode = faults.told_decode_tps or faults.tokens_per_s or 100.0
        speeds = {"prompt_per_second": faults.told_prefill_tps, "predicted_per_second": decode}
        times = {"prompt_ms": 7000 / faults.told_prefill_tps, "predicted_ms": 1000 * predicted / decode}
        return {"timings": {"prompt_n": 7, "cache_n": 0, "predicted_n": predicted, **speeds, **times}}

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.sock.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")


DIALECTS = {
    **dict.fromkeys(("/v1/chat/completions", "/chat/completions"), "chat"),
    **dict.fromkeys(("/v1/completions", "/completions"), "text"),
    **dict.fromkeys(("/completion", "/infill"), "native"),
    "/v1/messages": "anthropic",
    "/v1/responses": "responses",
    **dict.fromkeys(("/v1/embeddings", "/embeddings", "/embedding"), "embeddings"),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v1/reranking", "/reranking"), "rerank"),
}


def usage(completion_tokens: int) -> Message:
    counts = {"prompt_tokens": 7, "completion_tokens": completion_tokens, "total_tokens": 7 + completion_tokens}
    return {"usage": counts}


def delta(dialect: str, model: str, text: str, *, stop: bool = False) -> Message:
    """One streamed event."""
    if dialect == "anthropic":
        return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
    if dialect == "native":
        return {"content": text, "stop": stop}
    part: Message = {"text": text} if dialect == "text" else {"delta": {"content": text} if text else {}}
    choice = {"index": 0, "finish_reason": "stop" if stop else None, **part}
    return {"id": "fake", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}


def whole(dialect: str, model: str, text: str, count: int) -> Message:
    """One complete answer."""
    if dialect == "anthropic":
        content = [{"type": "text", "text": text}]
        counts = {"input_tokens": 7, "output_tokens": count}
        return {"type": "message", "role": "assistant", "model": model, "content": content, "usage": counts}
    if dialect == "native":
        return {"content": text, "stop": True, "model": model} | usage(count)
    part: Message = {"text": text} if dialect == "text" else {"message": {"role": "assistant", "content": text}}
    choice = {"index": 0, "finish_reason": "stop", **part}
    kind = "text_completion" if dialect == "text" else "chat.completion"
    return {"id": "fake", "object": kind, "created": 1, "model": model, "choices": [choice]} | usage(count)


def _embeddings(request: Message, model: str) -> Message:
    texts = request.get("input", "")
    texts = texts if isinstance(texts, list) else [texts]
    data = [{"object": "embedding", "index": i, "embedding": [1.0, 0.0]} for i in range(len(texts))]
    return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}}


def _rerank(request: Message, model: str) -> Message:
    results = [{"index": i, "relevance_score": 1.0 - i} for i in range(len(request.get("documents", [])))]
    return {"object": "list", "model": model, "results": results, "usage": {"prompt_tokens": 3, "total_tokens": 3}}


VECTORS = {"embeddings": _embeddings, "rerank": _rerank}


def install_sigterm(server: Server) -> None:
    def on_term(*_: object) -> None:
        if server.faults.ignore_sigterm:
            return log("SIGTERM ignored")
        while server.faults.hang_on_busy_term and any(server.slots.busy):
            time.sleep(0.02)
        os._exit(0)

    signal.signal(signal.SIGTERM, on_term)


def main(argv: list[str]) -> None:
    flags, faults = parse(argv)
    answer_and_exit(flags, faults)
    server = Server(flags, faults)
    install_sigterm(server)
    if faults.log_line_bytes:
        sys.stderr.write("x" * faults.log_line_bytes + "\n")
        sys.stderr.flush()
    if faults.check_model and not os.path.exists(server.model_path):
        fail(f"E gguf_init_from_file: failed to open GGUF file '{server.model_path}' (No such file or directory)")
    if faults.grandchild:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        server.grandchild = subprocess.Popen([sys.executable, "-I", "-S", "-c", code]).pid
        log(f"grandchild {server.grandchild}")
    if faults.never_listen:
        server.load()
        while True:
            time.sleep(3600)
    listener = socket.create_server((server.flag("--host") or "127.0.0.1", int(server.flag("--port") or 8080)))
    log(f"listening on http://127.0.0.1:{listener.getsockname()[1]}")
    threading.Thread(target=server.load, daemon=True).start()
    number = 0
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number += 1
        threading.Thread(target=Connection(server, sock, number).run, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
