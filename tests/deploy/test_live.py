"""The dashboard and the rules on a live service: Prometheus reads real processes, and every panel
has something to show.
"""

import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import pytest
import superbatch
from control_plane import free_ports
from tools import CHART, DASHBOARD, ROOT, RULES, call, tool

sys.path.append(str(ROOT / "tests" / "python"))
from cluster import Cluster, Process  # noqa: E402
from s3_store import BUCKET, Store  # noqa: E402
from test_end_to_end import phase, spec, weights  # noqa: E402

from examples.demo import tiny  # noqa: E402

DEADLINE_SECONDS = 60
#: What the variables of the dashboard stand for here. A rate needs two samples within its range.
RANGE = "20s"


class Prometheus:
    """A real one that scrapes once a second."""

    def __init__(self, folder: Path, targets: list[str]):
        (port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{port}"
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": "superbatch", "static_configs": [{"targets": targets}]}
            ],
        }
        path = folder / "prometheus.yml"
        path.write_text(json.dumps(settings))
        call(tool("promtool"), "check", "config", path)
        self.log = (folder / "prometheus.log").open("w")
        self.process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self.log,
            stderr=self.log,
        )

    def ask(self, query: str) -> list[dict]:
        """The series that a query gives now; none while it does not answer yet."""
        url = f"{self.address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            answer = json.load(urllib.request.urlopen(url, timeout=10))
        except OSError:
            return []
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def wait_for(self, query: str) -> list[dict]:
        until = monotonic() + DEADLINE_SECONDS
        while not (found := self.ask(query)):
            assert monotonic() < until, f"{query} gives nothing"
            sleep(0.2)
        return found

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("live")
    tiny.write_dataset(folder / "pool", rows=768)
    tiny.write_siglip(folder / "learner", seed=0)
    tiny.write_siglip(folder / "reference", seed=1)
    with Cluster(folder / "cluster", workers=2) as cluster:
        processes = [cluster.coordinator, *cluster.workers]
        targets = [urllib.parse.urlsplit(process.metrics_address).netloc for process in processes]
        prometheus = Prometheus(folder, targets)
        try:
            # Counters at their start, then after steps: what rates are made of.
            prometheus.wait_for(
                "superbatch_steps_committed_total == 0 and on () (count(up == 1) == 3)"
            )
            probed = phase(
                tuning=superbatch.Tuning(duplicates_above=0.999),
                approximation=superbatch.Approximation(resolution=tiny.SIDE // 2),
                probe=superbatch.FidelityProbe(every_steps=2, rows=48),
            )
            run = superbatch.connect(cluster.address).open_run(
                spec(folder, "live", phases=[probed])
            )
            for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=6):
                run.push_weights(weights(folder, batch.step), step=batch.step)
                run.flush()
                # Between steps, so that histograms are seen before and after.
                prometheus.wait_for(f"superbatch_learner_version >= {batch.step}")
            yield prometheus
        finally:
            prometheus.stop()


def queries() -> list[tuple[str, str]]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [
        (panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])
    ]


@pytest.mark.parametrize("title, query", queries())
def test_every_panel_has_something_to_show(live: Prometheus, title: str, query: str):
    live.wait_for(query.replace("$__rate_interval", RANGE).replace("$namespace", ".*"))


def test_a_service_that_is_well_raises_no_alarm(live: Prometheus):
    live.wait_for("superbatch:steps:rate5m > 0")
    assert live.ask('ALERTS{alertstate="firing"}') == []


def test_the_script_of_helm_test_takes_a_step(tmp_path: Path):
    tiny.write_dataset(tmp_path / "pool", rows=64)
    with Cluster(tmp_path / "cluster") as cluster:
        said = call(
            sys.executable,
            CHART / "files" / "step.py",
            environment={
                "SUPERBATCH_URI": cluster.address,
                "SUPERBATCH_TEST_RUN": "helm-test",
                "SUPERBATCH_TEST_SOURCE": (tmp_path / "pool").as_uri(),
                "SUPERBATCH_TEST_ROWS": "8",
            },
        )
        assert "Batch(step=0, rank=0/1, rows=8) of 64 rows" in said
        assert [run.state for run in superbatch.connect(cluster.address).list_runs()] == ["closed"]


