"""Train a model: `python -m deltajax.train --config=experiments/first_run.py --workdir=runs/first_run`.

Any key of the config can be set: `--config.optimizer.learning_rate=3e-4`.
The same command continues an interrupted run.
"""

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

    def action(changes: dict[str, str]) -> None:
        from deltajax.training import loop, overrides  # here, so that Ctrl-C while JAX is imported is one line too
        from deltajax.training.config import default_workdir, load_config

        path = values.config
        if not path:
            raise ValueError("--config: an experiment file is missing, e.g. --config=experiments/first_run.py")
        config = overrides.apply(load_config(path), changes)
        loop.run(config, Path(values.workdir or default_workdir(path)))

    return cli.run(action, values, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
