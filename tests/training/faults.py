"""One run of four processes, ended again and again by `kill -9` of one of them: are its losses those of a run that nothing ended?

    PYTHONPATH=. python tests/training/faults.py [--rounds=10] [--seed=0] [--csv=benchmarks/results/faults.csv]

Half of the kills come when a drawn process has done a drawn step, half in a save: while arrays are written (any process) or just
before the checkpoint gets its final name (the first process, which does that). All starts are of one run, so every start
continues what the kill before left; a row holds the steps done between two kills, compared with the undisturbed run.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags
from training_runs import ROOT, SMALL, losses, run_together

from benchmarks import table

_ROUNDS = flags.DEFINE_integer("rounds", 10, "kills at steps, and as many in saves", 1)
_SEED = flags.DEFINE_integer("seed", 0, "of what is drawn")
EVERY = 4  # steps between checkpoints
ARGUMENTS = (*SMALL, "--config.mesh.data=2", "--config.mesh.fsdp=2", f"--config.checkpoint.every={EVERY}")


def start(workdir: Path, steps: int, victim: int, what: str, step: int) -> list[tuple[int, str, str]]:
    """Four processes; the accident of one of them. All compile for the same number of steps."""
    accidents = [(what, step) if index == victim else ("kill", 0) for index in range(4)]
    return run_together(workdir, accidents, *ARGUMENTS, f"--config.steps={steps}")


def main(_: list[str]) -> None:
    """Try, print and write the table."""
    draw = random.Random(_SEED.value)
    plan: list[tuple[str, int, int]] = []
    step = 2
    for number in range(2 * _ROUNDS.value):
        if number % 2 == 0:
            step += draw.randrange(1, EVERY + 1)
            plan.append(("kill", step, draw.randrange(4)))
        else:
            step = (step // EVERY + 1) * EVERY
            what = draw.choice(["kill_in_save", "kill_before_commit"])
            plan.append((what, step, draw.randrange(4) if what == "kill_in_save" else 0))
    steps = step + EVERY
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TINY_CORPUS": str(ROOT / "deltajax" / "data"), "PYTHONPATH": str(ROOT)}
        # With the cache the first process was ready more than 30 s before the others, and Gloo gave up.
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        undisturbed = Path(folder) / "undisturbed"
        ended = start(undisturbed, steps, 0, "kill", 0)
        assert not any(code for code, *_ in ended), ended
        wanted = losses(undisturbed)
        workdir = Path(folder) / "killed"
        for number, (what, at, victim) in enumerate([*plan, ("none", 0, 0)]):
            began = time.monotonic()
            ended = start(workdir, steps, victim, what if what != "none" else "kill", at)
            codes = [code for code, *_ in ended]
            as_planned = (codes[victim] == -signal.SIGKILL and all(codes)) if what != "none" else not any(codes)
            got = losses(workdir)
            row = {
                "start": number + 1,
                "accident": what,
                "process": victim if what != "none" else "",
                "step": at or "",
                "continued_after": next(
                    (line.split()[3] for line in ended[0][1].splitlines() if "continuing after" in line), 0
                ),
                "steps_in_log": len(got),
                "ended_as_planned": as_planned,
                "losses_equal": all(got[s] == wanted[s] for s in got),
                "seconds": round(time.monotonic() - began),
            }
            rows.append(row)
            print(row, flush=True)
            table.write(rows, table.cpu())
            if not as_planned:
                print(*(f"--- {index}\n{err}" for index, (_, _, err) in enumerate(ended)), file=sys.stderr)
        complete = sorted(got) == sorted(wanted)
        print(f"{sum(row['losses_equal'] for row in rows)} of {len(rows)} equal; complete: {complete}")


if __name__ == "__main__":
    app.run(main)
