"""`superbatch top`, of live services."""

import re

import superbatch
from cluster import Cluster
from commands import fails, prints
from secured import authority, folder, service  # noqa: F401
from test_end_to_end import inputs, phase, spec, train

#: Stages that only workers measure, and those of a coordinator.
OF_WORKERS, OF_COORDINATOR = {"fetch", "decode"}, {"plan", "commit"}


def top(*arguments: object) -> str:
    return prints("top", "--once", "--every", "50ms", *arguments)


def stages(view: str) -> set[str]:
    return set(re.findall(r"^(\w+) +[\d.]+ s/s", view, re.MULTILINE))


def test_a_service_with_workers_of_its_own_is_watched(inputs, tmp_path):
    with Cluster(tmp_path, workers=2) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "watched"))
        train(run, inputs)
        coordinator = ("--address", cluster.address, "--metrics")
        coordinator += (cluster.coordinator.metrics_address,)
        alone = top(*coordinator)
        assert alone.startswith("workers 2 ")
        assert re.search(r"^watched +open +0 +\d+ ", alone, re.MULTILINE), alone
        assert OF_COORDINATOR <= stages(alone) and not OF_WORKERS & stages(alone)
        pages = [option for one in cluster.workers for option in ("--metrics", one.metrics_address)]
        whole = top(*coordinator, *pages)
        assert OF_COORDINATOR | OF_WORKERS <= stages(whole) and "not shown" not in whole
        # A worker that has gone is told of, and the rest is shown.
        gone = cluster.workers[0]
        gone.stop()
        shown = top(*coordinator, *pages)
        assert f"not shown: cannot read {gone.metrics_address}" in shown
        assert OF_WORKERS <= stages(shown)


def test_a_service_whose_metrics_need_a_token_is_watched(inputs, service):
    tokens = {}
    for name in ("admin", "reader"):
        tokens[name] = service.folder / f"{name}.token"
        tokens[name].write_text(service.secrets[name] + "\n")
    uniform = [phase(policy="uniform", n_chunks=1)]
    asked = spec(inputs, "team-a-top", phases=uniform, reference=None, learner=None)
    service.connect().open_run(asked)
    where = ("--address", service.address, "--ca", service.ca)
    where += ("--metrics", service.coordinator.metrics_address)
    shown = top(*where, "--token-file", tokens["admin"])
    assert shown.startswith("workers 1 ") and "team-a-top" in shown
    assert "sbt_" not in shown
    once = ("top", "--once", *where)
    refused = fails(*once, "--token-file", tokens["reader"])
    assert "scope `admin`" in refused and "sbt_" not in refused
    assert "no token was sent" in fails(*once)
