"""A caller that is refused again and again is told to wait, and fills no disk."""

import pytest
import superbatch
from secured import Secured, authority, folder, service, wait_until

#: Refusals in a minute that are told with their cause, and the calls that are tried.
TOLD, TRIED = 20, 24


def heard(client: superbatch.Client, call) -> list[str]:
    """The reasons of so many calls, each sent once."""
    reasons = []
    for _ in range(TRIED):
        with pytest.raises(superbatch.Error) as caught:
            call(client)
        reasons.append(caught.value.reason)
    return reasons


def limited(cause: str) -> list[str]:
    return [cause] * TOLD + ["OVERLOADED"] * (TRIED - TOLD)


def refusals(service: Secured, reason: str) -> float:
    name = f'superbatch_access_refused_total{{reason="{reason}"}} '
    lines = service.metrics("admin").splitlines()
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_refusals_are_limited_by_caller(service):
    def noted(who: str | None) -> list[dict]:
        lines = [line for line in service.audited() if line["what"] == "denied"]
        return [line for line in lines if line["who"] == who]

    def client(token: str) -> superbatch.Client:
        return service.connect(token, retry_attempts=1)

    unknown, trainer, reader = client("sbt_" + "0" * 64), client("trainer"), client("reader")
    assert heard(unknown, lambda client: client.list_runs()) == limited("UNAUTHENTICATED")
    # A valid token passes from the same address, and is counted apart.
    assert trainer.list_runs() == []
    asks = heard(trainer, lambda client: client.get_run("team-b-1"))
    assert asks == limited("PERMISSION_DENIED")
    with pytest.raises(superbatch.Error) as caught:
        reader.close_run("team-a-1")
    assert (caught.value.reason, caught.value.metadata["scope"]) == ("PERMISSION_DENIED", "open")
    assert trainer.list_runs() == [], "what it may do, it does"
    assert refusals(service, "UNAUTHENTICATED") == TRIED
    assert refusals(service, "PERMISSION_DENIED") == TRIED + 1
    # Lines are written in the order of the calls, the reader's last.
    wait_until(lambda: noted("reader"))
    assert [line["reason"] for line in noted("reader")] == ["PERMISSION_DENIED"]
    for who, run in ((None, None), ("trainer", "team-b-1")):
        lines = noted(who)
        assert len(lines) == TOLD + 1 and {line["run"] for line in lines} == {run}, who
        assert [line.get("detail") for line in lines][-2:] == [None, {"limited": True}]
