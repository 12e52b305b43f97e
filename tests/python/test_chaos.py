"""A short `make chaos`, and what it rests on: schedules that their seed decides, and a comparison
that finds what differs.
"""

from itertools import islice

from chaos import compare, schedule
from chaos.compare import Slice
from chaos.verdict import run

#: Under it 12 kills see every kind of event and every storm.
SEED, KILLS = 4325, 12


def test_kills_pauses_and_storms_change_no_batch_and_no_receipt(tmp_path):
    verdict = run(tmp_path, SEED, kills=KILLS, seconds=None)
    assert verdict.is_good, str(verdict)
    # The seed decides which events come. What they meet, such as pushes on their way or a request
    # to storage, is a matter of time.
    assert verdict.figures["kills"] >= KILLS, str(verdict)
    assert set(verdict.figures["events"]) == set(schedule.KINDS), str(verdict)
    assert verdict.figures["owners"] > 1, str(verdict)
    assert verdict.figures["batches compared"] > 20, str(verdict)


def test_a_schedule_is_its_seeds():
    one, same, other = (list(islice(schedule.rounds(seed), 200)) for seed in (1, 1, 2))
    assert one == same != other
    events = [event for part in one for event in part.events]
    assert {event.kind for event in events} == set(schedule.KINDS)
    assert {event.storm for event in events} == set(schedule.STORMS)
    assert {event.start.world_size for event in events} == set(schedule.WORLD_SIZES)


def receipt(**changes) -> dict:
    cost = dict.fromkeys(compare.COSTS, 1) | {"seconds": changes.pop("seconds", 0)}
    learner = {"version": changes.pop("version", 3), "step": 1, "digest": "d"}
    chosen = [{"id": "a#0", "score": changes.pop("score", 0.5)}]
    summary = {"mode": "normal", "writer_nonce": "n", "learner": learner, "cost": cost, **changes}
    return {"summary": summary, "chosen": chosen}


def test_a_receipt_that_differs_is_found_and_times_are_none_of_it():
    def found(**changes) -> list[str]:
        pair = compare.essence(receipt()), compare.essence(receipt(**changes))
        return compare.differences(*pair, "receipt")

    assert not found(writer_nonce="m", committed_unix_ms=5, seconds=9, version=4)
    assert found(mode="stale") == ["receipt.summary.mode: 'stale' instead of 'normal'"]
    assert found(score=0.25) == ["receipt.chosen[0].score: 0.25 instead of 0.5"]
    assert compare.differences([1, 2], [1], "rows") == ["rows: [1] instead of [1, 2]"]


def test_a_batch_of_other_bytes_or_of_another_decision_is_found():
    batch = {"world_size": 2, "step": 3, "rank": 1, "digest": "d", "nonce": "n"}
    calm, nonces = {Slice(2, 3, 1): "d"}, {3: "n"}
    assert compare.of_batches([batch], calm, nonces) == []
    other = [{**batch, "digest": "e"}, {**batch, "nonce": "m"}]
    assert compare.of_batches(other, calm, nonces) == [
        "step 3, rank 1 of 2: other bytes than the undisturbed run's",
        "step 3, rank 1 of 2: served from a decision that is not its step's receipt",
    ]
