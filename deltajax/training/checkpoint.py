"""Checkpoints in `workdir/checkpoints/<step>`: parameters, the rest of the state, and JSON of how to go on."""

import dataclasses
import functools
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deltajax.errors import RunError
from deltajax.training import checksums, distributed, position, serialize
from deltajax.training.checkpoint_reader import CheckpointReader, config_sum, damaged, lowest, one_line, progress_sum
from deltajax.training.config import TrainConfig
from deltajax.training.step import TrainState

MARKER = ".checkpointed"  # in the workdir once a checkpoint is complete
REST = tuple(field.name for field in dataclasses.fields(TrainState) if field.name != "params")


def _loss(metrics: Any) -> float | None:
    return metrics.get("loss") if metrics else None


@dataclasses.dataclass
class _LatestAndBest:
    """Orbax's preservation policy: keep the latest checkpoints, and the one with the lowest loss.

    A loss that is not finite is no measurement. Of equal losses the earliest counts. Checkpoints since the last applied
    update hold the same parameters, and perhaps no update can follow them: they count as one checkpoint, the latest.

    Attributes:
      latest: how many checkpoints to keep.
      updated: step of the last update that was applied. Skipped ones may have followed.
    """

    latest: int
    updated: float = math.inf

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint, in order of steps, whether it is kept."""
        losses = {info.step: _loss(info.metrics) for info in checkpoints}
        newest = checkpoints[-1].step
        distinct = [step for step in losses if step < min(self.updated, newest)] + [newest]
        kept = {*distinct[-self.latest :], lowest(losses)}
        return [info.step in kept for info in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which keeps the failure of a save to itself until all processes have met at a barrier."""

    failure: BaseException | None = None

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failure = error
            raise


