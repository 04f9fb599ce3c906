"""What the loop watches besides its steps: whether somebody asks it to stop, whether data come."""

import contextlib
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

STALL_SECONDS = 60.0  # without a batch until the first warning, and between warnings


class Patience:
    """Says so on every process whose data stall, again and again, and goes on waiting."""

    def __init__(self, step: int):
        self._step, self._waited, self._over = step, 0.0, False

    def __enter__(self):
        self._arm()

    def __exit__(self, *_):
        self._over = True  # for a timer that has just gone off
        self._timer.cancel()

    def _arm(self) -> None:
        self._timer = threading.Timer(STALL_SECONDS, self._complain)
        self._timer.daemon = True
        self._timer.start()

    def _complain(self) -> None:
        if self._over:
            return
        self._waited += STALL_SECONDS
        report_stall(jax.process_index(), self._step, self._waited)
        self._arm()


def report_stall(process: int, step: int, seconds: float) -> None:
    """Warn that a process waits for a batch."""
    print(
        f"warning: process {process} has waited {seconds:.0f} s for the batch of step {step + 1}; data loading is stalled",
        file=sys.stderr,
        flush=True,
    )


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request to stop; a second SIGINT or SIGTERM interrupts at once.

    A terminal that closes often sends SIGHUP twice; nohup has it ignored. Of several processes, the
    one that got SIGTERM tells the others through JAX's preemption service, which has the handler.
    """

    def __init__(self):
        self._signal: signal.Signals | None = None
        self._shared = jax.process_count() > 1

    def asked(self, step: int) -> str | None:
        """What asks to stop after this step, or None; the same on every process. To be called once after each step."""
        if self._shared:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return None if self._signal is None else self._signal.name

    def __enter__(self):
        numbers = [] if self._shared else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {s: signal.signal(s, self._handle) for s in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self._shared:
            signal.raise_signal(signal.SIGTERM)
            return
        if self._signal is not None:
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        with contextlib.suppress(OSError):  # no `print`, which may be what was interrupted
            os.write(1, b"stopping after this step; once more to stop at once\n")
