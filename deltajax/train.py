"""Train a model: `python -m deltajax.train --config=experiments/first_run.py --workdir=runs/first_run`.

Any key of the config can be set: `--config.optimizer.learning_rate=3e-4`.
The same command continues an interrupted run.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deltajax import cli
from deltajax.training import loop, overrides
from deltajax.training.config import TrainConfig


def load_config(path: str) -> TrainConfig:
    """What `get_config()` of the experiment file at `path` returns.

    Raises:
      ValueError: no such file, an error while it runs, no `get_config`, or that returns something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config={path}: no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={path}: must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("the file defines no get_config()")
        config = module.get_config()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise ValueError(f"--config={path}: get_config() must return a TrainConfig, got {type(config).__name__}")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_string("config", None, "experiment file with get_config()", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the run lives; default: runs/<name of --config>", flag_values=values)

    def action(changes: dict[str, str]) -> None:
        path = values.config
        if not path:
            raise ValueError("--config: an experiment file is missing, e.g. --config=experiments/first_run.py")
        config = overrides.apply(load_config(path), changes)
        loop.run(config, Path(values.workdir or Path("runs") / Path(path).stem))

    return cli.run(action, values, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
