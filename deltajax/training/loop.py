"""A run from its config to its plot: restore or initialise, train, evaluate, save, finish."""

import contextlib
import copy
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltajax import data
from deltajax.data.selection import SelectedBatches, UnrankableLoss, check_policy
from deltajax.errors import RunError
from deltajax.hard_batches import ExamplePolicy
from deltajax.layers.param import count_params
from deltajax.models import registry
from deltajax.training import (
    activation_log,
    attendance,
    distributed,
    metrics,
    optimizer,
    pretrained,
    sampling,
    serialize,
    watch,
)
from deltajax.training import mesh as mesh_lib
from deltajax.training.checkpoint import Checkpoints
from deltajax.training.config import TrainConfig
from deltajax.training.lock import lock
from deltajax.training.position import data_position, selection_of
from deltajax.training.step import Step, TrainState


def run(config: TrainConfig, workdir: Path, program: Any = None) -> None:
    """Train until `config.steps`, continuing what `workdir` holds; checkpoints, metrics, plot and sample go there.

    Args:
      program: the train step, compiled before (`rehearsal.load`); None: it is compiled now.

    Raises:
      ValueError: the config does not fit the devices, the data or the checkpoint.
      RunError: stopped by a signal, by updates that stay non-finite, by an unreadable checkpoint or a failed save.
    """
    step = make_step(config)  # first, so that a config that does not fit leaves nothing behind
    if program is not None:
        step = copy.copy(step)
        step.train = program
    with contextlib.ExitStack() as stack:
        distributed.on_first(lambda: stack.enter_context(lock(workdir)))
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.checkpoint.keep)))
        attendance.keep(checkpoints.kept)
        try:
            _go_on(config, workdir, checkpoints, step)
        except KeyboardInterrupt:
            raise RunError(f"interrupted; {checkpoints.kept()}, the same command continues") from None
        except UnrankableLoss as error:
            raise RunError(f"{error}; {checkpoints.kept()}") from None
        except (jax.errors.JaxRuntimeError, ValueError, RunError) as error:
            if jax.process_count() > 1 and attendance.is_of_runtime(error):
                checkpoints.abandon()
            raise


def _go_on(config: TrainConfig, workdir: Path, checkpoints: Checkpoints, step: Step) -> None:
    """From the last checkpoint, or from the start, to the summary."""
    restored = checkpoints.restore(step.abstract, config)
    if not restored:
        distributed.on_first(checkpoints.check_not_lost)
    summary = workdir / metrics.SUMMARY
    result = distributed.on_first(lambda: metrics.read_summary(workdir))
    if restored and restored[0] >= config.steps and result:
        print(f"The run in {workdir} is complete: {_describe(result)}.")
        print("To continue it give a larger --config.steps; to start anew another --workdir.")
        return
    dataset = data.load(config.data)
    check_fits(config, dataset)
    with contextlib.closing(Run(config, workdir, checkpoints, step, dataset, restored)) as run:
        distributed.on_first(lambda: summary.unlink(missing_ok=True))
        run.train()
        run.finish()


def make_step(config: TrainConfig, devices: Sequence[Any] | None = None) -> Step:
    """The compiled functions that a config asks for, on these devices; None: on all that are here."""
    mesh = mesh_lib.make_mesh(config.mesh, devices)
    mesh_lib.check_batch(config.data.batch_size, config.grad_accumulation, mesh)
    mesh_lib.check_sequence(getattr(config.data, "seq_len", None), mesh)
    by_example = isinstance(selection_of(config.data), ExamplePolicy)
    return _make_step(
        config.model,
        config.optimizer,
        config.schedule,
        config.steps,
        mesh,
        grad_accumulation=config.grad_accumulation,
        probed_sequences=config.probes.sequences,
        by_example=by_example,
        max_grad_norm=config.nonfinite.max_grad_norm,
    )


@functools.lru_cache(maxsize=1)  # a process that trains several seeds one after the other compiles once
def _make_step(model, optimizer_config, schedule_config, steps, mesh, **settings) -> Step:
    schedule = optimizer.make_schedule(schedule_config, optimizer_config.learning_rate, steps)
    specs = registry.module_of(model).param_specs(model)
    tx = optimizer.make_optimizer(optimizer_config, schedule, specs)
    trained = optimizer.trained(optimizer_config, specs) if optimizer_config.trainable else None
    return Step(model, tx, schedule, mesh, trained=trained, **settings)


