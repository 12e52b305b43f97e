"""A way to a server on which a test can stop what the client sends."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.server)
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
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@contextmanager
def way_to(server: str, limit: int) -> Iterator[Way]:
    way = Way(server, limit)
    try:
        yield way
    finally:
        way.open.set()
        way.listener.close()
