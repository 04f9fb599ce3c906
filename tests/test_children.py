"""Children end with their parent, whatever ends it, and so do their own children."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deltajax import children

# A child that a grandchild of another program belongs to; both hold the pipe of their stdout open.
CHILD = "import subprocess; subprocess.Popen(['sleep', '600']); print('here', flush=True); input()"
PARENT = f"""
import os, subprocess, sys
from deltajax import children
child = subprocess.Popen(**children.tied([sys.executable, "-c", {CHILD!r}]), stdin=subprocess.PIPE)
{{}}
"""


@contextlib.contextmanager
def parent(then: str) -> Iterator[subprocess.Popen]:
    """A parent whose child and grandchild run; it goes on with `then`."""
    program = [sys.executable, "-c", PARENT.format(then)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_of_a_killed_parent(number):
    """The pipe of their stdout closes once all of them are gone."""
    with parent("child.wait()") as process:
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == ""


def test_children_of_a_parent_that_ends_by_itself():
    with parent("input(); os._exit(0)") as process:
        assert process.communicate("\n", timeout=60)[0] == ""


def test_a_thread_that_ends_takes_no_child_along():
    """As Linux's own way to tie a child to its parent would."""
    then = (
        "import threading; input()\n"
        "def start():\n"
        "    global other\n"
        "    other = subprocess.Popen(**children.tied(['cat']), stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "thread = threading.Thread(target=start); thread.start(); thread.join()\n"
        "print(other.communicate(b'alive')[0].decode(), flush=True); child.wait()\n"
    )
    with parent(then) as process:
        assert process.stdin and process.stdout
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "alive\n"


def test_a_command_ends_as_it_would_alone(tmp_path):
    """Output, exit code, signal; what is missing or is no program."""
    done = subprocess.run(**children.tied(["sh", "-c", "cat; exit 7"]), input="x", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "x", "")
    assert subprocess.run(**children.tied(["sh", "-c", "kill -9 $$"])).returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="/no/program"):
        children.tied(["/no/program"])
    (tmp_path / "text").write_text("no program\n")
    os.chmod(tmp_path / "text", 0o700)
    done = subprocess.run(**children.tied([tmp_path / "text"]), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"{tmp_path / 'text'}: Exec format error\n")
