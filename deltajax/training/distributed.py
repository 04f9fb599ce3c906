"""Several processes of one run: how they find each other, and what only the first of them does.

JAX's distributed runtime connects them. It aborts the process, traceback and all, when one does not come, and tells nobody which;
so before it starts, every process answers a roll call at the coordinator's address (`attendance`).
"""

import atexit
import functools
import itertools
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed as runtime  # its barriers with a time-out have no public name
from jax._src.clusters import ClusterEnv  # the only way to ask for what a cluster says before connecting
from jax.experimental import multihost_utils

from deltajax.errors import RunError
from deltajax.training import attendance, relay

VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
MESSAGE_BYTES = 4096  # of what one process tells the others
ENDING_SECONDS = 10.0  # that JAX's runtime has to end after a run that is complete
MEETING_SECONDS = 3600  # that a process which has compiled a program waits for the others


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, timeout: int = 300
) -> bool:
    """Connect the processes of this run; without settings and outside a cluster this is the only one.

    Each setting comes from the argument, else from the environment (`VARIABLES`), else from the cluster (TPU pod, GKE,
    SLURM, Open MPI), as JAX detects it.

    Args:
      coordinator: host:port of process 0; any free port.
      num_processes: in all.
      process_id: of this one, from 0.
      timeout: seconds to wait for the others.

    Returns:
      Whether there are several.

    Raises:
      ValueError: a setting is missing or out of range.
      RunError: not all processes came; the message names those that did not.
    """
    settings: dict[str, Any] = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for name, variable in VARIABLES.items():
        if settings[name] is None and os.environ.get(variable):
            settings[name] = os.environ[variable]
    if all(value is None for value in settings.values()):
        detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
        settings = dict(zip(settings, detected[:3], strict=True))
    if all(value is None for value in settings.values()) or settings["num_processes"] in (1, "1"):
        return False
    for name, value in settings.items():
        if value is None:
            raise ValueError(f"--{name} (or {VARIABLES[name]}) is missing; the others are given")
    count, index = (_integer(name, settings[name]) for name in ("num_processes", "process_id"))
    if count < 1:
        raise ValueError(f"--num_processes must be >= 1, got {count}")
    if not 0 <= index < count:
        raise ValueError(f"--process_id must be in [0, {count}), got {index}")
    host, _, port = str(settings["coordinator"]).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator must be host:port, got {settings['coordinator']!r}")
    if index == 0:
        present = attendance.call_the_roll(int(port), count, timeout)
        address = f"{host}:{port}"
    else:
        present = attendance.answer_the_roll(host, int(port), index, count, timeout)
        address = relay.start(host, int(port))
    attendance.current = present
    present.start()
    atexit.register(attendance.leave_at_exit)  # before JAX's own function, which waits for the others
    jax.distributed.initialize(address, count, index, initialization_timeout=timeout)
    return True


def _integer(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"--{name} must be an integer, got {value!r}") from None


def finish() -> None:
    """Wait until all processes of this run have done their part, then end JAX's runtime; a single process does nothing."""
    if attendance.current is None:
        return
    attendance.leave(0)
    # Nobody watches from here on, and JAX would wait for minutes for a process that is killed now.
    end = threading.Timer(ENDING_SECONDS, attendance.end, (0,))
    end.daemon = True
    end.start()
    jax.distributed.shutdown()
    end.cancel()


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def on_first(f: Callable[[], Any]) -> Any:
    """What `f` returns (JSON) on the first process, on all of them; what it raises there, all raise.

    Raises:
      ValueError, RunError: as f.
    """
    if jax.process_count() == 1:
        return f()
    failure, message = None, {}
    if is_first():
        try:
            message = {"result": f()}
        except Exception as error:
            failure = error
            message = {"error": str(error)[:1000], "usage": isinstance(error, ValueError)}
    answer = json.loads(multihost_utils.broadcast_one_to_all(_padded(json.dumps(message))).tobytes())
    if failure is not None:
        raise failure
    if "error" in answer:
        raise (ValueError if answer["usage"] else RunError)(answer["error"])
    return answer["result"]


def first_problem(problem: str | None) -> str | None:
    """The problem of any process, on all of them: the first one's that has one."""
    if jax.process_count() == 1:
        return problem
    return next((f"{p} (process {index})" for index, p in enumerate(everyones(problem)) if p is not None), None)


def everyones(value: Any) -> list[Any]:
    """What each process gives (JSON, of at most `MESSAGE_BYTES`), by its index, on all of them."""
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(_padded(json.dumps(value)))]


def compiled_together(f: Any) -> Any:
    """A `jax.jit` function that several processes run for the first time only when all have compiled it.

    One that compiles longer than others would be missed: Gloo's first collective of a group waits for 30 s.
    """
    if jax.process_count() == 1:
        return f
    met = False

    @functools.wraps(f)
    def meet_first(*arguments):
        nonlocal met
        if not met:
            f.lower(*arguments).compile()
            assert runtime.global_state.client is not None
            runtime.global_state.client.wait_at_barrier(f"deltajax_compiled_{next(_meetings)}", MEETING_SECONDS * 1000)
            met = True
        return f(*arguments)

    return meet_first


_meetings = itertools.count()  # every process compiles the same programs in the same order


def _padded(text: str) -> np.ndarray:
    return np.frombuffer(text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES), np.uint8)
