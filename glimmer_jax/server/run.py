"""Runs the application under uvicorn: warm-up beside `/healthz`, and a stop that drains."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from glimmer_jax.server.app import Server

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.05


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises ValueError where the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on accepted connections. Otherwise an answer's
    # last packet waits some 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Before it listens, another server may bind the same address.
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(
            f"HOST={host!r}, PORT={port}: the address cannot be bound ({error}). Choose a free port, "
            "or an address of this machine."
        ) from None
    return listener


def run(
    server: Server,
    listener: socket.socket,
    warm_up: Callable[[], None],
    stop_requested: Callable[[], bool],
    drain_timeout: float,
) -> None:
    """Serves until a stop is requested and the requests under way are answered.

    Args:
      server: the routes.
      listener: from `bind`.
      warm_up: compiles the programs; `/readyz` answers 503 until it returns.
      stop_requested: is polled; from its first True, new questions get 503.
      drain_timeout: seconds that requests under way are given to finish.

    Raises whatever `warm_up` raises.
    """
    config = uvicorn.Config(
        server.app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    with server.batcher:
        asyncio.run(
            _serve(_Uvicorn(config), server, listener, warm_up, stop_requested, drain_timeout)
        )


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers: the caller knows when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    web: uvicorn.Server,
    server: Server,
    listener: socket.socket,
    warm_up: Callable[[], None],
    stop_requested: Callable[[], bool],
    drain_timeout: float,
) -> None:
    serving = asyncio.ensure_future(web.serve(sockets=[listener]))
    warming = _Background(warm_up)
    host, port = listener.getsockname()[:2]
    logger.info(
        "Listening on http://%s:%d; warming up.", f"[{host}]" if ":" in host else host, port
    )
    try:
        while not serving.done() and not stop_requested():
            if warming.finished() and not server.ready:
                server.ready = True
                logger.info("Ready.")
            await asyncio.sleep(_POLL_SECONDS)
        server.stopping = True
        deadline = time.monotonic() + drain_timeout
        while not (server.idle and warming.finished()) and time.monotonic() < deadline:
            stop_requested()  # The stop signal counts a job that polls as alive.
            await asyncio.sleep(_POLL_SECONDS)
        logger.info("Stopped%s.", "" if server.idle else " with requests under way")
    finally:
        web.should_exit = True
        await serving


class _Background:
    """A function on a daemon thread, which does not hold up the end of the process."""

    def __init__(self, function: Callable[[], None]):
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised by `finished`
            self._error = error

    def finished(self) -> bool:
        """Whether the function has returned; raises what it raised."""
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True
