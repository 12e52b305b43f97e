"""A run in the middle of it all: makes events happen, and waits until the run goes on."""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

from s3_store import BUCKET, Store, credentials, remote

from . import schedule
from .members import Member, coordinator
from .rank import Place
from .schedule import Event, Start
from .trainer import Trainer
from .weather import Weather

#: How long the run may take to go on after an event. It goes on within seconds; a loaded machine
#: gets its time.
DEADLINE_SECONDS = 120
TICK_SECONDS = 0.02
CALM_STEPS = 8
RUN = "chaos"
#: A storage that does not answer is given up soon, and asked again.
STORAGE = {
    "options": {"timeout": "3s", "connect_timeout": "2s"},
    "stall_timeout_seconds": 3.0,
}


class Failed(AssertionError):
    """The run did not go on, or not as it should."""


class Chaos(ExitStack):
    """Two coordinators on one state, one with two workers of their own and one with an embedded
    one; a trainer; an S3 server behind weather.
    """

    def __init__(self, folder: Path, inputs: Path, seed: int) -> None:
        super().__init__()
        self.folder, self.inputs, self.seed = folder, inputs, seed
        self.began = monotonic()
        #: What happened: (seconds since the beginning, what).
        self.happened: list[tuple[float, str]] = []
        self.recoveries: list[float] = []
        self.kills = 0
        self.counts: dict[str, int] = {}
        #: What is to happen at a time, such as the end of a pause.
        self.timers: list[tuple[float, object]] = []
        self.trainers: list[Trainer] = []
        self.stragglers: list[Trainer] = []
        self.store = Store()
        self.callback(self.store.stop)
        self.store.upload(inputs)
        self.weather = Weather(self.store.port)
        self.callback(self.weather.stop)
        self.spec = remote(RUN, need_deadline_seconds=20.0, stall_grace_seconds=2.0)
        self.coordinators, self.workers = [], []
        for number in range(2):
            config = coordinator(workers_embedded=number == 1)
            self.coordinators.append(self.member(f"coordinator-{number}", "serve", config))
        for number in range(2):
            config = {
                "worker": {"threads": 1},
                "worker_role": {
                    "coordinator": self.coordinators[0].address,
                    "listen": "127.0.0.1:0",
                },
            }
            self.workers.append(self.member(f"worker-{number}", "worker", config))

    def member(self, name: str, command: str, config: dict) -> Member:
        state = {"state": f"s3://{BUCKET}/state", "storage": STORAGE}
        member = Member(
            self.folder, name, command, {**config, **state}, credentials(self.weather.port)
        )
        self.callback(member.stop)
        member.start()
        return member

    @property
    def members(self) -> list[Member]:
        return self.coordinators + self.workers

    @property
    def trainer(self) -> Trainer:
        return self.trainers[-1]

    def say(self, what: str) -> None:
        at = monotonic() - self.began
        self.happened.append((at, what))
        with (self.folder / "events.log").open("a") as file:
            file.write(f"{at:9.3f} {what}\n")

    # Time

    def attend(self) -> None:
        """What is due: pauses end, processes come back."""
        now = monotonic()
        due = [act for at, act in self.timers if at <= now]
        self.timers = [(at, act) for at, act in self.timers if at > now]
        for act in due:
            act()
        for member in self.members:
            member.attend()

    def after(self, seconds: float, act) -> None:
        self.timers.append((monotonic() + seconds, act))

    def let_go(self, seconds: float) -> None:
        """Lets everything run for so long: what the schedule says, not a wait for a state."""
        until = monotonic() + seconds
        while monotonic() < until:
            self.attend()
            sleep(TICK_SECONDS)

    def wait(self, what: str, reached, seconds: float = DEADLINE_SECONDS) -> float:
        """Waits until `reached`, and returns how long that took."""
        began = monotonic()
        while not reached():
            self.attend()
            self.check()
            if monotonic() > began + seconds:
                raise Failed(f"waited {seconds:.0f} s, and still not: {what}")
            sleep(TICK_SECONDS)
        return monotonic() - began

    def check(self) -> None:
        faults = [line for member in self.members if member.ended for line in member.faults()]
        faults += self.trainer.faults(is_current=True)
        faults += [line for one in self.stragglers for line in one.faults(is_current=False)]
        if faults:
            raise Failed("; ".join(faults))

    # The trainer

    def checkpoint(self) -> int:
        """The step that a trainer goes on with that lost nothing."""
        return 1 + max((one.completed() for one in self.trainers), default=-1)

    def start_trainer(self, start: Start) -> None:
        number = len(self.trainers)
        addresses = [member.address for member in self.coordinators]
        addresses = addresses[start.first :] + addresses[: start.first]
        following = max(0, self.checkpoint() - start.back)
        places = [
            Place(
                spec=self.spec,
                addresses=tuple(addresses),
                incarnation=f"trainer-{number}",
                rank=rank,
                world_size=start.world_size,
                start_step=following,
                sharded=start.sharded,
                weights=str(self.inputs / "learner" / "model.safetensors"),
                log=str(self.folder / f"trainer-{number:03}-rank-{rank}.jsonl"),
                end=str(self.folder / "end"),
                training=0.03,
            )
            for rank in range(start.world_size)
        ]
        kind = "sharded" if start.sharded else "whole"
        self.say(
            f"trainer {number}: {start.world_size} ranks, from step {following}, {kind} pushes"
        )
        self.trainers.append(Trainer(self.folder, number, places))
        self.callback(self.trainers[-1].kill)

    def replace_trainer(self, start: Start, killed=None) -> None:
        """Starts the trainer anew. Its ranks that were not killed go on for a while."""
        old = self.trainer
        # One that no coordinator knows would come as the newer of the two.
        killed = killed if old.has_begun() else None
        old.kill(killed)
        if len(old.killed) < len(old.places):
            self.stragglers.append(old)
        self.start_trainer(start)

    def reap(self) -> None:
        for old in self.stragglers:
            old.resume()
            old.kill()
        self.stragglers = []

    # State, as the store holds it

    def keys(self, folder: str) -> list[str]:
        prefix = f"state/runs/{RUN}/{folder}/"
        return [key.removeprefix(prefix) for key in self.store.keys(prefix)]

    def owner(self) -> Member:
        """The coordinator that owns the run; the first one while there is none."""
        epochs = [int(key.removesuffix(".json")) for key in self.keys("owner")]
        if not epochs:
            return self.coordinators[0]
        key = f"state/runs/{RUN}/owner/{max(epochs)}.json"
        fact = self.store.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        address = json.loads(fact)["address"]
        return next(one for one in self.coordinators if one.address == address)

    def has_lost_two(self) -> bool:
        """Whether rank 0's newest two pushes are on their way."""
        newest = max((line["step"] for line in self.trainer.lines("batch")[0]), default=-1)
        published = set(self.keys("pushes"))
        return newest >= 1 and not {f"0/{newest}.json", f"0/{newest - 1}.json"} & published

    # The whole

    def run(self, kills: int | None, seconds: float | None) -> None:
        """Until so many processes are killed or so much time is over, then in peace to an end."""
        rounds = schedule.rounds(self.seed)
        self.start_trainer(Start(world_size=2, back=0, sharded=False, first=0))
        self.wait("a first step", lambda: self.trainer.completed() >= 0)
        while (kills is None or self.kills < kills) and (
            seconds is None or monotonic() < self.began + seconds
        ):
            self.round(next(rounds))
        self.end()

    def round(self, one: schedule.Round) -> None:
        self.reap()
        for event in one.events:
            self.let_go(event.after)
            self.counts[event.kind] = self.counts.get(event.kind, 0) + 1
            self.kills += event.kind in schedule.KILLS
            getattr(self, event.kind)(event)
        known = self.checkpoint()
        took = self.wait("a further step", lambda: self.trainer.completed() >= known)
        self.recoveries.append(took)
        self.say(f"step {self.trainer.completed()} after {took:.2f} s")
        self.let_go(one.rest)

    def end(self) -> None:
        """Peace: everything that was begun ends, and the run has to get further."""
        self.reap()
        self.weather.calm()
        for _, act in self.timers:
            act()
        self.timers = []
        end = self.folder / "end"
        (self.folder / "end.new").write_text(str(self.checkpoint() + CALM_STEPS))
        (self.folder / "end.new").rename(end)
        self.say(f"peace, until step {end.read_text()}")
        self.wait("the trainer's end", self.trainer.is_done)

    # Events

    def kill_coordinator(self, event: Event) -> None:
        member = self.owner() if event.target % 3 else self.coordinators[event.target % 2]
        self.say(f"kill {member.name}, for {event.seconds:.2f} s")
        member.kill(event.seconds)

    def kill_both_coordinators(self, event: Event) -> None:
        self.say(f"kill both coordinators, for {event.seconds:.2f} s")
        for member in self.coordinators:
            member.kill(event.seconds)

    def kill_worker(self, event: Event) -> None:
        member = self.workers[event.target % len(self.workers)]
        self.say(f"kill {member.name}, for {event.seconds:.2f} s")
        member.kill(event.seconds)

    def kill_trainer(self, event: Event) -> None:
        self.say("kill the trainer")
        self.replace_trainer(event.start)

    def kill_rank(self, event: Event) -> None:
        """The launcher starts the trainer anew, and has not ended the ranks that are left."""
        rank = event.target % len(self.trainer.places)
        self.say(f"kill rank {rank} of the trainer")
        self.replace_trainer(event.start, {rank})

    def lose_pushes(self, event: Event) -> None:
        """A crash of trainer and coordinator with two pushes on their way."""
        self.weather.refused = re.compile(rf"^PUT .*/runs/{RUN}/snapshots/")
        self.wait("two pushes on their way", self.has_lost_two)
        self.say("kill the trainer and the owner, with two pushes on their way")
        self.trainer.kill()
        self.owner().kill(event.seconds)
        self.weather.refused = None
        self.replace_trainer(event.start)

    def takeover(self, event: Event) -> None:
        """The owner is paused, another coordinator takes the run over, and the owner wakes with
        calls in hand of ranks that were replaced.
        """
        owner = self.owner()
        if owner.process is None:
            return
        heir = next(one for one in self.coordinators if one is not owner)
        self.wait(f"{heir.name} listens", heir.listens)
        self.say(f"pause {owner.name}; its run goes to {heir.name}")
        owner.pause()
        first = self.coordinators.index(heir)
        start = Start(**{**vars(event.start), "first": first})
        self.replace_trainer(start, set())
        known = self.checkpoint() - start.back
        self.wait("a step of the new owner", lambda: self.trainer.completed() >= known)
        self.let_go(event.seconds)
        self.say(f"wake {owner.name}")
        owner.resume()

    def pause(self, event: Event) -> None:
        paused = [*self.members, self.trainer][event.target % (len(self.members) + 1)]
        self.say(f"pause {getattr(paused, 'name', 'the trainer')}, for {event.seconds:.2f} s")
        paused.pause()
        self.after(event.seconds, paused.resume)

    def storm(self, event: Event) -> None:
        self.say(f"storm ({event.storm}, {event.share:.2f}), for {event.seconds:.2f} s")
        self.weather.begin(event.storm, event.share, self.seed)
        self.after(event.seconds, self.weather.calm)
