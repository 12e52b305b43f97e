"""Real `superbatch` processes for tests: a coordinator and workers, each with its own config, on
ports that the system chooses.
"""

import json
import os
import re
import subprocess
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

BINARY = Path(
    os.environ.get("SUPERBATCH_BINARY")
    or Path(__file__).parents[2] / "target" / "debug" / "superbatch"
)
# Ends what hangs. It says nothing of how long things take, and machines are busy.
DEADLINE_SECONDS = 180


class Process:
    """One server. Its log is shown when it does not come up, and lies in `folder` otherwise. It has
    addresses once it came up, which `is_awaited=False` leaves to the caller.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        command: str,
        config: dict,
        environment: dict | None = None,
        is_awaited: bool = True,
        binary: Path = BINARY,
    ):
        self.has_page = command == "serve" and bool(config.get("page_listen"))
        folder.mkdir(parents=True, exist_ok=True)
        path, self.log = folder / f"{name}.yaml", folder / f"{name}.log"
        path.write_text(json.dumps(config))
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [binary, command, "--config", path],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        if is_awaited:
            self.come_up()

    def come_up(self) -> None:
        self.address = self.said()
        self.metrics_address = self.said()
        self.page_address = self.said() if self.has_page else None

    def said(self) -> str:
        line = self.process.stdout.readline()
        address = re.search(r"https?://\S+", line)
        assert address, f"it did not come up ({line!r}):\n{self.log.read_text()[-3000:]}"
        return address.group()

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all series of `name` that have these labels."""
        text = urllib.request.urlopen(self.metrics_address, timeout=10).read().decode()
        lines = [line for line in text.splitlines() if re.match(rf"{name}(\{{.*\}})? ", line)]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if all(label in line for label in wanted)
        )

    def wait_for(
        self, what: str, reached, seconds: float = DEADLINE_SECONDS, **labels: str
    ) -> None:
        """Waits until `reached` holds of metric `what`."""
        until = monotonic() + seconds
        while not reached(self.metric(what, **labels)):
            assert monotonic() < until, f"{what} is {self.metric(what, **labels)}"
            sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if not self.process.stdout.closed:
            self.process.stdout.close()


class Cluster(ExitStack):
    """A coordinator on `state`, with its embedded worker or with `workers` of their own. What is
    started from now on is of the build `binary`.
    """

    def __init__(
        self,
        folder: Path,
        workers: int = 0,
        state: str | None = None,
        environment: dict | None = None,
        binary: Path = BINARY,
    ):
        super().__init__()
        self.folder, self.embedded, self.environment = folder, workers == 0, environment
        self.binary = binary
        self.state = state or (folder / "state").as_uri()
        self.coordinator = self.start_coordinator()
        try:
            # All of them start at once.
            self.workers = [
                self.start_worker(f"worker-{number}", is_awaited=False) for number in range(workers)
            ]
            for worker in self.workers:
                worker.come_up()
            if workers:
                self.coordinator.wait_for("superbatch_workers", lambda count: count == workers)
        except BaseException:
            self.close()
            raise

    def start_coordinator(self, name: str = "coordinator") -> Process:
        self.coordinator = Process(
            self.folder,
            name,
            "serve",
            {
                "listen": "127.0.0.1:0",
                "metrics_listen": "127.0.0.1:0",
                "page_listen": "127.0.0.1:0",
                "state": self.state,
                "coordinator": {"workers_embedded": self.embedded},
            },
            self.environment,
            binary=self.binary,
        )
        self.callback(self.coordinator.stop)
        return self.coordinator

    def start_worker(self, name: str, is_awaited: bool = True) -> Process:
        worker = Process(
            self.folder,
            name,
            "worker",
            {
                "state": self.state,
                "worker": {"threads": 1},
                "worker_role": {
                    "coordinator": self.coordinator.address,
                    "listen": "127.0.0.1:0",
                    "metrics_listen": "127.0.0.1:0",
                },
            },
            self.environment,
            is_awaited,
            self.binary,
        )
        self.callback(worker.stop)
        return worker

    @property
    def address(self) -> str:
        return self.coordinator.address
