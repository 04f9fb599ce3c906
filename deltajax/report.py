"""Draw the figures and write the tables of RESULTS.md: `python -m deltajax.report`.

Reads, for every experiment file that has a `get_report()`, the table `<results>/<name>.csv` that `deltajax.sweep --csv` wrote.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deltajax import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_list("experiments", ["experiments/*.py"], "experiment files or globs", flag_values=values)
    flags.DEFINE_string("results", "docs/results", "where the tables are, and the figures go", flag_values=values)
    flags.DEFINE_string("output", "RESULTS.md", "the page that is written", flag_values=values)

    def action(_: dict[str, str]) -> None:
        from deltajax.training import reports  # here, so that Ctrl-C while JAX is imported is one line too

        reports.write(values.experiments, Path(values.results), Path(values.output))

    return cli.run(action, values, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
