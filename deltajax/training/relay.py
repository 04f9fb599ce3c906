"""A relay between a process's JAX client and the coordination service of the first process.

JAX's client aborts its process as soon as its connection to the service breaks. A connection through
the relay stays open when the far end is gone, so that `attendance` has the time to say who is gone.
"""

import contextlib
import os
import socket
import threading
from typing import Any

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # which gRPC would ask even for this host


def start(host: str, port: int) -> str:
    """Relay connections to a service, which may start later, until this process ends.

    Returns:
      The address to connect to instead, of this host.
    """
    server = socket.create_server(("127.0.0.1", 0))
    _in_background(_accept, server, (host, port))
    if any(os.environ.get(name) for name in PROXIES):
        for name in ("no_proxy", "no_grpc_proxy")[: 1 + ("no_grpc_proxy" in os.environ)]:
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    return f"127.0.0.1:{server.getsockname()[1]}"


def _accept(server: socket.socket, service: tuple[str, int]) -> None:
    while True:
        near, _ = server.accept()
        try:
            far = socket.create_connection(service, timeout=5)
        except OSError:  # the service has not started; the client tries again
            near.close()
            continue
        far.settimeout(None)
        for connection in (near, far):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _in_background(_send_to_service, near, far)
        _in_background(_send_on, far, near)


def _send_to_service(near: socket.socket, far: socket.socket) -> None:
    """Send on what comes until the client closes its connection, which the service learns."""
    with near, far:
        _send_on(near, far)
        with contextlib.suppress(OSError):
            while near.recv(2**16):  # the service is gone
                pass
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)


def _send_on(source: socket.socket, target: socket.socket) -> None:
    """Send on what comes until either end is gone."""
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)


def _in_background(f: Any, *arguments: Any) -> None:
    threading.Thread(target=f, args=arguments, daemon=True).start()
