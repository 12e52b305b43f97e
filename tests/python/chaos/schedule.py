"""What happens when, as a function of the seed alone."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

WORLD_SIZES = (1, 2, 3)
#: How often each kind of event comes.
KINDS = {
    "kill_coordinator": 24,
    "kill_both_coordinators": 3,
    "kill_worker": 20,
    "kill_trainer": 20,
    "kill_rank": 9,
    "lose_pushes": 4,
    "takeover": 5,
    "pause": 9,
    "storm": 16,
}
KILLS = ("kill_coordinator", "kill_both_coordinators", "kill_worker", "kill_trainer", "kill_rank")
STORMS = ("refuse", "reset", "lose", "slow", "truncate")


@dataclass(frozen=True)
class Start:
    """How the trainer that comes next begins."""

    world_size: int
    #: Steps before the one that its checkpoint would go on with: the last save is older.
    back: int
    #: Each rank pushes its part of every tensor, as under FSDP; else rank 0 pushes them whole.
    sharded: bool
    #: Which coordinator it asks first.
    first: int


@dataclass(frozen=True)
class Event:
    """One thing that happens, `after` so many seconds since what was before it."""

    kind: str
    after: float
    #: How long a pause or a storm lasts, or a killed process stays away.
    seconds: float
    #: Which one of several processes, modulo their number.
    target: int
    #: Kind of storm, and the share of requests that it meets.
    storm: str
    share: float
    start: Start


@dataclass(frozen=True)
class Round:
    """Events that may fall together. After them the run has to make progress; then it is left in
    peace for `rest` seconds.
    """

    events: tuple[Event, ...]
    rest: float


def rounds(seed: int) -> Iterator[Round]:
    """Without end."""
    rng = random.Random(seed)
    while True:
        events = tuple(event(rng) for _ in range(rng.choice((1, 2, 3, 3))))
        yield Round(events, rest=rng.choice((0.0, rng.uniform(0.0, 1.0))))


def event(rng: random.Random) -> Event:
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    longest = {"pause": 5.0, "storm": 3.0, "takeover": 1.0}.get(kind, 1.5)
    return Event(
        kind=kind,
        after=rng.choice((0.0, rng.uniform(0.0, 0.4))),
        seconds=rng.choice((0.0, rng.uniform(0.0, longest)))
        if kind.startswith("kill")
        else rng.uniform(0.2, longest),
        target=rng.randrange(12),
        storm=rng.choice(STORMS),
        share=rng.uniform(0.2, 0.9),
        start=first_start(rng),
    )


def first_start(rng: random.Random) -> Start:
    return Start(
        world_size=rng.choice(WORLD_SIZES),
        back=rng.choice((0, 0, 1, 2)),
        sharded=rng.random() < 0.5,
        first=rng.randrange(2),
    )
