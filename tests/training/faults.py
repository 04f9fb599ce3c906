"""One run of four processes, ended again and again by `kill -9` of one of them: are its losses those of a run that nothing ended?

    PYTHONPATH=. python tests/training/faults.py [--rounds=10] [--seed=0] [--csv=benchmarks/results/faults.csv]

Half of the kills come when a drawn process has done a drawn step, half in a save: when all start it together or while arrays are
written (any process), or just before the checkpoint gets its final name (the first process, which does that). All starts are of
one run, so every start continues what the kill before left; a row holds the steps done until then, compared with the undisturbed
run. CI does one kill of each half, drawn anew every time (`test_processes.py`).
"""

import os
import random
import tempfile
import time
from pathlib import Path

from absl import app, flags
from training_runs import ROOT, SMALL, Ended, assert_killed, losses, run_together

from benchmarks import table

_ROUNDS = flags.DEFINE_integer("rounds", 10, "kills at steps, and as many in saves", 1)
_SEED = flags.DEFINE_integer("seed", 0, "of what is drawn")
EVERY = 4  # steps between checkpoints
ARGUMENTS = (*SMALL, "--config.mesh.data=2", "--config.mesh.fsdp=2", f"--config.checkpoint.every={EVERY}")


def start(workdir: Path, steps: int, victim: int, what: str, step: int) -> list[Ended]:
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
            what = draw.choice(["kill_at_save", "kill_in_save", "kill_before_commit"])
            plan.append((what, step, 0 if what == "kill_before_commit" else draw.randrange(4)))
    steps = step + EVERY
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TINY_CORPUS": str(ROOT / "deltajax" / "data"), "PYTHONPATH": str(ROOT)}
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        undisturbed = Path(folder) / "undisturbed"
        ended = start(undisturbed, steps, 0, "kill", 0)
        assert not any(process.code for process in ended), ended
        wanted = losses(undisturbed)
        workdir = Path(folder) / "killed"
        for number, (what, at, victim) in enumerate([*plan, ("none", 0, 0)]):
            began = time.monotonic()
            ended = start(workdir, steps, victim, what if at else "kill", at)
            if at:
                assert_killed(ended, victim)
            else:
                assert not any(process.code for process in ended), ended
            got = losses(workdir)
            continued = [line.split()[3] for line in ended[0].out.splitlines() if "continuing after" in line]
            rows.append(
                {
                    "start": number + 1,
                    "accident": what,
                    "process": victim if at else "",
                    "step": at or "",
                    "continued_after": continued[0] if continued else 0,
                    "steps_in_log": len(got),
                    "losses_equal": all(got[s] == wanted[s] for s in got),
                    "seconds": round(ended[victim].at - began),
                    "others_ended_after": round(max(p.at for p in ended) - ended[victim].at, 1) if at else "",
                }
            )
            print(rows[-1], flush=True)
            table.write(rows, table.cpu())
        equal, complete = sum(row["losses_equal"] for row in rows), sorted(got) == sorted(wanted)
        print(f"{equal} of {len(rows)} starts equal; complete: {complete}")
        if equal < len(rows) or not complete:
            raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
