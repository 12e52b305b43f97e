"""What direct delivery spares the coordinator: its bytes and processor time a step, with 4 workers
and 8 ranks on one machine, beside delivery through the coordinator, in one run.

    make bench-direct
"""

import tempfile
import threading
import time
from pathlib import Path

import superbatch
from bench_rows import write_rows
from bench_timed import ENVIRONMENT, announce, ratio
from bench_turns import processor_seconds
from cluster import Cluster

WORKERS, RANKS, BATCH, STEPS = 4, 8, 1024, 12


def train(address: str, data: Path, delivery: str) -> superbatch.Run:
    """Takes every step with all ranks at once, as a trainer does."""
    client = superbatch.connect(address)
    phase = superbatch.Phase(policy="uniform", super_batch_size=2048, sub_batch_size=BATCH)
    spec = superbatch.RunSpec(
        run_id=delivery, sources=[data.as_uri()], phases=[phase], delivery=delivery
    )
    run = client.open_run(spec)

    def rank(number: int) -> None:
        batches = run.batches(rank=number, world_size=RANKS, start_step=0, end_step=STEPS)
        assert sum(len(batch["caption"]) for batch in batches) == STEPS * BATCH // RANKS

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(RANKS)]
    [thread.start() for thread in ranks]
    [thread.join() for thread in ranks]
    return run


def sent_bytes(process: int) -> int:
    """Bytes that a process has written, to sockets mostly. About as many rows come in."""
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def main() -> None:
    announce()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "data")
        with Cluster(folder, workers=WORKERS, environment=ENVIRONMENT) as cluster:
            process = cluster.coordinator.process.pid
            workers = [worker.process.pid for worker in cluster.workers]
            rows = []
            for delivery in ("coordinator", "direct"):
                begun, bytes_ = time.perf_counter(), sent_bytes(process)
                own, others = processor_seconds(process), processor_seconds(*workers)
                train(cluster.address, folder / "data", delivery)
                rows.append(
                    (
                        delivery,
                        (sent_bytes(process) - bytes_) / STEPS / 1e6,
                        (processor_seconds(process) - own) / STEPS * 1e3,
                        (processor_seconds(*workers) - others) / STEPS * 1e3,
                        (time.perf_counter() - begun) / STEPS,
                    )
                )
            fallbacks = cluster.coordinator.metric("superbatch_direct_fallbacks_total")
            assert fallbacks == 0, fallbacks
    print(
        f"{'delivery':14}{'coordinator sends: MB':>24}{'processor ms':>14}"
        f"{'workers: ms':>14}{'s':>8}"
    )
    for delivery, megabytes, own, others, seconds in rows:
        print(f"{delivery:14}{megabytes:24.1f}{own:14.0f}{others:14.0f}{seconds:8.2f}")
    (_, *through), (_, *direct) = rows
    of_through = [mine / other for mine, other in zip(direct, through, strict=True)]
    for what, value in zip(
        ("the coordinator's bytes", "the coordinator's processor time", "the workers'", "a step"),
        of_through,
        strict=True,
    ):
        ratio(f"Direct delivery: {what}, of that through it", value, lower_is_better=True)


if __name__ == "__main__":
    main()
