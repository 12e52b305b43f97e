"""A disk that is full, or becomes read-only, holds a run until it is well again. Nothing of it
differs then, and nothing is left that was half written.
"""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep

import pytest
import superbatch
from cluster import DEADLINE_SECONDS, Cluster
from test_end_to_end import (  # noqa: F401
    choices,
    inputs,
    spec,
    train,
)

#: libfiu, which makes calls of the C library fail on command.
FAULTS = next(Path("/usr/lib").glob("**/fiu/fiu_run_preload.so"), None)
STEPS = 24
#: Time for all steps of a run, some of which are written again after a growing pause.
TRAINING_SECONDS = 180
FULL = "No space left on device"
READ_ONLY = "Read-only file system"


class Disk:
    """A file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remount(self, options: str) -> None:
        """Read-only it can be only at a moment at which no file is open for writing."""
        command = ["mount", "-o", f"remount,{options}", self.folder]
        until = monotonic() + DEADLINE_SECONDS
        while (ended := subprocess.run(command, capture_output=True, text=True)).returncode:
            assert monotonic() < until, ended.stderr
            sleep(0.02)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    """One mebibyte: room for some ten steps."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def wait_for(cluster: Cluster, told: str) -> None:
    """Waits until the coordinator has met this when it wrote a receipt."""
    until = monotonic() + DEADLINE_SECONDS
    log = cluster.coordinator.log
    while not any(
        told in line and "the receipt is written again" in line
        for line in log.read_text().splitlines()
    ):
        assert monotonic() < until, log.read_text()[-3000:]
        sleep(0.02)


def test_a_full_disk_and_a_read_only_one_hold_a_run_and_change_nothing(inputs, disk, tmp_path):
    asked = spec(inputs, "held")
    with Cluster(tmp_path / "well") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        ids, chosen = train(run, inputs, end=STEPS), choices(run, STEPS)
    with Cluster(tmp_path / "ill", state=(disk.folder / "state").as_uri()) as cluster:
        with ThreadPoolExecutor() as threads:
            run = superbatch.connect(cluster.address).open_run(asked)
            training = threads.submit(train, run, inputs, end=STEPS)
            wait_for(cluster, FULL)
            disk.remount("size=64m")
            first = training.result(TRAINING_SECONDS)
            # Ahead of the trainer, steps are decided only up to `max_ahead`.
            disk.remount("ro")
            training = threads.submit(train, run, inputs, start=STEPS, end=STEPS + 8)
            wait_for(cluster, READ_ONLY)
            disk.remount("rw")
            assert len(training.result(TRAINING_SECONDS)) == 8
        assert first == ids
        assert choices(run, STEPS) == chosen
    unfinished = [path for path in disk.folder.rglob("*") if "#" in path.name]
    assert not unfinished


def test_a_disk_that_cannot_flush_holds_a_run_and_changes_nothing(inputs, tmp_path):
    """Until fsync succeeds nothing counts as written: a power cut could still take it back."""
    if FAULTS is None:
        pytest.skip("NOT TESTED: errors of fsync (apt-get install fiu-utils)")
    pipes = str(tmp_path / "faults")
    preload = f"{FAULTS} {FAULTS.with_name('fiu_posix_preload.so')}"
    environment = {"LD_PRELOAD": preload, "FIU_CTRL_FIFO": pipes}
    asked = spec(inputs, "held")
    with Cluster(tmp_path / "well") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        ids, chosen = train(run, inputs, end=STEPS), choices(run, STEPS)

    def command(cluster: Cluster, *what: str) -> None:
        process = cluster.coordinator.process.pid
        subprocess.run(["fiu-ctrl", "-f", pipes, *what, str(process)], check=True)

    with Cluster(tmp_path / "ill", environment=environment) as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        first = train(run, inputs, end=STEPS // 2)
        command(cluster, "-c", "enable name=posix/io/sync/fsync,failinfo=5")
        with ThreadPoolExecutor() as threads:
            training = threads.submit(train, run, inputs, start=STEPS // 2, end=STEPS)
            wait_for(cluster, "Input/output error")
            command(cluster, "-c", "disable name=posix/io/sync/fsync")
            assert first + training.result(TRAINING_SECONDS) == ids
        assert choices(run, STEPS) == chosen
