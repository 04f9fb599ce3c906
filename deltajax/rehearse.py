"""Compile a run's train step for a pod that is not here: python -m deltajax.rehearse --config=... --topology=v5p:8x8x8.

Prints parameters, memory of a device, collectives, the compiler's estimate of the time, and the most expensive operations.
Without --topology: for the devices of this machine. TPUs need `pip install libtpu`, no TPU.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from deltajax import cli

if TYPE_CHECKING:
    from deltajax.training.rehearsal import Report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see `deltajax.cli` for the exit codes."""
    values = cli.flag_values()
    flags.DEFINE_string("config", None, "experiment file, as for deltajax.train", flag_values=values)
    flags.DEFINE_string("topology", None, "TPU slice, e.g. v5e:16x16, v5p:8x8x8, v6e:16x16", flag_values=values)
    flags.DEFINE_integer("slices", 1, "how many of them, joined by a data-centre network", 1, flag_values=values)
    flags.DEFINE_string("save", None, "file for the executable, for deltajax.train --executable", flag_values=values)

    def action(changes: dict[str, str]) -> None:
        if values.topology:
            os.environ.setdefault(
                "TPU_SKIP_MDS_QUERY", "1"
            )  # where libtpu is installed JAX looks for a TPU when it is imported
        from deltajax.training import overrides, rehearsal
        from deltajax.training.config import load_config

        if not values.config:
            raise ValueError("--config: an experiment file is missing, e.g. --config=experiments/pod.py")
        if values.slices > 1 and not values.topology:
            raise ValueError(f"--slices={values.slices}: --topology, the slice, is missing")
        if values.save and not Path(values.save).parent.is_dir():
            raise ValueError(f"--save={values.save}: the folder does not exist")
        config = overrides.apply(load_config(values.config), changes)
        devices = rehearsal.devices_of(values.topology, values.slices) if values.topology else None
        report, compiled = rehearsal.rehearse(config, devices)
        print(describe(report))
        if values.save:
            rehearsal.save(compiled, config, Path(values.save))
            print(f"saved    {values.save}")

    return cli.run(action, values, __doc__ or "", argv, result_is_printed=True)


def describe(report: "Report") -> str:
    """The report as a text of several lines."""
    from deltajax.training.rehearsal import CHIPS, GIB

    chip = CHIPS.get(report.kind)
    mesh = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    used = (report.state + report.temporary) / GIB
    of = f" of {chip.memory / GIB:.2f}" if chip else ""
    lines = [
        f"devices  {report.devices} x {report.kind}; mesh {mesh}",
        f"model    {report.parameters:,} parameters; {report.batch:,} {report.unit} a step",
        f"memory   {used:.2f}{of} GiB a device: {report.state / GIB:.2f} state and batch, {report.temporary / GIB:.2f} other",
    ]
    for kind, (count, size) in sorted(report.collectives.items()):
        lines.append(f"travels  {kind}: {count} a step, {size / 1e6:,.1f} MB a device")
    if report.collectives:
        lines.append(f"beside   {report.background:.0%} of these bytes travel while something is computed")
    if report.cycles and chip:
        without = f", without {report.uncounted} executions of Pallas kernels" if report.uncounted else ""
        lines.append(
            f"time     {report.cycles / 1e6:,.1f} M cycles, {report.seconds:.3f} s a step without waiting for others: at most "
            f"{report.per_second:,.0f} {report.unit}/s, MFU {report.mfu:.1%} (6 flops a parameter and target){without}"
        )
    lines += [f"cost     {share:6.1%}  {source}" for share, source in report.costly]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
