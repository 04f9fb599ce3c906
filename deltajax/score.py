"""The loss of every training example under trained models: `python -m deltajax.score --workdir=runs/even --workdir=runs/odd`.

An example is scored by those of the runs that were not trained on it (`data.half`) and gets the mean of their losses. With one
run for each half that is the irreducible loss which `hard_batches.RhoLoss` asks for, without any further data.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deltajax import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_multi_string(
        "workdir", [], "workdir of a training run; may be given several times", flag_values=values
    )
    flags.DEFINE_string("output", "losses.npy", "where the losses go, [training examples] float32", flag_values=values)

    def action(_: dict[str, str]) -> None:
        from deltajax.training import scoring  # here, so that Ctrl-C while JAX is imported is one line too

        scoring.write([Path(workdir) for workdir in values.workdir], Path(values.output))

    return cli.run(action, values, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
