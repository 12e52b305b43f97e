"""Trainers that fetch batches ahead, by a connection of its own, while they push weights by
another: no step that waits for a push which was called for is taken for stalled, however late the
push arrives. `stall_grace_seconds=0` leaves no room for luck.
"""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import superbatch
from client_run import Service, in_next, service  # noqa: F401  (a fixture)
from pausable import way_to
from superbatch import _weights
from superbatch.torch import SelectedBatches

STEPS = 9


def step_and_mode(batch: superbatch.Batch) -> tuple[int, str, int | None]:
    """What a step was decided with; a degraded one without a learner."""
    learner = batch.receipt.learner
    return batch.step, batch.receipt.mode, learner and learner.step


def scored_spec(service: Service, run_id: str, **changes) -> superbatch.RunSpec:  # noqa: F811
    spec = service.waiting_spec(run_id)
    learner = replace(spec.learner, first_push=None, random_seed=7)
    return replace(spec, learner=learner, max_ahead=4, stall_grace_seconds=0.0, **changes)


def one_ahead(batches: Iterable) -> Iterator:
    """As accelerate and Lightning iterate: the next batch is fetched before this one is trained
    on.
    """
    batches = iter(batches)
    held = next(batches)
    for following in batches:
        yield held
        held = following
    yield held


def selected(service: Service, spec: superbatch.RunSpec, rank=0, world_size=1, **changes):
    settings = {
        "rank": rank,
        "world_size": world_size,
        "start_step": 0,
        "end_step": STEPS,
        "need_after": 0.0,
        **changes,
    }
    return SelectedBatches(service.address, spec, transform=step_and_mode, **settings)


def train(
    service: Service, spec: superbatch.RunSpec, loop, workers=0, rank=0, world_size=1
) -> list:  # noqa: F811
    run, seen = service.open(spec), []
    for step, mode, learner in loop(
        selected(service, spec, rank, world_size).loader(num_workers=workers)
    ):
        seen.append((step, mode, learner))
        if rank == 0:
            run.push_weights(service.weights(), step=step)
    run.flush()
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "lag", [superbatch.exact(1), superbatch.at_most(1)], ids=["exact", "at_most"]
)
def test_a_loop_that_fetches_one_batch_ahead_is_not_stalled(service, lag, workers):  # noqa: F811
    kind = "exact" if lag.exact is not None else "at-most"
    spec = scored_spec(service, f"ahead-{workers}-{kind}", lag=lag)
    seen = train(service, spec, one_ahead, workers)
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert {mode for _, mode, _ in seen} == {"normal"}


def test_workers_that_ask_while_the_trainer_holds_the_step_before_are_not_stalled(service):
    seen = train(service, scored_spec(service, "exact-0", lag=superbatch.exact(0)), iter, workers=2)
    assert [(step, learner) for step, _, learner in seen] == [
        (step, step - 1) for step in range(STEPS)
    ]


def test_two_ranks_of_which_one_pushes_are_not_stalled(service):  # noqa: F811
    spec = scored_spec(service, "two-ranks")
    with ThreadPoolExecutor() as threads:
        ranks = [threads.submit(train, service, spec, one_ahead, 0, rank, 2) for rank in range(2)]
        first, second = (rank.result(120) for rank in ranks)
    assert first == second
    assert [learner for _, _, learner in first] == [-1, -1, *range(STEPS - 2)]


def next_in_thread(
    service: Service, spec: superbatch.RunSpec, step: int, threads: ThreadPoolExecutor
):  # noqa: F811
    """A step that another connection waits for."""
    waiting, begun = {}, threading.Event()

    def fetch() -> superbatch.Batch:
        batches = service.open(spec).batches(rank=0, world_size=1, start_step=step, prefetch=0)
        waiting["thread"] = threading.get_ident()
        begun.set()
        return next(batches)

    fetched = threads.submit(fetch)
    begun.wait()
    if not fetched.done():
        in_next(waiting["thread"])
    return fetched


def test_a_push_whose_upload_is_held_up_is_waited_for(service):  # noqa: F811
    spec = scored_spec(service, "held-up")
    consumer = service.open(spec)
    assert [consumer.select(step, rank=0, world_size=1).step for step in range(2)] == [0, 1]
    with way_to(service.address, limit=1 << 15) as way, ThreadPoolExecutor() as threads:
        pusher = superbatch.connect(way.address).open_run(spec)
        pusher.push_weights(service.weights(), step=0)
        assert way.holds.wait(60)
        fetched = next_in_thread(service, spec, 2, threads)
        way.open.set()
        assert fetched.result(60).receipt.learner.step == 0
        pusher.flush()


def test_a_push_that_is_called_and_not_begun_is_waited_for(service):  # noqa: F811
    spec = scored_spec(service, "called")
    run = service.open(spec)
    assert [run.select(step, rank=0, world_size=1).step for step in range(2)] == [0, 1]
    slot = run._run.reserve_push(0, 0).wait()
    with ThreadPoolExecutor() as threads:
        fetched = next_in_thread(service, spec, 2, threads)
        blocks, _ = _weights.blocks(service.weights(), 0)
        _weights.add(slot, blocks, None)
        slot.submit(None, 0, None)
        assert fetched.result(60).receipt.learner.step == 0


def test_a_push_that_is_given_up_is_waited_for_no_longer(service):  # noqa: F811
    spec = scored_spec(service, "given-up")
    run = service.open(spec)
    assert [run.select(step, rank=0, world_size=1).step for step in range(2)] == [0, 1]
    slot = run._run.reserve_push(0, 0).wait()
    with ThreadPoolExecutor() as threads:
        fetched = next_in_thread(service, spec, 2, threads)
        del slot
        with pytest.raises(superbatch.Error) as caught:
            fetched.result(30)
    assert caught.value.reason == "WEIGHTS_MISSING"


def test_a_true_stall_is_told(service):  # noqa: F811
    spec = scored_spec(service, "stalled", need_deadline_seconds=600.0)
    with pytest.raises(superbatch.Error) as caught:
        list(selected(service, replace(spec, stall_grace_seconds=0.2)).loader())
    assert caught.value.reason == "WEIGHTS_MISSING"
    assert "step 2 is scored with the weights pushed after step 0" in str(caught.value)
    assert "every rank has waited for 0.2 s" in str(caught.value)


def test_a_loop_that_can_never_push_in_time_is_told_which_lag_it_needs(service):  # noqa: F811
    spec = scored_spec(service, "never", lag=superbatch.exact(0), need_deadline_seconds=600.0)
    with pytest.raises(superbatch.Error) as caught:
        train(service, spec, one_ahead)
    assert caught.value.reason == "WEIGHTS_MISSING"
    assert "before it has trained on step 0" in str(caught.value) and "exact(1)" in str(
        caught.value
    )


def test_a_fallback_of_a_stall_applies_after_the_grace(service):  # noqa: F811
    spec = scored_spec(service, "fallback", fallback="uniform", need_deadline_seconds=600.0)
    modes = [mode for _, mode, _ in selected(service, spec, end_step=4).loader()]
    assert modes == ["normal", "normal", "uniform", "uniform"]
