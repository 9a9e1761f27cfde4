"""The listening socket."""

import asyncio
import socket

import pytest

from glimmer_jax.server import run


def test_accepted_connections_send_small_packets_at_once():
    async def accepted_no_delay() -> int:
        accepted = asyncio.get_running_loop().create_future()

        def connected(reader, writer):
            sock = writer.get_extra_info("socket")
            accepted.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = run.bind("127.0.0.1", 0)
        server = await asyncio.start_server(connected, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname())
            no_delay = await asyncio.wait_for(accepted, 10)
            writer.close()
        return no_delay

    assert asyncio.run(accepted_no_delay())


def test_an_address_in_use_is_rejected():
    with run.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"HOST='127.0.0.1', PORT={port}"):
            run.bind("127.0.0.1", port)
