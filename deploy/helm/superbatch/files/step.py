"""Opens a run on one data set, takes its first step, checks it, and closes the run. Needs no model:
the policy is uniform.
"""

import os
import sys
import uuid

import superbatch

rows = int(os.environ["SUPERBATCH_TEST_ROWS"])
# The certificates and the token are those of the environment: SUPERBATCH_CA, _CERT, _KEY, _TOKEN.
client = superbatch.connect(os.environ["SUPERBATCH_URI"])
run = client.open_run(
    superbatch.RunSpec(
        run_id=f"{os.environ['SUPERBATCH_TEST_RUN']}-{uuid.uuid4().hex[:8]}",
        sources=[os.environ["SUPERBATCH_TEST_SOURCE"]],
        phases=[superbatch.Phase(policy="uniform", super_batch_size=rows, sub_batch_size=rows)],
    )
)
try:
    batch = next(run.batches(rank=0, world_size=1, start_step=0, end_step=1))
    print(f"{batch!r} of {run.dataset.dataset_rows} rows, policy {batch.receipt.policy}")
    if len(batch) != rows:
        sys.exit(f"the step has {len(batch)} rows, not {rows}")
finally:
    run.close()
