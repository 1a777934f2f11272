"""Decides whether a finished build may come into use: it must work, and must not have lost too much speed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from mesh.build.canary import Trials, compare_tiny, compare_trial
from mesh.build.pipeline import StageReport
from mesh.build.rejected import RejectedError
from mesh.build.server_under_test import GPUS_HIDDEN
from mesh.build.smoke import smoke
from mesh.build.spec import BuildSpec
from mesh.build.status import Comparison, Stage
from mesh.errors import BuildError
from mesh.host.warden import Warden
from mesh.models import tiny_model

MODEL_NAME: Final = "tiny-model.gguf"


class BuildTester:
    """Tests builds on this machine. A ``mesh.build.pipeline.Tester``."""

    def __init__(
        self,
        env: Callable[[], Mapping[str, str]],
        trials: Trials | None = None,
        *,
        args: Sequence[str] = (),
        warden: Warden | None = None,
    ) -> None:
        """*env* gives the environment of a child, without the node's secrets; *trials* lends models of the cookbook.

        *args* are added to the llama-server's arguments. The *warden* ends what the node leaves if it is killed.
        """
        self._env = env
        self._trials = trials
        self._args = tuple(args)
        self._warden = warden

    async def test(
        self,
        binary: Path,
        old: Path | None,
        *,
        spec: BuildSpec,
        say: Callable[[str], None],
        stage: StageReport,
    ) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
        """Try *binary* on the tiny model, and compare it with *old* there and on ``spec.canary_profile``.

        Return what was measured and what an admin should know; raise ``RejectedError`` if it must not come into use.
        """
        model, env = spec.build_path.parent / MODEL_NAME, self._env()
        stage(Stage.TESTING, None, None)
        await _ensure(model)
        smoked = await smoke(binary, model, env=env, say=say, args=self._args, warden=self._warden)
        if smoked.on_cpu:
            env = {**env, **GPUS_HIDDEN}

        def progress(done: int, total: int) -> None:
            stage(Stage.COMPARING, done, total)

        if old is not None and _same(binary, old):  # built again in its place: there is no old one any more
            old = None
        tiny, notes = await compare_tiny(
            old,
            binary,
            model,
            max_slowdown=spec.max_slowdown,
            env=env,
            say=say,
            progress=progress,
            args=self._args,
            warden=self._warden,
        )
        notes = (*smoked.notes, *notes)
        if spec.canary_profile is None or self._trials is None:
            return (tiny,), notes
        try:
            real, more = await compare_trial(
                self._trials,
                spec.canary_profile,
                binary,
                old=None if self._trials.runs_by_default(spec.canary_profile, spec.name) else old,
                has_old=old is not None,
                max_slowdown=spec.max_slowdown,
                say=say,
                progress=progress,
            )
        except RejectedError as error:
            error.comparisons = (tiny, *error.comparisons)
            raise
        return (tiny,) if real is None else (tiny, real), (*notes, *more)


async def _ensure(model: Path) -> None:
    try:
        await asyncio.to_thread(tiny_model.ensure, model)
    except OSError as error:
        raise BuildError(
            f"cannot write the tiny model that a new build is tested with, {model}: {error.strerror}"
        ) from error


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is gone; that shows when it is started
        return False
