"""llama-server out of the PyPI wheel ``xllamacpp`` (llama.cpp's own C++ server, MIT), with llama-server's command line.

The wheel's extension module exports llama.cpp's own
``bool common_params_parse(int, char **, common_params &, llama_example, void (*)(int, char **))``, and its
``CommonParams`` object holds a ``common_params`` right after PyObject_HEAD. So llama.cpp's parser fills that in, and
``Server(params)`` runs llama.cpp's HTTP server on it: every flag, environment variable and error text is llama.cpp's.
Models that are given by name (``-hf``, ``-mu``) are downloaded in between by llama.cpp's ``common_models_handler``.
The C++ layout is no API, hence ``PIN``. Router mode (no model given) is not in the wheel.

Runs as a script, ``python -I -S embedded.py ARGS``, and imports nothing of mesh: neither ``site`` nor the wheel's own
``__init__`` (which pulls in ``inspect`` and ``logging``) is worth its start time to a process that only calls into C++.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

PIN = "2026.10.11549"
#: ``enum llama_example`` in common/common.h of b11549; the parser offers the flags of that program
LLAMA_EXAMPLE_SERVER = 12
PARSE_SYMBOL = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
DOWNLOAD_INIT_SYMBOL = "_Z26common_models_handler_initRK13common_params13llama_example"
DOWNLOAD_APPLY_SYMBOL = (
    "_Z27common_models_handler_applyR21common_models_handlerR13common_paramsP24common_download_callback"
)
#: far more than a ``common_models_handler`` takes; it is never freed
HANDLER_BYTES = 1 << 16
#: after SIGTERM llama.cpp waits, possibly for ever, for requests in progress; this is how long it may
STOP_LIMIT_S = 10


def main(argv: list[str]) -> int:
    """Be llama-server for *argv*; return its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # dies at once while it loads, as llama-server does
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    module = _load_extension(_site_packages())
    params = module.CommonParams()
    params.port = 8080
    if not _parse(module.__file__, argv, params):
        return 1
    named = bool(params.model.hf_repo or params.model.url or params.model.docker_repo)
    if not params.model.path and not named:
        return _fail("no model given (router mode is not available in this build); use -m FILE")
    if os.uname().machine == "x86_64":
        _download(module.__file__, params)
    elif named:
        return _fail(
            "the embedded engine cannot download models on this machine; "
            "use model_path, or your own llama-server (llama_cpp.binary_path)"
        )
    if not params.model.path:
        return _fail("the model could not be downloaded; see the lines above, or download it and use model_path")
    try:
        server = module.Server(params)  # HTTP is up at once and answers 503; returns when the model is loaded
    except Exception as error:
        return _fail(str(error))
    wakeup = _signal_pipe()
    print(f"llama-server: listening on {server.listening_address}", file=sys.stderr, flush=True)
    os.read(wakeup, 1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.alarm(STOP_LIMIT_S)
    del server
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _site_packages() -> str:
    """Return the directory that holds the wheel, exiting if it is missing or another version."""
    # a virtual environment is known by its bin/python, which nobody resolved for us under -S
    root = os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))
    here = f"{root}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    pinned = f"xllamacpp-{PIN}.dist-info"
    if os.path.isdir(f"{here}/{pinned}"):
        return here
    import site  # somewhere else: .pth files, user or distribution packages

    if sys.flags.no_site:
        site.main()
    for path in sys.path:
        if os.path.isdir(os.path.join(path, pinned)):
            return path
    sys.exit(_fail(f"the embedded engine needs the wheel: pip install 'xllamacpp=={PIN}'"))


def _load_extension(directory: str) -> Any:
    """Import the wheel's extension module by itself, without its package's ``__init__``."""
    from importlib.machinery import ExtensionFileLoader, ModuleSpec

    package = os.path.join(directory, "xllamacpp")
    file = next(name for name in sorted(os.listdir(package)) if name.startswith("xllamacpp.") and name.endswith(".so"))
    sys.path.append(directory)  # it imports what it needs later from there
    loader = ExtensionFileLoader("xllamacpp", os.path.join(package, file))
    spec = ModuleSpec("xllamacpp", loader, origin=loader.path)
    spec.has_location = True
    module = loader.create_module(spec)
    sys.modules["xllamacpp"] = module
    loader.exec_module(module)
    return module


def _parse(library: str, argv: list[str], params: Any) -> bool:
    import ctypes

    parse = ctypes.CDLL(library)[PARSE_SYMBOL]
    parse.restype = ctypes.c_bool
    parse.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    arguments = (ctypes.c_char_p * (len(argv) + 1))(*[os.fsencode(argument) for argument in argv], None)
    address = id(params) + object.__basicsize__
    return bool(parse(len(argv), arguments, address, LLAMA_EXAMPLE_SERVER, None))


def _download(library: str, params: Any) -> None:
    """Fetch what *params* names but this machine lacks, and put the files' paths into *params*.

    The handler is a C++ object returned by value: on x86-64 into memory that the caller passes as a hidden first
    argument. Other machines pass it in ways that ctypes cannot. An exception of C++ ends the process, with its text.
    """
    import ctypes

    engine = ctypes.CDLL(library)
    init, apply = engine[DOWNLOAD_INIT_SYMBOL], engine[DOWNLOAD_APPLY_SYMBOL]
    init.restype, init.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    apply.restype, apply.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    handler = ctypes.create_string_buffer(HANDLER_BYTES)
    address = id(params) + object.__basicsize__
    init(handler, address, LLAMA_EXAMPLE_SERVER)
    apply(handler, address, None)


def _signal_pipe() -> int:
    """Return a descriptor that becomes readable on SIGTERM or SIGINT.

    llama.cpp's threads may be the ones that receive the signal, so ``pause`` and ``sigwait`` lose it; the wake-up
    descriptor is written by whichever thread that is.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return read_end


if __name__ == "__main__":
    sys.exit(main(sys.argv))