class Run:
    """What the loop holds: the state, the data's position, and where numbers go."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: Path,
        checkpoints: Checkpoints,
        step: Step,
        dataset: data.Dataset,
        restored: tuple[int, TrainState, dict] | None,
    ):
        self.config, self.workdir, self.checkpoints, self.dataset = config, workdir, checkpoints, dataset
        self.compiled = step
        text = dataset.bytes_per_target
        self.bits_per_nat = None if text is None else 1 / (math.log(2) * text)  # bits per byte for one nat per target
        self.iterator = dataset.train_iterator(*step.reading_group, updates=config.steps, score=self._score_batch)
        self.best_loss = math.inf
        self.step = self.examples = 0
        if restored:
            self.step, self.state, progress = restored
            check_policy(dataset.selection, progress["iterator"])
            self.examples, position = data_position(progress, self.step)
            if self._is_same_corpus(progress):
                self.iterator.set_state(position)
            self.best_loss = distributed.on_first(checkpoints.best_loss)
            changed = serialize.differences(progress["config"], config)
            print(f"continuing after step {self.step}" + (f" with changed {'; '.join(changed)}" if changed else ""))
        else:
            self.state = step.init(config.seed)
            if config.init_from:
                self.state = pretrained.begin_from(Path(config.init_from).expanduser(), self.state, config.model)
            parameters = f"{count_params(step.abstract.params):,} parameters"
            if config.optimizer.trainable:
                parameters += f" (training those of {', '.join(config.optimizer.trainable)})"
            print(f"{parameters} on {jax.device_count()} {jax.default_backend()} device(s)")
        first = distributed.is_first()
        self.writer = metrics.Writer(workdir, self.step) if first else metrics.Silence()
        self.activations = activation_log.Writer(workdir, self.step) if first else metrics.Silence()
        self.progress = metrics.Progress(self.step, config.steps) if first else metrics.Silence()
        self.seconds = progress.get("seconds", 0.0) if restored else 0.0  # of training, without evaluations
        self._clock, self._weight = time.perf_counter(), 0.0

    def close(self) -> None:
        """Close files and bar."""
        self.progress.close()
        self.writer.close()
        self.activations.close()

    def train(self) -> None:
        """Loop in a fixed order: a checkpoint of step N follows the rows of step N, so a resumed run has them all."""
        config = self.config
        unread: Any = None
        with watch.StopRequest() as stop:
            while self.step < config.steps:
                # 1. Dispatch the next step; nothing may move between host and device unasked.
                with jax.transfer_guard("disallow"):
                    with watch.Patience(self.step):
                        rows = next(self.iterator)
                    batch = self.compiled.put(rows)
                    if config.probes.due(self.step):
                        self.state, *values = self.compiled.train_probed(self.state, batch)
                    else:
                        self.state, *values = self.compiled.train(self.state, batch)
                if isinstance(self.iterator, SelectedBatches):
                    values[0] = self._give_back(self.iterator, values[0])
                # 2. While it computes, read the step before.
                if unread is not None:
                    self._report(self.step, *unread)
                self.step, unread = self.step + 1, values
                self.examples += self.dataset.batch_size
                last = self.step == config.steps
                evaluate = last or self.step % config.evaluation.every == 0
                save = last or self.step % config.checkpoint.every == 0
                # 3. Evaluate and save, after this step's own row.
                asked = stop.asked(self.step)
                if evaluate or save or asked:
                    streak = self._report(self.step, *unread)
                    unread = None
                    loss = self._evaluate() if evaluate else None
                    stopping = asked is not None and not last
                    if save or stopping or (loss is not None and -math.inf < loss < self.best_loss):
                        self._save(loss, int(streak))
                    if not stopping:
                        continue
                    # 4. Leave when asked to.
                    self.checkpoints.wait()
                    raise RunError(f"stopped by {asked}; {self.checkpoints.kept()}, the same command continues")

    def finish(self) -> None:
        """Plot, sample and summary; the summary is written last and marks the run as complete."""
        self.checkpoints.wait()
        self.iterator.get_state()  # which reads the losses of a round that the run's end cut short: all must be numbers
        if not distributed.on_first(self._is_evaluated):
            self._evaluate()  # the run was stopped between its last evaluation and what is now its last step
        scores = {name: self._score(name) for name in self.dataset.evaluations}
        text = self._sample()
        if not distributed.is_first():
            return
        rows = metrics.read_rows(self.workdir)
        result: dict[str, Any] = {"steps": self.step, "examples": self.examples}
        if isinstance(self.iterator, SelectedBatches):
            result["examples_scored"] = self.iterator.scored
        result["seconds"] = self.seconds
        result |= {k: v for row in rows for k, v in row.items() if k.startswith(("validation_", "bits_per_byte"))}
        if self.bits_per_nat is not None:
            result["baselines"] = data.compressed_bits_per_byte(self.dataset.validation_text)
        guess = {} if self.dataset.chance is None else {"chance": self.dataset.chance}
        result |= guess
        if scores:
            metrics.write_positions(self.workdir, scores)
            result["evaluations"] = {name: metrics.overall(table) for name, table in scores.items()}
            for name, of_set in result["evaluations"].items():
                self.progress.say(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in (of_set | guess).items()))
        metrics.plot(self.workdir, self.bits_per_nat, result.get("baselines", {}), self.workdir / "loss.png")
        if text is not None:
            (self.workdir / "sample.txt").write_bytes(text)
            self.progress.say(f"--- sample ---\n{text.decode(errors='replace')}\n--------------")
        temporary = self.workdir / "summary.json.tmp"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, self.workdir / "summary.json")
        self.progress.say(f"The run in {self.workdir} is complete: {_describe(result)}.")

    def _is_evaluated(self) -> bool:
        return any(row["step"] == self.step and "validation_loss" in row for row in metrics.read_rows(self.workdir))

    def _sample(self) -> bytes | None:
        """The prompt continued, of tasks made of text."""
        if self.dataset.tokenizer is None:
            return None
        key = jax.random.fold_in(jax.random.wrap_key_data(jax.device_get(self.state.rng)), self.step)
        config, tokenizer = self.config, self.dataset.tokenizer
        return sampling.continue_text(
            self.state.params,
            config.model,
            tokenizer,
            config.prompt.encode(errors="surrogateescape"),
            key,
            config.sampling,
        )

    def _report(self, step: int, values: dict[str, jax.Array], seen: dict[str, jax.Array] | None = None) -> float:
        """Write a step's metrics and what probes saw, and show them; abort past the limit of updates that were not finite.

        Returns:
          For how many steps no update was finite.
        """
        row = {k: float(v) for k, v in jax.device_get(values).items()}
        limits = self.config.nonfinite
        if row["streak"] > limits.max_consecutive or row["skipped"] > limits.max_total:
            # The last finite update made the parameters from which none followed: its checkpoint is not good.
            self.checkpoints.wait()
            if row["streak"] < step:  # else they are still the first parameters, which no update has spoilt
                self.checkpoints.discard(step - int(row["streak"]))
            spike = "" if limits.max_grad_norm is None else f" or a norm above {limits.max_grad_norm:g}"
            raise RunError(
                f"non-finite loss or gradient{spike} at step {step}: {row['streak']:.0f} updates in a row and "
                f"{row['skipped']:.0f} in all were skipped (allowed: {limits.max_consecutive} and {limits.max_total}); "
                + self.checkpoints.kept()
            )
        if seen is not None:
            self.activations.write(step - 1, jax.device_get(seen))
        self._weight += row.pop("weight")
        if step % self.config.log_every and step not in (1, self.config.steps):
            return row["streak"]
        now = time.perf_counter()
        speed = self._weight / (now - self._clock)
        self.seconds += now - self._clock
        self._clock, self._weight = now, 0.0
        self.writer.write(step, **row, **{f"{self.dataset.unit}_per_second": speed})
        self.progress.update(step, row["loss"], f"{speed:,.0f} {self.dataset.unit}/s{self._shown(row)}")
        return row["streak"]

    def _evaluate(self) -> float:
        """Mean validation loss; written with the other scores and shown."""
        started = time.perf_counter()
        batches = self.dataset.validation_batches(self.config.evaluation.batches, *self.compiled.reading_group)
        state = self.state
        sums = [self.compiled.evaluate(state.params, state.stats, self.compiled.put(batch)) for batch in batches]
        total = {k: np.sum([x[k] for x in jax.device_get(sums)], dtype=np.float64) for k in sums[0]}
        row = {f"validation_{k}": float(x / total["weight"]) for k, x in total.items() if k != "weight"}
        loss = row["validation_loss"]
        if self.bits_per_nat is not None:
            row["bits_per_byte"] = loss * self.bits_per_nat
        self.writer.write(self.step, **row)
        self.progress.say(
            f"step {self.step}: {_describe_scores({**row, 'chance': self.dataset.chance})}{self._shown(row)}"
        )
        self._clock += time.perf_counter() - started  # the throughput counts training only
        return loss

    def _shown(self, row: dict[str, float]) -> str:
        """What the model wants to be seen of a row, such as ", temporal_sparsity 0.912"."""
        names = getattr(registry.module_of(self.config.model), "SHOWN", ())
        values = {name: row.get(name, row.get(f"validation_{name}")) for name in names}
        return "".join(f", {name} {value:.3f}" for name, value in values.items() if value is not None)

    def _score_batch(self, batch: data.Batch) -> np.ndarray:
        """Loss of every example of a batch of candidates, by the model as it is now."""
        return jax.device_get(self.compiled.score(self.state.params, self.state.stats, self.compiled.put(batch)))

    def _give_back(self, iterator: SelectedBatches, values: dict[str, Any]) -> dict[str, Any]:
        """Tell the selection the losses, which it reads when it needs them; the metrics that remain, and its costs."""
        losses = values.pop("example_losses") if iterator.by_example else values["loss"]
        iterator.observe(lambda: jax.device_get(losses))
        return {**values, "examples_scored": iterator.scored}

    def _score(self, name: str) -> dict[str, np.ndarray]:
        """Sums over an evaluation set, in float64: one per position, or one in all if the model knows no positions."""
        evaluate = self.compiled.evaluate_positions or self.compiled.evaluate
        batches = self.dataset.validation_batches(None, *self.compiled.reading_group, name)
        state = self.state
        sums = [jax.device_get(evaluate(state.params, state.stats, self.compiled.put(batch))) for batch in batches]
        return {k: np.sum([np.atleast_1d(x[k]) for x in sums], axis=0, dtype=np.float64) for k in sums[0]}

    def _is_same_corpus(self, progress: dict[str, Any]) -> bool:
        """Whether the checkpoint's position is one in these data; if not, the user is warned."""
        now = self._identities()
        if progress["tokenizer"] != now["tokenizer"]:
            raise ValueError("data.tokenizer is not the one of the checkpoint")
        if progress["corpus"] == now["corpus"] or not now["corpus"]:
            return True
        if isinstance(self.iterator, SelectedBatches):
            raise ValueError(
                "data.selection: the checkpoint's losses are of other data; begin a run in another --workdir"
            )
        if distributed.is_first():
            print(
                "warning: the corpus is not the one of the checkpoint: it is read from its first example on, "
                "and losses do not compare",
                file=sys.stderr,
            )
        return False

    def _save(self, loss: float | None, skipped: int) -> None:
        """Save; `skipped` updates have been skipped since the last one that was applied."""
        progress: dict[str, Any] = {"iterator": self.iterator.get_state(), "examples": self.examples}
        progress |= self._identities()
        progress["seconds"] = self.seconds + time.perf_counter() - self._clock
        self.checkpoints.save(self.step, self.state, self.config, progress, loss, skipped)
        if loss is not None and math.isfinite(loss):
            self.best_loss = min(self.best_loss, loss)

    def _identities(self) -> dict[str, str]:
        tokenizer = self.dataset.tokenizer
        return {"tokenizer": tokenizer.identity if tokenizer else "", "corpus": self.dataset.fingerprint}


def check_fits(config: TrainConfig, dataset: data.Dataset) -> None:
    """Raise a ValueError if the data hold ids that the model has no row for."""
    for name in ("vocab_size", "num_classes"):
        needed, there = getattr(dataset, name), getattr(config.model, name, None)
        if needed is not None and (there is None or there < needed):
            raise ValueError(f"model.{name} must be >= {needed}, as in the data, got {there}")


def _describe(summary: dict[str, Any]) -> str:
    baselines = ", ".join(f"{name} {value:.3f}" for name, value in summary.get("baselines", {}).items())
    return f"{summary['steps']} steps, {_describe_scores(summary)}" + (
        f" ({baselines} on the same text)" if baselines else ""
    )


def _describe_scores(scores: dict[str, Any]) -> str:
    """The score that a reader looks for first, and the loss."""
    loss = f"(loss {scores['validation_loss']:.4f})"
    if "bits_per_byte" in scores:
        return f"validation {scores['bits_per_byte']:.3f} bits per byte {loss}"
    chance = scores.get("chance")
    against = "" if chance is None else f", chance {chance:.4f}"
    accuracy = scores.get("validation_accuracy")
    return f"validation {loss}" if accuracy is None else f"validation accuracy {accuracy:.4f}{against} {loss}"
