"""Several processes of one run: how they find each other, and what only the first of them does.

JAX's distributed runtime connects them. It aborts the process, traceback and all, when one does not come, and tells nobody which;
so before it starts, every process answers a roll call at the coordinator's address.
"""

import contextlib
import functools
import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed as runtime  # its barriers with a time-out have no public name
from jax._src.clusters import ClusterEnv  # the only way to ask for what a cluster says before connecting
from jax.experimental import multihost_utils

from deltajax.errors import RunError

VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
ROLL = "deltajax roll call: "  # before what process 0 answers
MESSAGE_BYTES = 4096  # of what one process tells the others
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
        _call_the_roll(int(port), count, timeout)
    else:
        _answer_the_roll(host, int(port), index, count, timeout)
    jax.distributed.initialize(f"{host}:{port}", count, index, initialization_timeout=timeout)
    return True


def _integer(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"--{name} must be an integer, got {value!r}") from None


def _call_the_roll(port: int, count: int, timeout: int) -> None:
    """Process 0: wait until every other one has come, and tell them all whether to go on."""
    deadline = time.monotonic() + timeout
    came: dict[int, tuple[socket.socket, str]] = {}
    greeted, verdict = [], ""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise RunError(f"--coordinator: port {port} cannot be used on this host ({error.strerror})") from None
    with server, contextlib.ExitStack() as connections:
        while len(came) < count - 1 and not verdict:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, (host, *_) = server.accept()
            except TimeoutError:
                break
            connections.enter_context(connection)
            connection.settimeout(5)
            try:
                index, theirs = map(int, connection.makefile().readline().split())
            except (OSError, ValueError):  # someone else knocked
                continue
            greeted.append(connection)
            if theirs != count:
                verdict = f"--num_processes is {count} on process 0 and {theirs} on process {index} ({host})"
            elif index in came and not _is_closed(came[index][0]):
                verdict = f"--process_id={index} was given to two processes ({came[index][1]} and {host})"
            came[index] = (connection, host)
        missing = sorted(set(range(1, count)) - set(came))
        if missing and not verdict:
            there = ", ".join(f"{index} on {host}" for index, (_, host) in sorted(came.items())) or "none"
            absent = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing))} of {count}"
            verdict = f"{absent} did not come within {timeout} s (came, besides 0: {there})"
        for connection in greeted:
            with contextlib.suppress(OSError):  # it has died since; then JAX will miss it
                connection.sendall(f"{ROLL}{verdict}\n".encode())
    if verdict:
        raise RunError(verdict)


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side has gone, perhaps to be started again."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _answer_the_roll(host: str, port: int, index: int, count: int, timeout: int) -> None:
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise RunError(f"process 0 of --coordinator={host}:{port} did not come within {timeout} s")
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(f"{index} {count}\n".encode())
                connection.settimeout(timeout + 10)
                verdict = connection.makefile(errors="replace").readline()
        except socket.gaierror as error:
            raise RunError(f"--coordinator={host}:{port}: no such host ({error.strerror})") from None
        except OSError:
            verdict = ""
        if verdict:
            break
        time.sleep(min(0.2, max(left, 0)))  # process 0 is not there yet
    if not verdict.startswith(ROLL):
        raise RunError(f"--coordinator={host}:{port}: what answers there is not process 0 of this run")
    if verdict.removeprefix(ROLL).strip():
        raise RunError(verdict.removeprefix(ROLL).strip())


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
