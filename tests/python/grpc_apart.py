"""grpcio in processes of its own. One process runs all tests, and a fault in grpcio's C core would
end it or corrupt its memory.

A `Channel` starts this file as a program and tells it what to call: each request is a pickle on the
program's standard input, and each answer a pickle on its standard output.
"""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cluster import DEADLINE_SECONDS

PYTHON = [sys.executable, "-X", "faulthandler"]
Metadata = Sequence[tuple[str, str | bytes]]


class Refused(Exception):
    """A call that failed: name and number of its status, its text, and its trailing metadata."""

    def __init__(self, code: str, number: int, details: str, metadata: Metadata):
        super().__init__(f"{code}: {details}")
        self.code, self.number, self.details, self.metadata = code, number, details, metadata


class Channel:
    """Speaks TLS if it has the certificate of an authority, `ca`."""

    def __init__(self, address: str, ca: bytes | None = None, options: Metadata = ()):
        self.process = subprocess.Popen(
            [*PYTHON, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.ask(address.split("://")[-1], ca, options)

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        try:
            self.process.communicate(timeout=DEADLINE_SECONDS)
        finally:
            self.process.kill()

    def ask(self, *asked):
        try:
            pickle.dump(asked, self.process.stdin)
            self.process.stdin.flush()
            answer, error = pickle.load(self.process.stdout)
        except (BrokenPipeError, EOFError):
            ended = self.process.wait(DEADLINE_SECONDS)
            raise RuntimeError(f"grpcio's process ended with {ended}; see its errors") from None
        if error:
            raise Refused(*error)
        return answer

    def call(
        self,
        method: str,
        requests: list[bytes],
        kind: str = "unary_unary",
        read: Callable = bytes,
        metadata: Metadata = (),
        timeout: float = DEADLINE_SECONDS,
    ):
        """The answer, or a `Stream` of answers if `kind` ends so. `read` decodes them."""
        settings = {"metadata": list(metadata), "timeout": timeout}
        answer = self.ask("call", kind, method, requests, settings)
        return Stream(self, answer, read) if kind.endswith("stream") else read(answer)


class Stream(Iterator):
    def __init__(self, channel: Channel, number: int, read: Callable):
        self.channel, self.number, self.read = channel, number, read

    def __next__(self):
        message = self.channel.ask("next", self.number)
        if message is None:
            raise StopIteration
        return self.read(message)

    def cancel(self) -> None:
        self.channel.ask("cancel", self.number)


def printed(script: str, *arguments: str):
    """What a script of this folder prints, which is JSON."""
    done = subprocess.run(
        [*PYTHON, Path(__file__).with_name(script), *arguments],
        stdout=subprocess.PIPE,
        check=True,
        timeout=DEADLINE_SECONDS,
    )
    return json.loads(done.stdout)


def main() -> None:
    import grpc

    def told(answer, error=None) -> None:
        pickle.dump((answer, error), sys.stdout.buffer)
        sys.stdout.buffer.flush()

    address, ca, options = pickle.load(sys.stdin.buffer)
    if ca:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca), options)
    else:
        channel = grpc.insecure_channel(address, options)
    streams = []

    def call(kind: str, method: str, requests: list[bytes], settings: dict):
        sent = iter(requests) if kind.startswith("stream") else requests[0]
        answer = getattr(channel, kind)(method)(sent, **settings)
        if not kind.endswith("stream"):
            return answer
        streams.append(answer)
        return len(streams) - 1

    does = {
        "call": call,
        "next": lambda number: next(streams[number], None),
        "cancel": lambda number: streams[number].cancel(),
    }
    told(None)
    while True:
        try:
            name, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            told(does[name](*arguments))
        except grpc.RpcError as error:
            code, metadata = error.code(), error.trailing_metadata() or ()
            pairs = [tuple(pair) for pair in metadata]
            told(None, (code.name, code.value[0], error.details(), pairs))
    channel.close()


if __name__ == "__main__":
    main()
