"""`SelectedBatches` in real loaders of torch, against the real binary: order, cursors, and where a
further loop begins.
"""

import pickle
from dataclasses import replace
from itertools import islice

import pytest
import superbatch
from client_run import Service, service  # noqa: F401  (a fixture)
from superbatch.torch import SelectedBatches
from torch.utils.data import DataLoader

STEPS = 7


def step_and_ids(batch: superbatch.Batch) -> tuple[int, list[str]]:
    return batch.step, batch["_superbatch_id"].to_pylist()


def step_of(batch: superbatch.Batch) -> int:
    return batch.step


def selected(service: Service, run_id: str, transform=step_of, **changes) -> SelectedBatches:
    settings = {"rank": 0, "world_size": 1, "start_step": 0, "end_step": STEPS, **changes}
    return SelectedBatches(
        service.address, service.spec(run_id, max_ahead=4), transform=transform, **settings
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_loader_yields_the_steps_in_order_with_what_was_chosen(service, workers):  # noqa: F811
    dataset = selected(service, f"order-{workers}", step_and_ids)
    batches = list(dataset.loader(num_workers=workers))
    assert [step for step, _ in batches] == list(range(STEPS))
    run = service.open(dataset.spec)
    for step, ids in batches:
        assert ids == run.select(step, rank=0, world_size=1)["_superbatch_id"].to_pylist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_ones_own_does_too(service, workers):  # noqa: F811
    dataset = selected(service, f"own-{workers}")
    factor = {"prefetch_factor": 1} if workers else {}
    assert list(DataLoader(dataset, batch_size=None, num_workers=workers, **factor)) == list(
        range(STEPS)
    )


def test_workers_can_be_spawned(service):  # noqa: F811
    loader = selected(service, "spawned", end_step=3).loader(
        num_workers=2, multiprocessing_context="spawn"
    )
    assert list(loader) == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_further_loop_goes_on_where_the_one_before_was_left(service, workers):  # noqa: F811
    dataset = selected(service, f"left-{workers}")
    loader = dataset.loader(num_workers=workers)
    assert list(islice(loader, 2)) == [0, 1]
    iter(loader)
    assert dataset.start_step == 2
    assert list(islice(loader, 3)) == [2, 3, 4]
    assert list(loader) == [5, 6]
    assert list(loader) == []


def test_steps_that_workers_hold_ready_are_not_consumed(service):  # noqa: F811
    dataset = selected(service, "held")
    run = service.open(dataset.spec)
    for step in dataset.loader(num_workers=2):
        # The trainer is working on this one.
        consumed = run.get_run().consumed_through
        assert consumed is None or consumed < step


def trained_with(batch: superbatch.Batch) -> tuple[int, str, int]:
    return batch.step, batch.receipt.mode, batch.receipt.learner.step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_pushes_beside_its_loader(service, workers):  # noqa: F811
    spec = replace(service.waiting_spec(f"pushes-{workers}"), max_ahead=4)
    dataset = SelectedBatches(
        service.address,
        spec,
        rank=0,
        world_size=1,
        start_step=0,
        end_step=STEPS,
        transform=trained_with,
    )
    run, seen = service.open(spec), []
    run.push_weights(service.weights(), step=-1)
    for step, mode, learner in dataset.loader(num_workers=workers):
        seen.append((step, mode, learner))
        run.push_weights(service.weights(), step=step)
    run.flush()
    # Lag exact(1), whatever the workers hold ready.
    assert seen == [(step, "normal", max(step - 2, -1)) for step in range(STEPS)]


def test_a_loader_of_ones_own_with_workers_is_not_replayed_in_silence(service):  # noqa: F811
    dataset = selected(service, "replayed")
    loader = DataLoader(dataset, batch_size=None, num_workers=2, prefetch_factor=1)
    assert list(islice(loader, 2)) == [0, 1]
    with pytest.raises(
        superbatch.InvalidArgument, match="start_step: .* set it to the step after the last one"
    ) as caught:
        next(iter(loader))
    assert pickle.loads(pickle.dumps(caught.value)).reason == "INVALID_ARGUMENT"
    dataset.start_step = 2
    assert list(loader) == [2, 3, 4, 5, 6]


def test_workers_that_live_on_are_refused(service):  # noqa: F811
    dataset = selected(service, "persistent")
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, prefetch_factor=1, persistent_workers=True
    )
    assert list(loader) == list(range(STEPS))
    dataset.start_step = 0
    with pytest.raises(superbatch.Error, match="persistent_workers"):
        next(iter(loader))
    with pytest.raises(
        superbatch.Error, match="persistent_workers: leave it out: workers begin anew"
    ):
        dataset.loader(num_workers=1, persistent_workers=True)


def test_options_that_say_what_a_loader_does_anyway_are_taken(service):  # noqa: F811
    loader = selected(service, "anyway", end_step=2).loader(
        batch_size=None, persistent_workers=False, in_order=True
    )
    assert list(loader) == [0, 1]
    with pytest.raises(superbatch.Error, match="batch_size: leave it out"):
        loader.dataset.loader(batch_size=8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_would_make_batches_of_batches_is_refused(service, workers):  # noqa: F811
    for batch_size in (1, 4):
        run = f"nested-{workers}-{batch_size}"
        dataset = selected(service, run, transform=None, end_step=2)
        with pytest.raises(superbatch.InvalidArgument, match="batch_size=None") as caught:
            next(iter(DataLoader(dataset, batch_size=batch_size, num_workers=workers)))
        assert caught.value.reason == "INVALID_ARGUMENT"
    # A `collate_fn` may mean it.
    meant = DataLoader(
        selected(service, f"nested-{workers}", end_step=2),
        batch_size=2,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        collate_fn=list,
    )
    assert list(meant) == [[0, 1]]


def fails_once(batch: superbatch.Batch) -> int:
    if batch.step == 2:
        raise ValueError("an image that cannot be decoded")
    return batch.step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_whose_transform_failed_is_not_passed_over(service, workers):  # noqa: F811
    dataset = selected(service, f"failed-{workers}", fails_once)
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(dataset.loader(num_workers=workers))
    dataset.transform = step_of
    assert list(dataset.loader(num_workers=workers)) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_keep_their_reason(service, workers):  # noqa: F811
    dataset = selected(service, f"errors-{workers}", world_size=3)
    with pytest.raises(superbatch.Error) as caught:
        list(dataset.loader(num_workers=workers))
    assert caught.value.reason == "WORLD_SIZE_INVALID"
    # torch hands over an error's class and text: what has no class of its own has its reason there.
    factor = {"prefetch_factor": 1} if workers else {}
    with pytest.raises(superbatch.Error, match="WORLD_SIZE_INVALID" if workers else None) as caught:
        list(DataLoader(dataset, batch_size=None, num_workers=workers, **factor))
    assert caught.value.reason == ("WORKER_FAILED" if workers else "WORLD_SIZE_INVALID")


def test_more_steps_held_ready_than_the_run_allows_are_refused(service):  # noqa: F811
    dataset = selected(service, "too-many", prefetch_factor=2)
    with pytest.raises(superbatch.Error, match="max_ahead >= 5"):
        list(dataset.loader(num_workers=2))


def test_a_data_set_that_was_pickled_goes_on(service):  # noqa: F811
    dataset = selected(service, "pickled")
    assert list(islice(dataset, 3)) == [0, 1, 2]
    assert list(pickle.loads(pickle.dumps(dataset))) == [3, 4, 5, 6]
