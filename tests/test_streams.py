"""Commands whose output can't be written, and that a signal reaches before their work has begun."""

import os
import signal
import subprocess
import sys

import pytest

COMMAND = """
import os, signal, sys
from deltajax import cli

def action(_):
{action}
    open("done", "w").close()

if __name__ == "__main__":
    sys.exit(cli.run(action, cli.flag_values(), "doc", result_is_printed={result_is_printed}))
"""
MUCH = """
    for i in range(20_000):
        print(f"line {i} of the output", flush=i % 100 == 0)
"""


@pytest.fixture
def run(tmp_path):
    """`run(action, redirections, ...)`: a command in a shell, in an empty folder."""

    def run(action: str, redirection: str = "", result_is_printed: bool = False, **env: str):
        text = COMMAND.format(action=action, result_is_printed=result_is_printed)
        (tmp_path / "command.py").write_text(text)
        return subprocess.run(
            ["bash", "-c", f"set -o pipefail; {sys.executable} command.py {redirection}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
            capture_output=True,
        )

    run.done = (tmp_path / "done").exists  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_changes_nothing(run, unbuffered):
    ended = run(MUCH, "| head -1", PYTHONUNBUFFERED=unbuffered)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"line 0 of the output\n", b"")
    assert run.done()


def test_a_full_device_is_a_warning(run):
    ended = run(MUCH, "> /dev/full")
    assert (ended.returncode, ended.stdout) == (0, b"")
    assert ended.stderr == b"warning: stdout could not be written: No space left on device; all else is done\n"
    assert run.done()


def test_a_result_on_a_full_device_is_an_error(run):
    for action in ("    print('result')", "    sys.stdout.buffer.write(b'result')"):
        ended = run(action, "> /dev/full", result_is_printed=True)
        assert ended.returncode == 1
        assert ended.stderr == b"error: the result could not be written to stdout: No space left on device\n"


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "2> /dev/full"])
def test_closed_and_full_streams(run, redirection):
    """A file that is opened later doesn't get the number of a closed stream, and with it what is printed."""
    action = """
    file = open("file", "w")
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    print(sys.stderr.isatty(), sys.stdout.fileno(), sys.stdin.read(0), file=file)
    assert file.fileno() > 2
    """
    ended = run(action, redirection)
    assert ended.returncode == 0, ended
    assert ended.stdout == (b"" if redirection.startswith(">&-") else b"to stdout\n")
    assert run.done()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-8"])
def test_characters_that_an_encoding_lacks_are_escaped(run, encoding):
    ended = run("    print('é日\\ud800')\n    print('é日', file=sys.stderr)", PYTHONIOENCODING=encoding)
    codec = encoding.partition(":")[0]
    assert (ended.returncode, ended.stdout) == (0, "é日\ud800\n".encode(codec, "backslashreplace"))
    assert ended.stderr == "é日\n".encode(codec, "backslashreplace")


def test_an_error_message_that_can_not_be_encoded(run):
    ended = run("    raise ValueError('日本 is no number')", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (2, b"error: \\u65e5\\u672c is no number\n")


SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_while_modules_are_imported(run, tmp_path, name):
    """An extension module makes an ImportError of the interrupt, or loses it."""
    (tmp_path / "slow.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    for outcome in ("raise ImportError('numpy._core.multiarray failed to import') from None", "pass"):
        ended = run(f"    try:\n        import slow\n    except BaseException:\n        {outcome}")
        assert (ended.returncode, ended.stdout, ended.stderr) == (1, b"", b"error: interrupted\n")
        assert not run.done()


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_that_became_another_error(run, name):
    action = f"""
    try:
        os.kill(os.getpid(), signal.{name})
    except KeyboardInterrupt:
        raise ValueError("what a library made of it")
    """
    ended = run(action)
    assert (ended.returncode, ended.stderr) == (1, b"error: interrupted\n")


def test_what_nohup_ignores_stays_ignored(run):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ended = run("    os.kill(os.getpid(), signal.SIGHUP)")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended.returncode == 0 and run.done()
