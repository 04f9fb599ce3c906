"""Reading checkpoints: which there are, what they hold, and whether it is what was written."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deltajax.errors import RunError
from deltajax.training import checksums, distributed, serialize


class CheckpointReader:
    """The checkpoints in `workdir/checkpoints/<step>`.

    Nothing is read through Orbax's manager: there, a process that cannot read leaves all others
    waiting at a barrier.
    """

    def __init__(self, workdir: Path):
        """Nothing is read yet."""
        self.directory = workdir.resolve() / "checkpoints"

    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints on disk, ascending.

        Raises:
          RunError: the folder of checkpoints cannot be read.
        """
        try:
            names = [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:
            if self.directory.is_symlink():
                raise RunError(f"{self.directory} is a link to {self.directory.readlink()}, which is missing") from None
            return []
        except OSError as error:
            raise RunError(f"{self.directory} cannot be read: {error.strerror}") from None
        return sorted(int(name) for name in names if name.isdigit())

    def best_step(self) -> int:
        """Return the step with the lowest finite validation loss, the earliest of equals; else the latest.

        Raises:
          RunError: a loss cannot be read.
        """
        steps = self.steps()
        best = lowest({step: self._measured(step) for step in steps})
        return steps[-1] if best is None else best

    def best_loss(self) -> float:
        """Return the lowest finite validation loss of any checkpoint, infinity if there is none.

        Raises:
          RunError: a loss cannot be read.
        """
        return min((loss for loss in map(self._measured, self.steps()) if loss is not None), default=math.inf)

    def _measured(self, step: int) -> float | None:
        """Return the validation loss of a checkpoint, None if it has none that is finite."""
        path = self.directory / str(step) / "metrics" / "metrics"
        with self.reading(step):
            loss = float(json.loads(path.read_text())["loss"]) if path.exists() else None
            loss = loss if loss is not None and math.isfinite(loss) else None  # older versions wrote such losses
            stored = self._stored(step).get("loss", loss)  # older checkpoints have it in one place only
            if loss != stored:
                raise ValueError(f"the validation loss is {loss} in metrics and {stored} in progress")
            return loss

    def restore_model(self, step: int, params: Any, stats: Any) -> tuple[Any, Any, dict[str, checksums.Sums]]:
        """Read parameters and running statistics only; the arguments are as those of `restore`'s `abstract`.

        Returns:
          params, stats, and their partial sums for `check_model`.

        Raises:
          RunError: the checkpoint cannot be read.
        """
        with self.reading(step):
            params = self._read(step, "params", ocp.args.StandardRestore(params))
            if jax.tree.leaves(stats):
                wanted = {"stats": stats}
                how = ocp.checkpoint_utils.construct_restore_args(wanted)
                arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
                handler = ocp.PyTreeCheckpointHandler()
                stats = handler.restore(self.directory / str(step) / "rest", args=arguments)["stats"]
            return params, stats, {name: checksums.partial_sums(x) for name, x in _model(params, stats).items()}

    def check_model(self, step: int, progress: dict, params: Any, stats: Any, sums: dict[str, checksums.Sums]) -> None:
        """Compare what `restore_model` returned with the checksums in `progress`; all processes must call it.

        Raises:
          RunError: an array is not the one that was saved.
        """
        problem = damaged(progress, _model(params, stats), sums)
        if problem:
            raise RunError(f"checkpoint of step {step} in {self.directory} cannot be read: {problem}")

    def progress(self, step: int) -> dict:
        """What `save` was given as progress, and `config`.

        Raises:
          RunError: the checkpoint cannot be read.
          ValueError: its config is of another version of deltajax; the message names file and field.
        """
        with self.reading(step):
            progress = self._stored(step)
            stored = progress["config"]
        file = self.directory / str(step) / "progress" / "metadata"
        try:
            config, defaulted = serialize.from_json(stored), serialize.defaulted(stored)
        except ValueError as error:
            raise serialize.Mismatch(f"{file}: {error}") from None
        if not defaulted and progress.get("config_sum", config_sum(stored)) != config_sum(stored):
            raise RunError(
                f"checkpoint of step {step} in {self.directory} cannot be read: {file}: its config was changed"
            )
        if defaulted and distributed.is_first():
            print(f"warning: {file} is of an older deltajax; it is read with {', '.join(defaulted)}", file=sys.stderr)
        return {**progress, "config": config}

    def _stored(self, step: int) -> dict:
        """Read the JSON that `save` wrote."""
        progress = self._read(step, "progress", ocp.args.JsonRestore())
        written = progress.pop("sum", None)  # older checkpoints have none
        if written not in (None, progress_sum(progress)):
            raise ValueError("progress/metadata is not what was written")
        return progress

    def _read(self, step: int, item: str, arguments: Any) -> Any:
        # Not through the manager: there a process that cannot read leaves all others waiting at a barrier.
        handler = ocp.JsonCheckpointHandler() if item == "progress" else ocp.StandardCheckpointHandler()
        return handler.restore(self.directory / str(step) / item, args=arguments)

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Whatever is raised within becomes a RunError that says which checkpoint cannot be read."""
        try:
            yield
        except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or json raise
            message = f"checkpoint of step {step} in {self.directory} cannot be read: {one_line(error)}"
            raise RunError(message) from error


def lowest(losses: dict[int, float | None]) -> int | None:
    """Return the step of the lowest finite loss, the earliest of equals."""
    measured = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(measured, key=lambda step: (measured[step], step), default=None)


def _model(params: Any, stats: Any) -> dict[str, Any]:
    """Return the trees as they are named in a checkpoint."""
    return {"params": params} | ({"rest": {"stats": stats}} if jax.tree.leaves(stats) else {})


def damaged(progress: dict, trees: dict[str, Any], sums: dict[str, checksums.Sums]) -> str | None:
    """Return which array differs from what was saved; None if none does, or if an older version wrote no checksums."""
    for name, stored in progress.get("checksums", {}).items():
        if name in trees:
            problem = checksums.mismatch(trees[name], sums[name], stored)
            if problem:
                return f"{name}{problem}"
    return None


def progress_sum(progress: dict[str, Any]) -> str:
    """Return a checksum of all but the config, which is read by other versions of deltajax too."""
    kept = {name: value for name, value in progress.items() if name != "config"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def config_sum(config: Any) -> str:
    """Return a checksum of a config's JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def one_line(error: BaseException) -> str:
    if isinstance(error, RunError) and error.__cause__:
        error = error.__cause__  # the message of `reading` says where, as those who call this do
    text = str(error).strip().split("\n")[0]
    system = re.search(r"([^:]+) \[os_error_code", text)  # TensorStore puts the cause last, after several paths
    if system:
        return system.group(1).strip()
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
