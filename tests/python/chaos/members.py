"""Servers that are killed and come back at the same address, as a deployment's do."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import superbatch
from cluster import BINARY, DEADLINE_SECONDS

#: How a process ends that cannot go on for want of storage, and says so.
REFUSED = 1


def reserved_port() -> tuple[socket.socket, int]:
    """A port that nobody else is given while the socket is open. Servers can listen there, and do
    again after they were killed.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, held.getsockname()[1]


class Member:
    """One `superbatch` process at a time, of one role. All of them write to one log."""

    def __init__(self, folder: Path, name: str, command: str, config: dict, environment: dict):
        self.name, self.command = name, command
        self.held, self.port = reserved_port()
        self.config, self.log = folder / f"{name}.yaml", folder / f"{name}.log"
        if command == "serve":
            config = {**config, "listen": f"127.0.0.1:{self.port}"}
        self.config.write_text(json.dumps(config))
        self.environment = {**os.environ, **environment}
        self.process: subprocess.Popen | None = None
        self.back_at = 0.0
        #: Ends that no kill brought about, as exit codes.
        self.ended: list[int] = []
        self.starts = 0
        self.paused = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [BINARY, self.command, "--config", self.config],
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        self.starts += 1

    def kill(self, away: float) -> None:
        """Ends it at once. It comes back after so many seconds."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.paused, self.back_at = False, monotonic() + away

    def pause(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)
            self.paused = True

    def resume(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
        self.paused = False

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def attend(self) -> None:
        """Starts it if it should run and does not."""
        if self.process is not None and (code := self.process.poll()) is not None:
            self.ended.append(code)
            self.process, self.paused = None, False
        if self.process is None and monotonic() >= self.back_at:
            self.start()

    def faults(self) -> list[str]:
        """What a process did that none should do, whatever is done to it."""
        found = [
            f"{self.name} ended by itself with code {code}"
            for code in self.ended
            if code != REFUSED
        ]
        said = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return found + [f"{self.name}: {line}" for line in said if "panicked at" in line]

    def stop(self) -> None:
        self.kill(0.0)
        self.held.close()


def coordinator(workers_embedded: bool) -> dict:
    """The config of every coordinator here, so that all compute alike."""
    return {
        "metrics_listen": None,
        "page_listen": None,
        "worker": {"threads": 1},
        "coordinator": {
            "workers_embedded": workers_embedded,
            "lease_seconds": 3.0,
            "snapshots_kept": 4,
        },
    }


@contextmanager
def alone(folder: Path, state: str, environment: dict) -> Iterator[superbatch.Client]:
    """A client of a coordinator that nothing happens to."""
    folder.mkdir(exist_ok=True)
    config = {**coordinator(workers_embedded=True), "state": state}
    member = Member(folder, "coordinator", "serve", config, environment)
    try:
        member.start()
        until = monotonic() + DEADLINE_SECONDS
        while True:
            try:
                client = superbatch.connect(member.address)
                break
            except superbatch.Unavailable:
                assert monotonic() < until and member.process.poll() is None, member.log.read_text()
                sleep(0.05)
        yield client
    finally:
        member.stop()
