"""What one commit of the stand-in does: while it is built (``Behaviour``) and when its server runs (the fake's faults).

Turned into the text of a few files. Pure: looks at no file.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from mesh.models import tiny_model
from tests import fake_llama_server

SERVER = Path(fake_llama_server.__file__)
#: small sources, each a step that ninja counts: some before a step that may sleep, the others after it
EARLY, LATE = range(6), range(6, 12)


@dataclasses.dataclass(frozen=True, slots=True)
class Behaviour:
    """How the build goes wrong; the defaults are one that works."""

    configure_fails: bool = False  #: cmake ends with an error of the project
    broken_source: bool = False  #: the compiler refuses one of the sources
    sleep_s: float = 0.0  #: one step takes so long; it writes its process id to <build>/sleeping.pid first
    wait_for: Path | None = None  #: one step ends when this file is there; it writes <build>/sleeping.pid first
    fill_mib: int = 0  #: one step writes so much to <build>/filler and then fails, if there is room for it at all
    chatter_lines: int = 0  #: cmake says so many lines "chatter N" while it configures
    missing_library: bool = False  #: the server is linked to a library that is gone when it is to run
    output_name: str = "llama-server"  #: of the binary in <build>/bin
    cannot_load: str = ""  #: the server aborts when it is to load a model of this file name, and runs with all others

    def cmake(self) -> str:
        """Return ``CMakeLists.txt``."""
        early, late = (" ".join(f"src/part_{n:02}.c" for n in part) for part in (EARLY, LATE))
        lines = [
            "cmake_minimum_required(VERSION 3.14)",
            "project(standin C)",
            "set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)",
            "execute_process(COMMAND git rev-parse --short HEAD WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}",
            "                OUTPUT_VARIABLE COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE)",
            f"add_library(early STATIC {early})",
            f"add_executable(llama-server src/server.c {late})",
            "target_link_libraries(llama-server PRIVATE early)",
            f"set_target_properties(llama-server PROPERTIES OUTPUT_NAME {self.output_name})",
            'target_compile_definitions(llama-server PRIVATE COMMIT="${COMMIT}")',
        ]
        if self.chatter_lines:
            lines += [f"foreach(n RANGE 1 {self.chatter_lines})", '  message(STATUS "chatter ${n}")', "endforeach()"]
        if self.configure_fails:
            lines.append('message(FATAL_ERROR "configure fails as asked")')
        return "\n".join([*lines, *self._library(), *self._steps(), ""])

    def sources(self, faults: Mapping[str, object]) -> dict[str, str]:
        """Return the C files; *faults* are compiled into the server."""
        texts = {f"src/part_{n:02}.c": f"int part_{n:02}(void) {{ return {n}; }}\n" for n in (*EARLY, *LATE)}
        if self.broken_source:
            texts[f"src/part_{LATE[0]:02}.c"] = "int broken(void) { return as_asked; }\n"
        return {**texts, "src/library.c": "int library(void) { return 0; }\n", "src/server.c": _server(faults, self)}

    def _library(self) -> list[str]:
        """A shared library that the build itself deletes once the server is linked to it."""
        if not self.missing_library:
            return []
        return [
            "add_library(standin SHARED src/library.c)",
            "target_link_libraries(llama-server PRIVATE standin)",
            "add_custom_command(TARGET llama-server POST_BUILD",
            "                   COMMAND ${CMAKE_COMMAND} -E rm $<TARGET_FILE:standin>)",
        ]

    def _steps(self) -> list[str]:
        """Steps in the middle of the build. As every step of ninja's, each has a process group of its own."""
        scripts = {}
        remember = "echo $$ > sleeping.new && mv sleeping.new sleeping.pid"
        if self.sleep_s:
            scripts["sleep"] = f"{remember} && exec sleep {self.sleep_s}"
        if self.wait_for:
            scripts["wait"] = f"{remember} && until [ -e '{self.wait_for}' ]; do sleep 0.02; done"
        if self.fill_mib:
            scripts["fill"] = f"dd if=/dev/zero of=filler bs=1048576 count={self.fill_mib} && exit 3"
        lines = []
        for name, script in scripts.items():
            lines += [
                f"file(GENERATE OUTPUT ${{CMAKE_BINARY_DIR}}/{name}.sh CONTENT [==[{script}\n]==])",
                f"add_custom_target({name}_step COMMAND sh {name}.sh WORKING_DIRECTORY ${{CMAKE_BINARY_DIR}}",
                f'                  COMMENT "a step that may {name}")',
                f"add_dependencies({name}_step early)",
                f"add_dependencies(llama-server {name}_step)",
            ]
        return lines


def split(keywords: Mapping[str, object]) -> tuple[Behaviour, dict[str, object]]:
    """Return what *keywords* say of the build, and what of the server. ``TypeError`` for a name that neither has."""
    ours = {field.name for field in dataclasses.fields(Behaviour)}
    theirs = {field.name for field in dataclasses.fields(fake_llama_server.Faults)}
    if unknown := keywords.keys() - ours - theirs:
        raise TypeError(f"neither Behaviour nor Faults has {', '.join(sorted(unknown))}")
    behaviour = Behaviour(**{name: value for name, value in keywords.items() if name in ours})  # type: ignore[arg-type]
    faults = {name: value for name, value in keywords.items() if name not in ours}
    return behaviour, {"smoke_say": tiny_model.SENTENCE, **faults}


def _server(faults: Mapping[str, object], behaviour: Behaviour) -> str:
    """Return a C program that becomes Python with the fake server and *faults* in its environment."""
    settings = [f"  setenv({_c(f'FAKE_{name.upper()}')}, {_c(str(value))}, 1);" for name, value in faults.items()]
    use = "  library();" if behaviour.missing_library else ""
    use += _abort_at(behaviour.cannot_load) if behaviour.cannot_load else ""
    return f"""#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int library(void);

int main(int argc, char **argv) {{
  char **words = calloc(argc + 4, sizeof *words);
  char *start[] = {{{_c(sys.executable)}, "-I", "-S", {_c(str(SERVER))}}};
  for (int n = 0; n < 4; n++) words[n] = start[n];
  for (int n = 1; n < argc; n++) words[n + 3] = argv[n];
  setenv("FAKE_VERSION", "1 (" COMMIT ")", 1);
{chr(10).join(settings)}
{use}
  execv(words[0], words);
  perror(words[0]);
  return 127;
}}
"""


def _abort_at(file_name: str) -> str:
    """Return C that aborts before anything listens if *file_name* is to be loaded, but not if only asked a question."""
    return f"""  int loads = 0;
  for (int n = 1; n < argc; n++) {{
    if (!strcmp(argv[n], "--version") || !strcmp(argv[n], "--help")) {{ loads = 0; break; }}
    char *name = strrchr(argv[n], '/');
    if (name && !strcmp(name + 1, {_c(file_name)})) loads = 1;
  }}
  if (loads) {{
    fprintf(stderr, "GGML_ASSERT(fits) failed as asked\\n");
    abort();
  }}"""


def _c(text: str) -> str:
    """Return *text* as a C string literal; JSON's is one for what stands in paths and plain words."""
    return json.dumps(text, ensure_ascii=False)
