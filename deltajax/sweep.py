"""Train every member of a grid: `python -m deltajax.sweep --config=experiments/state_tracking.py --jobs=2`.

The grid is the experiment file's `get_grid()`, or made of flags: `--grid=config.seed=0,1,2 --grid=beta_max=1,2`. Names are
arguments of the file's get_config(); names that begin with `config.` are keys of its config. All results go into one CSV,
rewritten whenever a member ends; rows of runs that are not of this grid stay in it. The same command continues an interrupted
sweep, and does again what failed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deltajax import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_string("config", None, "experiment file, as deltajax.train takes it", flag_values=values)
    flags.DEFINE_multi_string("grid", [], "name=value,value,...; several make a product", flag_values=values)
    flags.DEFINE_string(
        "workdir", None, "where the members' folders go; default: as deltajax.train", flag_values=values
    )
    flags.DEFINE_string("csv", None, "where the results go; default: results.csv in --workdir", flag_values=values)
    flags.DEFINE_integer("jobs", 1, "members at a time; they share the processor's cores", 1, flag_values=values)
    flags.DEFINE_integer("bins", 32, "curves over positions are averaged into this many bins", 1, flag_values=values)

    def action(changes: dict[str, str]) -> None:
        from deltajax.training import sweeps  # here, so that Ctrl-C while JAX is imported is one line too
        from deltajax.training.config import default_workdir

        path = values.config
        if not path:
            raise ValueError("--config: an experiment file is missing, e.g. --config=experiments/state_tracking.py")
        workdir = Path(values.workdir or default_workdir(path))
        sweeps.run(
            sweeps.members(path, values.grid, changes),
            workdir,
            Path(values.csv or workdir / "results.csv"),
            jobs=values.jobs,
            bins=values.bins,
        )

    return cli.run(action, values, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
