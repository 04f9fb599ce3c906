"""The README's commands and code, as a newcomer would copy them. The set-up itself is what `.ci/run` does before this."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(command, *more):
    """A README command with this interpreter; fails with its output."""
    arguments = shlex.split(command)
    assert arguments[0] == ".venv/bin/python", command
    done = subprocess.run(
        [sys.executable, *arguments[1:], *more], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_blocks():
    operation, streaming = [text for language, text in BLOCKS if language == "python"]
    names: dict = {}
    exec(operation, names)
    assert names["o"].shape == names["v"].shape
    assert names["state"].shape == (1, 4, 64, 64)
    names = {}
    exec(streaming, names)
    assert names["logits"].shape == (10,) and not names["counts"].any()


def test_main_command(tmp_path):
    """Set-up, then the first run, here cut to two steps; then the text generator on what it left."""
    main = next(text for _, text in BLOCKS if "first_run.py" in text)
    venv, install, train = main.strip().split(" && ")
    assert venv == "python3.12 -m venv .venv"
    assert install == ".venv/bin/pip install -q -c constraints.txt -e ."
    short = [
        "--config.steps=2",
        "--config.schedule.warmup_steps=1",
        "--config.evaluation.batches=1",
        "--config.sampling.max_tokens=8",
    ]
    out = run(train, f"--workdir={tmp_path}", *short)
    assert "gzip -9" in out and "xz -9" in out
    for name in ("loss.png", "sample.txt", "metrics.jsonl", "checkpoints/2"):
        assert (tmp_path / name).exists()
    assert "is complete" in run(train, f"--workdir={tmp_path}", *short)
    generate = next(line for _, text in BLOCKS for line in text.splitlines() if "deltajax.generate" in line)
    generate = re.sub(r"--workdir=\S+", f"--workdir={tmp_path}", generate)
    assert run(generate, "--max_tokens=5").startswith("def ")


def test_test_command_is_ci():
    assert any(text.strip() == ".ci/run" for _, text in BLOCKS)
    script = (ROOT / ".ci/run").read_text()
    for step in ("pip install -q -c constraints.txt", "ruff check", "mypy", "pytest"):
        assert step in script