class Checkpoints(CheckpointReader):
    """The checkpoints of one run: written in the background, the latest `keep` and the best one kept.

    A directory gets its final name by one rename after everything is in it, so a kill leaves whole checkpoints only.
    """

    def __init__(self, workdir: Path, keep: int = 1, read_only: bool = False):
        """Nothing is written or removed before the first save.

        Raises:
          RunError: `read_only` and there is no checkpoint.
        """
        super().__init__(workdir)
        self._policy, self._read_only, self._abandoned = _LatestAndBest(max(keep, 2)), read_only, False
        if read_only and not self.steps():
            raise RunError(f"no checkpoint in {self.directory}")

    @functools.cached_property
    def _manager(self) -> _Manager:
        # Made at the first save: it removes leftovers of saves that never finished, and reads the losses of all
        # checkpoints, of which `restore` has set aside the damaged ones by then.
        # Without best_fn Orbax keeps metrics in memory only, and a resumed run could not find its best.
        return _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                best_fn=lambda metrics: metrics["loss"],
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
        )

    def check_not_lost(self) -> None:
        """Refuse to begin anew in a workdir whose checkpoints have disappeared.

        Raises:
          RunError: a checkpoint was completed here, and there is none now.
        """
        workdir = self.directory.parent
        trace = next((name for name in (MARKER, "summary.json") if (workdir / name).exists()), None)
        if trace and not self.steps():
            raise RunError(
                f"{workdir} holds a run, but {self.directory} holds no checkpoint of it; bring them back, or "
                f"remove {workdir} to start over"
            )

    def save(
        self,
        step: int,
        state: TrainState,
        config: TrainConfig,
        progress: dict[str, Any],
        loss: float | None,
        skipped: int = 0,
    ) -> None:
        """Start to save; returns once the arrays are copied. The save before this one has finished by then.

        Args:
          progress: what else is needed to go on, JSON; comes back from `restore`, with the config in it.
          loss: validation loss at this very step, if it was measured.
          skipped: how many updates have been skipped since the last one that was applied.

        Raises:
          RunError: this save or the one before it failed.
        """
        rest = {name: getattr(state, name) for name in REST}
        what = f"the checkpoint of step {step} or the one before it"
        self._settle(what)
        progress = {"config": serialize.to_json(config), **progress}
        items = {"params": state.params, "rest": rest}
        progress["checksums"] = {
            name: checksums.checksums(tree, checksums.partial_sums(tree)) for name, tree in items.items()
        }
        measured = loss if loss is not None and math.isfinite(loss) else None
        progress["loss"] = measured
        progress["config_sum"] = config_sum(progress["config"])
        progress["sum"] = progress_sum(progress)
        self._policy.updated = step - skipped
        with self._failures(what):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    rest=ocp.args.StandardSave(rest),
                    progress=ocp.args.JsonSave(progress),
                ),
                metrics=None if measured is None else {"loss": measured},
            )

    def wait(self) -> None:
        """Return when the last save is on disk.

        Raises:
          RunError: it failed.
        """
        self._settle("the last checkpoint")

    def _settle(self, what: str) -> None:
        # Of several processes the main threads meet all the while: in Orbax's barriers those that have written would wait
        # for one that is gone or could not write.
        while jax.process_count() > 1:
            failure = self._manager.failure
            problem = distributed.first_problem(one_line(failure) if failure else None)
            if problem:
                self.abandon()
                raise RunError(self._not_written(what, problem))
            if not any(distributed.everyones(self._manager.is_saving_in_progress())):
                break
            time.sleep(0.1)
        with self._failures(what):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if self.steps() and distributed.is_first():
                (self.directory.parent / MARKER).touch()

    def close(self) -> None:
        """Wait for the last save and free the threads."""
        if self._abandoned or not self._is_open():
            return
        with self._failures("the last checkpoint"):
            self._manager.close()

    def abandon(self) -> None:
        """The save in flight cannot end without a process that is gone or has failed: never wait for it."""
        self._abandoned = True

    def kept(self) -> str:
        """What is safe on disk, for messages."""
        steps = self.steps()
        return f"last good checkpoint: step {steps[-1]}" if steps else "no checkpoint was saved yet"

    def restore(self, abstract: TrainState, config: TrainConfig) -> tuple[int, TrainState, dict] | None:
        """(step, state, progress) of the newest checkpoint that can be read; None if there is none at all.

        One that cannot be read is reported, and unless `read_only` set aside so that its step can be saved again. That holds
        for those before it too, if their losses cannot be read: the best one could not be told.

        Raises:
          RunError: there are checkpoints and none can be read.
          ValueError: the checkpoint belongs to another model, or its config to another deltajax; the message names the keys.
        """
        problems: dict[int, str] = {}
        steps = distributed.on_first(self.steps)
        for step in reversed(steps):
            restored, sums, problem = None, {}, None
            try:
                self._measured(step)
                progress = self.progress(step)
                self._check_same(step, progress["config"], config)
                rest = {name: getattr(abstract, name) for name in REST}
                params = self._read(step, "params", ocp.args.StandardRestore(abstract.params))
                rest = self._read(step, "rest", ocp.args.StandardRestore(rest))
                sums = {name: checksums.partial_sums(tree) for name, tree in (("params", params), ("rest", rest))}
                restored = step, TrainState(params=params, **rest), progress
            except serialize.Mismatch:
                raise
            except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or json raise
                problem = one_line(error)
            problem = distributed.first_problem(problem)  # a damaged file may be one that only one process reads
            if not problem:
                assert restored is not None
                problem = damaged(progress, {"params": params, "rest": rest}, sums)
            if problem:
                problems[step] = problem
                continue
            if not self._read_only:
                problems |= self._unmeasured([s for s in steps if s < step])
            self._report_damaged(problems, step)
            return restored
        if problems:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise RunError(f"no checkpoint in {self.directory} can be read; {listed}")
        return None

    def _report_damaged(self, problems: dict[int, str], used: int) -> None:
        for step, problem in problems.items():
            if distributed.is_first():
                print(
                    f"warning: checkpoint of step {step} in {self.directory} cannot be read ({problem}); "
                    f"using step {used}",
                    file=sys.stderr,
                )
            if not self._read_only:
                self._set_aside(step)

    def _unmeasured(self, steps: list[int]) -> dict[int, str]:
        """Those whose losses cannot be read, and why, as any process finds it."""
        found = {}
        for step in steps:
            problem = None
            try:
                self._measured(step)
            except RunError as error:
                problem = one_line(error)
            problem = distributed.first_problem(problem)
            if problem:
                found[step] = problem
        return found

    def _check_same(self, step: int, stored: TrainConfig, config: TrainConfig) -> None:
        changed = position.fixed_differences(stored, config)
        if changed:
            raise serialize.Mismatch(
                f"the config disagrees with the checkpoint of step {step} in {self.directory}: {'; '.join(changed)}; "
                f"to train on from its parameters give --config.init_from={self.directory.parent} and another --workdir"
            )

    def discard(self, first: int) -> None:
        """Set the checkpoints of this step and later ones aside, so that a resumed run begins before it."""
        self.wait()
        for step in distributed.on_first(self.steps):
            if step >= first:
                self._set_aside(step)

    def _set_aside(self, step: int) -> None:
        def move() -> None:
            target = self.directory.parent / "set_aside_checkpoints" / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)

        distributed.on_first(move)
        if self._is_open():
            self._manager.reload()

    def _is_open(self) -> bool:
        return "_manager" in vars(self)

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk reaches us as OSError, ValueError or XlaRuntimeError
            raise RunError(self._not_written(what, one_line(error))) from error

    def _not_written(self, what: str, problem: str) -> str:
        good = self.steps()
        kept = f"step {good[-1]} is kept" if good else "there is no earlier one"
        return f"{what} could not be written to {self.directory}: {problem}; {kept}"
