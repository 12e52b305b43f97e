"""A trainer that is killed while pushes are on their way, and the one that resumes after it."""

import subprocess
import sys

from client_run import Service, service  # noqa: F401  (a fixture)
from pausable import way_to
from test_client_waiting import python_environment
from test_loader_ahead import scored_spec

KILLED_AFTER = 6

#: Trains through step 6. Its pushes after steps 5 and 6 go by a way on which they are held up.
TRAINER = """
import sys
from pathlib import Path
import superbatch
from client_run import Service
from test_loader_ahead import scored_spec

service = Service(sys.argv[1], Path(sys.argv[2]))
run = service.open(scored_spec(service, "killed"))
held_up = superbatch.connect(sys.argv[3]).open_run(scored_spec(service, "killed"))
for step in range(7):
    run.select(step, rank=0, world_size=1)
    if step < 5:
        run.push_weights(service.weights(), step=step)
        run.flush()
    else:
        held_up.push_weights(service.weights(), step=step)
print("pushed", flush=True)
sys.stdin.read()
"""


def test_a_trainer_that_resumes_repeats_the_pushes_that_were_lost(service):  # noqa: F811
    with way_to(service.address, limit=1 << 15) as way:
        command = [sys.executable, "-c", TRAINER, service.address, service.inputs, way.address]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=python_environment(),
        )
        try:
            assert child.stdout.readline() == "pushed\n"
            assert way.holds.wait(60)
        finally:
            child.kill()
            child.wait()
    run = service.open(scored_spec(service, "killed"))
    assert run.next_step == KILLED_AFTER + 1
    assert run.missing_pushes(run.next_step) == [5, 6]
    assert run.get_run().missing_pushes == [5, 6]
    for step in run.missing_pushes(run.next_step):
        run.push_weights(service.weights(), step=step)
    run.flush()
    assert run.missing_pushes(run.next_step) == []
    learners = [run.select(step, rank=0, world_size=1).receipt.learner for step in (7, 8)]
    assert [learner.step for learner in learners] == [5, 6]
    # That the weights of step 5 are those of the checkpoint can be seen.
    assert learners[0].digest == learners[1].digest
