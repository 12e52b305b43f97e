"""The form of what Python reads: the protocol's messages as records, by their fields' names."""

import json
from pathlib import Path

import superbatch
from test_end_to_end import inputs, phase, service, spec, train  # noqa: F401

GOLDEN = Path(__file__).with_name("shown.json")


def form(value):
    """The names and types in a value, without what they hold."""
    if isinstance(value, dict):
        return {key: form(item) for key, item in value.items()}
    if isinstance(value, list):
        return [form(item) for item in value[:1]]
    return type(value).__name__


def differences(expected, found, at: str = "") -> list[str]:
    """Where `found` lacks or shows otherwise what is expected. It may have more fields."""
    if isinstance(expected, dict) and isinstance(found, dict):
        pairs = [(f"{at}.{key}", item, found.get(key)) for key, item in expected.items()]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [(f"{at}[{i}]", *both) for i, both in enumerate(zip(expected, found, strict=True))]
    else:
        return [] if expected == found else [f"{at} is {found}, not {expected}"]
    return [text for where, one, other in pairs for text in differences(one, other, where)]


def test_messages_keep_their_form(inputs, service):  # noqa: F811
    client = superbatch.connect(service.address)
    phases = [
        phase(policy="uniform"),
        phase(from_step=1, tuning=superbatch.Tuning(duplicates_above=0.9999)),
    ]
    run = client.open_run(spec(inputs, "shown", phases=phases))
    train(run, inputs, end=2)
    batch = run.select(1, rank=0, world_size=1)
    # From then on the next step waits for a push that is never made.
    run.select(2, rank=0, world_size=1)
    seen = {
        "spec": run.spec,
        "dataset": run.dataset,
        "info": run.get_run(),
        "listed": client.list_runs()[:1],
        "uniform": run.receipt(0),
        "drawn": run.receipt(1),
        "in the batch": batch.receipt,
    }
    assert differences(json.loads(GOLDEN.read_text()), form(seen)) == []
    # Set only if the trainer came before its step was ready.
    assert "trainer_wait_seconds" in seen["drawn"].summary
    assert (seen["spec"].phases[1].policy, seen["spec"].fallback) == ("joint", "wait")
    assert (seen["uniform"].summary.batch_score, seen["spec"].lag) == (None, {"exact": 1})
    assert set(seen["info"]) == {
        "summary", "spec", "dataset_manifest", "candidates_scanned", "examples_delivered",
        "consumed_through", "accounts", "learner", "failure", "tail_rows_per_epoch",
        "missing_pushes",
    }  # fmt: skip
