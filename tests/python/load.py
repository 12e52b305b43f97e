"""`make load RUNS=64 RANKS=16 RATE=200 SECONDS=20`: a service under many ranks that ask for ready
steps, on loopback: how long answers take, how many there are, and what they cost in memory and
processor time.
"""

import json
import os
import resource
import subprocess
import tempfile
from pathlib import Path

from bench_turns import processor_seconds
from cluster import Cluster
from soak import resident_mb

from examples.demo import tiny

LOAD = Path(os.environ.get("SUPERBATCH_LOAD", "target/release/examples/load"))


def main() -> None:
    runs, ranks = int(os.environ.get("RUNS") or 64), int(os.environ.get("RANKS") or 16)
    rate, seconds = os.environ.get("RATE") or "200", os.environ.get("SECONDS") or "20"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    environment = {"SUPERBATCH_COORDINATOR__MAX_RUNS": str(runs)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tiny.write_dataset(folder / "pool", rows=1_024)
        with Cluster(folder / "cluster", environment=environment) as cluster:
            pid = cluster.coordinator.process.pid
            idle = resident_mb(pid)
            source = (folder / "pool").as_uri()
            print(f"{runs} runs of {ranks} ranks, a connection each; {idle:.0f} MB before")
            command = [LOAD, cluster.address, source, str(runs), str(ranks), rate, seconds]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
                before = processor_seconds(pid)
                for line in load.stdout:
                    found, now = json.loads(line), processor_seconds(pid)
                    print(
                        f"{found['name']:22} {found['requests_per_second']:9.0f} requests/s   "
                        f"p50 {found['p50_ms']:7.2f} ms   p99 {found['p99_ms']:7.2f} ms   "
                        f"max {found['max_ms']:7.1f} ms   {resident_mb(pid):.0f} MB   "
                        f"{1e3 * (now - before) / found['requests']:.2f} processor ms a request"
                    )
                    before = now
            assert load.returncode == 0


if __name__ == "__main__":
    main()
