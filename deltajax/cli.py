"""What every command line shares: flags, `--config.a.b=value` pairs, one-line errors, exit codes.

Exit codes: 0 done; 2 usage (something the caller gave is wrong: ValueError, a file that is missing or in the way); 1 any
other failure, Ctrl-C, SIGTERM and SIGHUP included. `--debug` adds the traceback.

What is printed decides nothing: a character that the encoding of stdout lacks is escaped, and what can't be written is dropped.
A reader that leaves early (`| head -1`) is no failure. Another one, such as a full disk, is a warning at the end, or an error
of a command whose only result is what it prints.
"""

import contextlib
import difflib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from logging import getLogger
from types import FrameType
from typing import Any

from absl import flags, logging

from deltajax import streams
from deltajax.errors import RunError

# Flags of any command that are paths. Those of corpora expand what they list themselves.
PATHS = {
    *("checkpoint", "checkpoints", "config", "csv", "executable", "experiments", "fits", "out", "output", "results"),
    *("runs", "save", "surfaces", "text", "tokenizer", "trajectories", "workdir"),
}


def flag_values() -> flags.FlagValues:
    """The flags that every command has. Not absl's global set: in it two commands could not share names."""
    values = flags.FlagValues()
    flags.DEFINE_bool("debug", False, "print tracebacks", flag_values=values)
    flags.DEFINE_bool("help", False, "print this help", flag_values=values)
    return values


def run(
    action: Callable[[dict[str, str]], None],
    values: flags.FlagValues,
    doc: str,
    argv: Sequence[str] | None = None,
    *,
    result_is_printed: bool = False,
) -> int:
    """Parse `argv`, call `action(config overrides)`, turn what it raises into one line and an exit code."""
    of_process = argv is None
    if of_process:
        streams.protect()
    argv = list(sys.argv if argv is None else argv)
    debug = any(argument in ("--debug", "-debug", "--debug=true", "--debug=1") for argument in argv)
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    if not debug:
        # When a save fails, Orbax' threads log and print tracebacks of what then also reaches us.
        logging.set_verbosity(logging.FATAL)
        getLogger("asyncio").setLevel("CRITICAL")  # of many writes that fail together one is reported, by us
        sys.excepthook = sys.unraisablehook = threading.excepthook = _ignore
    try:
        with streams.escaping(), _interruptible(of_process) as signals:
            return _run(action, values, doc, argv, signals, debug, result_is_printed)
    finally:
        if not of_process:  # else stray writes of a failed save may still complain while the process ends
            sys.excepthook, sys.unraisablehook, threading.excepthook = hooks


def _run(action, values, doc, argv, signals, debug, result_is_printed) -> int:
    try:
        overrides = _parse(argv, values)
        if values.help:
            print(doc.strip(), "\n", values.get_help().strip("\n"), sep="\n")
        else:
            action(overrides)
    except KeyboardInterrupt:
        return _fail("interrupted", 1, debug)
    except Exception as error:
        if signals and not isinstance(
            error, RunError
        ):  # what an interrupt has become on its way, such as an ImportError
            return _fail("interrupted", 1, debug)
        usage = isinstance(error, ValueError | FileNotFoundError | FileExistsError | flags.Error)
        return _fail(_describe(error), 2 if usage else 1, debug)
    failure = streams.output_failure()
    if failure and result_is_printed:
        return _fail(f"the result could not be written to stdout: {failure.strerror}", 1, debug)
    if failure:
        print(f"warning: stdout could not be written: {failure.strerror}; all else is done", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _interruptible(of_process: bool) -> Iterator[list[int]]:
    """Handle SIGTERM and SIGHUP as Ctrl-C; yield the list of signals that came.

    A signal that nohup or a shell has ignored stays ignored.
    """
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if of_process and _is_importing(frame):
            # Extension modules turn the exception into an ImportError, or lose it.
            # Ending at once is as safe as `kill -9`, which every phase of a run survives.
            os.write(2, b"error: interrupted\n")
            os._exit(1)
        raise KeyboardInterrupt

    ignored = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN]
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}.difference(ignored)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _ignore(*_: Any) -> None:
    pass


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    expected = isinstance(error, RunError | ValueError | OSError | flags.Error)
    return str(error) if expected else f"{type(error).__name__}: {error}"


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first_line = message.strip().split("\n")[0]
    print(f"error: {first_line}", file=sys.stderr, flush=True)
    return code


def _parse(argv: list[str], values: flags.FlagValues) -> dict[str, str]:
    """Let absl parse its flags; `--config.x=value` and `--config.x value` are taken out before."""
    rest, overrides = [], {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(("--config.", "-config.")):
            rest.append(argument)
            continue
        path, equals, text = argument.lstrip("-").removeprefix("config.").partition("=")
        if not equals:
            text = next(arguments, "--")
            if text.startswith("--"):
                raise ValueError(f"--config.{path}: a value is missing")
        overrides[path] = text
    if overrides and "config" not in values:
        raise ValueError(f"--config.{next(iter(overrides))}: this command takes no config keys")
    try:
        positional = values(rest)[1:]
    except flags.UnrecognizedFlagError as error:
        name, _, key = error.flagname.partition(".")
        nearest = difflib.get_close_matches(name, values, n=1)
        hint = f"; did you mean --{nearest[0]}{'.' + key if key else ''}?" if nearest else ""
        known = ", ".join(f"--{flag}" for flag in sorted(values))
        raise ValueError(f"--{error.flagname}: no such flag{hint} (flags: {known})") from None
    except flags.IllegalFlagValueError as error:
        raise ValueError(re.sub(r"\('(.*)', '.*'\)$", r"\1", str(error))) from None  # a tuple that absl prints raw
    if positional:
        raise ValueError(f"{positional[0]}: only flags are allowed, as --name=value")
    for name in PATHS.intersection(values):
        value = values[name].value
        if isinstance(value, str):
            values[name].value = _expand(value)
        elif isinstance(value, list):
            values[name].value = [_expand(item) for item in value]
    return overrides


def _expand(path: str) -> str:
    """Return a path with its leading "~" replaced, which a shell does not do after `--name=`."""
    return os.path.expanduser(path)
