"""A link to a server that delays what is asked and counts what is answered."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

_CHUNK = 1 << 16


@dataclass
class Link:
    """`url` leads to the server. `requests` and `received` (bytes of answers) count all connections."""

    url: str = ""
    requests: int = 0
    received: int = 0


@contextmanager
def slow_link(server: str, delay_s: float) -> Iterator[Link]:
    """A link to the HTTP server at this URL, on a free loopback port, that forwards each request `delay_s` later."""
    target, link = urlsplit(server), Link()
    loop, started = asyncio.new_event_loop(), threading.Event()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_request: bool) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(_CHUNK):
                if is_request:
                    link.requests += data.startswith((b"GET ", b"HEAD "))
                    await asyncio.sleep(delay_s)
                else:
                    link.received += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(target.hostname, target.port)
        await asyncio.gather(forward(reader, back, True), forward(there, writer, False))

    async def serve() -> None:
        listening = await asyncio.start_server(connect, "127.0.0.1", 0)
        link.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        started.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, name="slow-link", daemon=True)
    thread.start()
    started.wait()
    try:
        yield link
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
