"""Train a model: `python -m deltajax.train --config=experiments/first_run.py --workdir=runs/first_run`.

Any key of the config can be set: `--config.optimizer.learning_rate=3e-4`.
The same command continues an interrupted run.

On several hosts start the same command on each, with --coordinator=HOST:PORT --num_processes=N --process_id=I or the
environment's JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; TPU pods, GKE, SLURM and Open MPI need neither.
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deltajax import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_string(
        "config", None, "experiment file with get_config(); its arguments: file.py:name=value,...", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "where the run lives; default: runs/<name of --config>", flag_values=values)
    flags.DEFINE_string("executable", None, "train step that deltajax.rehearse --save wrote", flag_values=values)
    flags.DEFINE_string("coordinator", None, "several processes: host:port of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "several processes: how many", flag_values=values)
    flags.DEFINE_integer("process_id", None, "several processes: which one this is, from 0", flag_values=values)
    flags.DEFINE_integer("start_timeout", 300, "seconds to wait for the other processes", 1, flag_values=values)

    several = False

    def action(changes: dict[str, str]) -> None:
        nonlocal several
        # Here, so that Ctrl-C while JAX is imported is one line too.
        from deltajax.training import attendance, distributed, loop, overrides, rehearsal
        from deltajax.training.config import default_workdir, load_config

        path = values.config
        if not path:
            raise ValueError("--config: an experiment file is missing, e.g. --config=experiments/first_run.py")
        config = overrides.apply(load_config(path), changes)
        with attendance.explained():
            several = True  # from the roll call on the others watch this process
            distributed.start(values.coordinator, values.num_processes, values.process_id, values.start_timeout)
            with contextlib.nullcontext() if distributed.is_first() else contextlib.redirect_stdout(io.StringIO()):
                program = rehearsal.load(Path(values.executable), config) if values.executable else None
                loop.run(config, Path(values.workdir or default_workdir(path)), program)
        distributed.finish()

    code = cli.run(action, values, __doc__ or "", argv)
    if several and code:
        from deltajax.training import attendance

        attendance.leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
