"""examples/slurm: both scripts through shellcheck, and run whole, with the real service and
trainer, where srun starts the tasks itself.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from chaos.members import reserved_port
from cluster import BINARY
from recipe import EXAMPLES, Recipes, recipes  # noqa: F401  (a fixture)

SCRIPTS = sorted((EXAMPLES / "slurm").glob("*.sbatch"))
# What of Slurm the scripts need: as many tasks as the job has, with their numbers, on this machine.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task "$@" & done
trap 'kill $(jobs -p) 2>/dev/null' TERM
wait
wait
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2 $3" == "show hostnames $SLURM_JOB_NODELIST" ]] && echo "$SLURM_JOB_NODELIST"
"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_clean(path):
    assert [found.name for found in SCRIPTS] == ["serve.sbatch", "train.sbatch"]
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "--shell=bash", path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job, and a folder first on the path with srun and scontrol."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SHARED": str(tmp_path / "shared"),
        "ADDRESS_OF": "echo 127.0.0.1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


@pytest.fixture
def port() -> Iterator[int]:
    """A port that stays reserved, as does the one 1,000 above it: serve.sbatch takes both."""
    with ExitStack() as stack:
        while True:
            held, port = reserved_port()
            stack.enter_context(held)
            metrics = stack.enter_context(socket.socket())
            metrics.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                metrics.bind(("127.0.0.1", port + 1000))
            except (OSError, OverflowError):
                continue
            yield port
            return


def test_an_address_where_nobody_listens_is_not_gone_to(slurm, port, tmp_path):
    """The fixture holds the port and does not listen: a connection is refused, as after a job."""
    address = tmp_path / "shared" / "address"
    address.parent.mkdir()
    for left_behind in (None, f"http://127.0.0.1:{port} 6.0\n"):
        if left_behind:
            address.write_text(left_behind)
        done = subprocess.run(
            [EXAMPLES / "slurm" / "train.sbatch", "train.py"],
            capture_output=True,
            text=True,
            env={**slurm, "SLURM_NTASKS": "1", "WAIT_SECONDS": "0", "PYTHON": "false"},
        )
        assert done.returncode == 1 and "no service within 0 s" in done.stderr
        assert (left_behind.split()[0] if left_behind else "no address") in done.stderr


def test_a_service_of_two_tasks_serves_a_trainer_of_two_ranks(recipes, slurm, port, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "address").write_text("http://127.0.0.1:1 6.0\n")
    serve = subprocess.Popen(
        [EXAMPLES / "slurm" / "serve.sbatch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **slurm,
            "SLURM_NTASKS": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "SUPERBATCH": str(BINARY),
            "PORT": str(port),
            "ALLOW_URIS": f"[{recipes.inputs.as_uri()}]",
        },
    )
    try:
        lines = []
        while not any("worker" in line and "http://" in line for line in lines):
            lines.append(serve.stdout.readline())
            assert lines[-1], "".join(lines)
        arguments = recipes.arguments("slurm", steps=2, checkpoints=tmp_path / "checkpoints")[2:]
        done = subprocess.run(
            [EXAMPLES / "slurm" / "train.sbatch", EXAMPLES / "pytorch" / "train.py", *arguments],
            capture_output=True,
            text=True,
            env={
                **slurm,
                "SLURM_NTASKS": "1",
                "RANKS_PER_NODE": "2",
                "PYTHON": sys.executable,
                "RENDEZVOUS_PORT": "0",
            },
        )
        assert done.returncode == 0, done.stderr[-6000:]
        assert "step 1 loss" in done.stdout
    finally:
        serve.terminate()
        serve.communicate(timeout=60)
