"""A way to the S3 server that behaves as object storage does on a bad day."""

import random
import re
import threading
from collections import Counter
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_PIECES = 4
#: The longest wait before a piece of a slow answer: now and then longer than an attempt may take.
SLOW_SECONDS = 0.6


class Weather(ThreadingHTTPServer):
    """Passes requests on. In a storm it does to a share of them, by its kind:

    refuse: answers 503 and passes nothing on. reset: ends the connection instead.
    lose: passes the request on and loses the answer: the connection ends, or a 500 comes.
    slow: sends the answer in pieces with waits. truncate: ends the connection in mid-answer.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        self.store_port = port
        self.lock = threading.Lock()
        self.storm: tuple[str, float, random.Random] | None = None
        #: Requests that match, as "PUT /path", are refused, whatever the storm.
        self.refused: re.Pattern | None = None
        #: What was done to requests so far.
        self.done: Counter = Counter()
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), Request)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def begin(self, kind: str, share: float, seed: int) -> None:
        with self.lock:
            self.storm = (kind, share, random.Random(seed))

    def calm(self) -> None:
        with self.lock:
            self.storm = None

    def fault(self, command: str, path: str) -> str | None:
        """What to do to this request."""
        with self.lock:
            refused = self.refused
            fault = None
            if refused and refused.search(f"{command} {path}"):
                fault = "refuse"
            elif self.storm:
                kind, share, rng = self.storm
                fault = kind if rng.random() < share else None
            self.done[fault or "passed"] += 1
            return fault

    def drawn(self) -> float:
        with self.lock:
            return self.storm[2].random() if self.storm else 0.0

    def handle_error(self, request, client_address) -> None:
        """Clients are killed in the middle of their requests: that is no error here."""

    def stop(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, self.path)
        try:
            if fault == "reset":
                self.close_connection = True
            elif fault == "refuse":
                self.fail(503)
            else:
                self.answer(fault, *self.upstream(body))
        except (ConnectionError, HTTPException):
            # Whoever asked has gone, or the store ends with the test.
            self.close_connection = True

    def upstream(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection("127.0.0.1", self.server.store_port)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def fail(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, fault: str | None, answer: HTTPResponse, content: bytes) -> None:
        if fault == "lose":
            if self.server.drawn() < 0.5:
                self.fail(500)
            self.close_connection = True
            return
        self.send_response(answer.status)
        # A HEAD's length is the object's; nothing follows it.
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else len(content)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault == "truncate" and content:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif fault == "slow":
            self.trickle(content)
        else:
            self.wfile.write(content)

    def trickle(self, content: bytes) -> None:
        step = max(1, -(-len(content) // SLOW_PIECES))
        for start in range(0, max(1, len(content)), step):
            self.wfile.flush()
            # The fault itself: a store that answers slowly, until the weather ends.
            self.server.ended.wait(self.server.drawn() * SLOW_SECONDS)
            self.wfile.write(content[start : start + step])

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

    def log_message(self, *_) -> None:
        pass
