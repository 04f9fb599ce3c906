"""Checkpoints in `workdir/checkpoints/<step>`: parameters, the rest of the state, and JSON of how to go on."""

import dataclasses
import fcntl
import functools
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from deltajax.errors import RunError
from deltajax.training import distributed, serialize
from deltajax.training.config import TrainConfig
from deltajax.training.step import TrainState

# Keys whose change makes a checkpoint's arrays unusable or gives them another meaning.
ARCHITECTURE = ("model.", "optimizer.name", "optimizer.trainable", "data.tokenizer")
REST = tuple(field.name for field in dataclasses.fields(TrainState) if field.name != "params")


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Hold `workdir` (made if missing) for one run; the kernel lets go of the lock even after kill -9.

    Raises:
      ValueError: it cannot be a folder, or not be written.
      RunError: another process holds it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "w")  # noqa: SIM115
    except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise ValueError(f"--workdir={workdir}: must be a folder that can be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{workdir} is in use by another run; wait for it or choose another --workdir") from None
        yield


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which keeps the failure of a save to itself until all processes have met at a barrier."""

    failure: BaseException | None = None

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failure = error
            raise


class Checkpoints:
    """The checkpoints of one run: written in the background, the latest `keep` and the best one kept.

    A directory gets its final name by one rename after everything is in it, so a kill leaves whole checkpoints only.
    """

    def __init__(self, workdir: Path, keep: int = 1, read_only: bool = False):
        """Nothing is written or removed before the first save.

        Raises:
          RunError: `read_only` and there is no checkpoint.
        """
        self.directory = workdir.resolve() / "checkpoints"
        self._keep, self._read_only, self._abandoned = keep, read_only, False
        if read_only and not self.steps():
            raise RunError(f"no checkpoint in {self.directory}")

    @functools.cached_property
    def _manager(self) -> _Manager:
        # Made at the first save: it removes leftovers of saves that never finished, and reads the losses of all
        # checkpoints, of which `restore` has set aside the damaged ones by then.
        policy = AnyPreservationPolicy(
            [
                LatestN(max(self._keep, 2)),
                BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        # Without best_fn Orbax would keep the metrics in memory only, and a resumed run would not know its best.
        return _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=_loss,
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of whole checkpoints on disk, ascending."""
        names = [path.name for path in self.directory.glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def best_step(self) -> int:
        """The step with the lowest validation loss, else the latest.

        Raises:
          RunError: a loss cannot be read.
        """
        losses = {step: self._measured(step) for step in self.steps()}
        scored = {step: loss for step, loss in losses.items() if loss is not None}
        return min(scored, key=scored.__getitem__) if scored else self.steps()[-1]

    def _measured(self, step: int) -> float | None:
        path = self.directory / str(step) / "metrics" / "metrics"
        with self.reading(step):
            return float(_loss(json.loads(path.read_text()))) if path.exists() else None

    def save(
        self, step: int, state: TrainState, config: TrainConfig, progress: dict[str, Any], loss: float | None
    ) -> None:
        """Start to save; returns once the arrays are copied. The save before this one has finished by then.

        Args:
          progress: what else is needed to go on, JSON; comes back from `restore`, with the config in it.
          loss: validation loss at this very step, if it was measured.

        Raises:
          RunError: this save or the one before it failed.
        """
        rest = {name: getattr(state, name) for name in REST}
        progress = {"config": serialize.to_json(config), **progress}
        progress["sum"] = _sum(progress)
        what = f"the checkpoint of step {step} or the one before it"
        self._settle(what)
        with self._failures(what):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    rest=ocp.args.StandardSave(rest),
                    progress=ocp.args.JsonSave(progress),
                ),
                metrics=None if loss is None else {"loss": loss},
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
            problem = distributed.first_problem(_one_line(failure) if failure else None)
            if problem:
                self.abandon()
                raise RunError(self._not_written(what, problem))
            if not any(distributed.everyones(self._manager.is_saving_in_progress())):
                break
            time.sleep(0.1)
        with self._failures(what):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

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
            restored, problem = None, None
            try:
                self._measured(step)
                progress = self.progress(step)
                self._check_same(step, progress["config"], config)
                rest = {name: getattr(abstract, name) for name in REST}
                params = self._read(step, "params", ocp.args.StandardRestore(abstract.params))
                rest = self._read(step, "rest", ocp.args.StandardRestore(rest))
                restored = step, TrainState(params=params, **rest), progress
            except serialize.Mismatch:
                raise
            except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or json raise
                problem = _one_line(error)
            problem = distributed.first_problem(problem)  # a damaged file may be one that only one process reads
            if problem:
                problems[step] = problem
                continue
            if not self._read_only:
                problems |= self._unmeasured([s for s in steps if s < step])
            for torn, problem in problems.items():
                if distributed.is_first():
                    print(
                        f"warning: checkpoint of step {torn} in {self.directory} cannot be read ({problem}); "
                        f"using step {step}",
                        file=sys.stderr,
                    )
                if not self._read_only:
                    self._set_aside(torn)
            return restored
        if problems:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise RunError(f"no checkpoint in {self.directory} can be read; {listed}")
        return None

    def _unmeasured(self, steps: list[int]) -> dict[int, str]:
        """Those whose losses cannot be read, and why, as any process finds it."""
        found = {}
        for step in steps:
            problem = None
            try:
                self._measured(step)
            except RunError as error:
                problem = _one_line(error)
            problem = distributed.first_problem(problem)
            if problem:
                found[step] = problem
        return found

    def restore_model(self, step: int, params: Any, stats: Any) -> tuple[Any, Any]:
        """Parameters and running statistics only; the arguments are as those of `restore`'s `abstract`.

        Raises:
          RunError: the checkpoint cannot be read.
        """
        with self.reading(step):
            params = self._read(step, "params", ocp.args.StandardRestore(params))
            if not jax.tree.leaves(stats):
                return params, stats
            wanted = {"stats": stats}
            how = ocp.checkpoint_utils.construct_restore_args(wanted)
            arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
            handler = ocp.PyTreeCheckpointHandler()
            return params, handler.restore(self.directory / str(step) / "rest", args=arguments)["stats"]

    def progress(self, step: int) -> dict:
        """What `save` was given as progress, and `config`.

        Raises:
          RunError: the checkpoint cannot be read.
          ValueError: its config is of another version of deltajax; the message names file and field.
        """
        with self.reading(step):
            progress = self._read(step, "progress", ocp.args.JsonRestore())
            written = progress.pop("sum", None)  # arrays have Orbax's; until 2026-11 there was none here
            if written not in (None, _sum(progress)):
                raise ValueError("progress/metadata is not what was written")
            stored = progress["config"]
        file = self.directory / str(step) / "progress" / "metadata"
        try:
            config, defaulted = serialize.from_json(stored), serialize.defaulted(stored)
        except ValueError as error:
            raise serialize.Mismatch(f"{file}: {error}") from None
        if defaulted and distributed.is_first():
            print(f"warning: {file} is of an older deltajax; it is read with {', '.join(defaulted)}", file=sys.stderr)
        return {**progress, "config": config}

    def _read(self, step: int, item: str, arguments: Any) -> Any:
        # Not through the manager: there a process that cannot read leaves all others waiting at a barrier.
        handler = ocp.JsonCheckpointHandler() if item == "progress" else ocp.StandardCheckpointHandler()
        return handler.restore(self.directory / str(step) / item, args=arguments)

    def _check_same(self, step: int, stored: TrainConfig, config: TrainConfig) -> None:
        changed = [d for d in serialize.differences(stored, config) if d.startswith(ARCHITECTURE)]
        if changed:
            raise serialize.Mismatch(
                f"the config disagrees with the checkpoint of step {step} in {self.directory}: {'; '.join(changed)}"
            )

    def discard(self, step: int) -> None:
        """Set the checkpoint of a step aside if there is one, so that a resumed run begins before it."""
        self.wait()
        if step in self.steps():
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
    def reading(self, step: int) -> Iterator[None]:
        """Whatever is raised within becomes a RunError that says which checkpoint cannot be read."""
        try:
            yield
        except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or json raise
            message = f"checkpoint of step {step} in {self.directory} cannot be read: {_one_line(error)}"
            raise RunError(message) from error

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk reaches us as OSError, ValueError or XlaRuntimeError
            raise RunError(self._not_written(what, _one_line(error))) from error

    def _not_written(self, what: str, problem: str) -> str:
        good = self.steps()
        kept = f"step {good[-1]} is kept" if good else "there is no earlier one"
        return f"{what} could not be written to {self.directory}: {problem}; {kept}"


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def _sum(progress: dict[str, Any]) -> str:
    """Of all but the config, which may be mended by hand."""
    kept = {name: value for name, value in progress.items() if name != "config"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    if isinstance(error, RunError) and error.__cause__:
        error = error.__cause__  # the message of `reading` says where, as those who call this do
    text = str(error).strip().split("\n")[0]
    system = re.search(r"([^:]+) \[os_error_code", text)  # TensorStore: the cause stands last, after several paths
    if system:
        return system.group(1).strip()
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