def test_the_trainer_of_compose_trains_from_object_storage(tmp_path: Path):
    store = Store()
    try:
        endpoint = f"http://127.0.0.1:{store.port}"
        keys = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        reach = {
            "SUPERBATCH_STORAGE__OPTIONS__AWS_ENDPOINT": endpoint,
            "SUPERBATCH_STORAGE__OPTIONS__AWS_ALLOW_HTTP": "true",
        }
        with Cluster(
            tmp_path, workers=2, state=f"s3://{BUCKET}/state", environment={**keys, **reach}
        ) as cluster:
            said = call(
                sys.executable,
                "-m",
                "demo.train",
                "--steps",
                "3",
                "--run",
                "compose",
                environment={
                    **keys,
                    "AWS_ENDPOINT_URL": endpoint,
                    "AWS_DEFAULT_REGION": "us-east-1",
                    "SUPERBATCH_URI": cluster.address,
                    "SUPERBATCH_DEMO_BUCKET": BUCKET,
                    "PYTHONPATH": os.pathsep.join(
                        [str(ROOT), str(ROOT / "docker"), os.environ.get("PYTHONPATH", "")]
                    ),
                },
            )
            assert "3 steps of run compose" in said
            assert (
                cluster.coordinator.metric("superbatch_steps_committed_total", mode="normal") >= 3
            )
    finally:
        store.stop()


def test_what_compose_makes_is_a_safe_service(tmp_path: Path):
    """Its certificate and tokens, by settings like those of compose.yaml; the script of `helm test`
    is the trainer.
    """
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    call(
        sys.executable,
        "-m",
        "demo.secrets",
        secrets,
        environment={"PYTHONPATH": str(ROOT / "docker")},
    )
    tiny.write_dataset(tmp_path / "pool", rows=64)
    tls = {"cert": "tls.crt", "key": "tls.key", "ca": "ca.crt"}
    common = {
        "state": (tmp_path / "state").as_uri(),
        "tls": {
            **{name: str(secrets / file) for name, file in tls.items()},
            "worker_name": "worker",
        },
    }
    with ExitStack() as stack:
        coordinator = Process(
            tmp_path,
            "coordinator",
            "serve",
            {
                **common,
                "listen": "127.0.0.1:0",
                "metrics_listen": "127.0.0.1:0",
                "page_listen": None,
                "auth": {"tokens_file": str(secrets / "tokens")},
                "coordinator": {"workers_embedded": False},
            },
        )
        stack.callback(coordinator.stop)
        worker = Process(
            tmp_path,
            "worker",
            "worker",
            {
                **common,
                "worker": {"threads": 1},
                "worker_role": {
                    "coordinator": coordinator.address,
                    "listen": "127.0.0.1:0",
                    "metrics_listen": "127.0.0.1:0",
                    "token_file": str(secrets / "worker"),
                },
            },
        )
        stack.callback(worker.stop)
        said = call(
            sys.executable,
            CHART / "files" / "step.py",
            environment={
                "SUPERBATCH_URI": coordinator.address,
                "SUPERBATCH_TEST_RUN": "compose",
                "SUPERBATCH_TEST_SOURCE": (tmp_path / "pool").as_uri(),
                "SUPERBATCH_TEST_ROWS": "8",
                "SUPERBATCH_CA": str(secrets / "ca.crt"),
                "SUPERBATCH_TOKEN": (secrets / "trainer").read_text(),
            },
        )
        assert "Batch(step=0, rank=0/1, rows=8) of 64 rows" in said
        ca, wrong = str(secrets / "ca.crt"), (secrets / "worker").read_text()
        for options in ({}, {"token": wrong}):
            with pytest.raises(superbatch.Error):
                superbatch.connect(coordinator.address, ca=ca, **options).list_runs()
