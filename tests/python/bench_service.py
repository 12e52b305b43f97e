"""What the service's two large data paths cost beside other ways to move the same bytes, as ratios
of one run.

    make bench-service              # BF16=0 leaves the push of 0.8 GB out, which takes 16 GB

`Rows` go from Parquet to a trainer (bench_rows.py); `weights` go from a trainer to durable
snapshots (bench_weights.py). Processor time is of all processes that take part. Every figure is the
best of several taken in turns.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from bench_peers import Tonic, flights, grpcio
from bench_rows import bench_rows
from bench_timed import ENVIRONMENT, announce
from bench_weights import (
    LARGER,
    LARGER_BYTES,
    available_bytes,
    bench_first_slice,
    bench_pushes,
)
from cluster import Cluster


def main() -> None:
    announce()
    with tempfile.TemporaryDirectory() as name, Tonic() as tonic, grpcio() as plain:
        folder = Path(name)
        with Cluster(folder / "service", environment=ENVIRONMENT) as cluster:
            with flights() as flight:
                bench_rows(folder, cluster, tonic, plain, flight)
            bench_pushes(folder, cluster, tonic, plain)
        for workers in (0, 2):
            bench_first_slice(folder, workers)
        if os.environ.get("BF16") == "0" or available_bytes() < LARGER_BYTES:
            print("SKIPPED: the push of 0.8 GB in bf16 (BF16=0, or less than 16 GB of memory)")
            return
        with Cluster(folder / "larger", environment=ENVIRONMENT) as cluster:
            bench_pushes(folder, cluster, tonic, plain, LARGER, torch.bfloat16, rounds=3)


if __name__ == "__main__":
    sys.exit(main())
