"""A way to a server on which a test can stop what the client sends."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

PIECE_BYTES = 1 << 14


class Way:
    """Passes on what both ends send. Once `limit` bytes of one connection have gone up, it holds
    the rest until `open`.
    """

    def __init__(self, server: str, limit: int) -> None:
        target = urlsplit(server)
        self.server, self.limit = (target.hostname, target.port), limit
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        #: Set when something is held.
        self.holds = threading.Event()
        #: Set to let everything pass.
        self.open = threading.Event()
        self.ends: list[socket.socket] = []
        self.is_closed = False
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.server)
            self.ends += [near, far]
            threading.Thread(target=self.pass_on, args=(near, far, self.limit), daemon=True).start()
            threading.Thread(target=self.pass_on, args=(far, near, None), daemon=True).start()

    def pass_on(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        passed = 0
        try:
            while piece := source.recv(PIECE_BYTES):
                passed += len(piece)
                if limit is not None and passed > limit:
                    self.holds.set()
                    self.open.wait()
                    if self.is_closed:
                        return
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        """Ends all connections. What is held never arrives."""
        self.is_closed = True
        for end in [self.listener, *self.ends]:
            with suppress(OSError):
                # Wakes a thread that waits there, as `close` alone does not.
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.open.set()


@contextmanager
def way_to(server: str, limit: int) -> Iterator[Way]:
    way = Way(server, limit)
    try:
        yield way
    finally:
        way.close()
