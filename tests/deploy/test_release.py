"""What a release of the chart would run, by real processes: its certificates, its tokens and its
settings, with other ports and paths.
"""

import base64
import json
import os
import select
import ssl
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import superbatch
import yaml
from tools import CHART, ROOT, call, find, template

sys.path.append(str(ROOT / "tests" / "python"))
from cluster import DEADLINE_SECONDS, Process  # noqa: E402

from examples.demo import tiny  # noqa: E402

MINIMAL = CHART / "tests" / "minimal.yaml"
MUTUAL = ["--set", "tls.requireClientCertificates=true"]
#: Where pods have the certificates and the tokens.
MOUNTED = "/etc/superbatch"


def write(folder: Path, secret: dict) -> Path:
    """The keys of a Secret as files, as a pod sees them."""
    folder.mkdir(parents=True)
    for name, text in secret["data"].items():
        (folder / name).write_bytes(base64.b64decode(text))
    return folder


def handshake(server: Path, client: Path | None, name: str) -> bool:
    """Whether a caller gets through to a server that asks for a certificate."""
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(server / "tls.crt", server / "tls.key")
    listening.load_verify_locations(server / "ca.crt")
    listening.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=server / "ca.crt")
    if client:
        calling.load_cert_chain(client / "tls.crt", client / "tls.key")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        calling.wrap_bio(down, up, server_hostname=name),
        listening.wrap_bio(up, down, server_side=True),
    ]
    # Each round one message of each side; TLS needs three.
    for _ in range(5):
        try:
            for side in list(sides):
                side.do_handshake()
                sides.remove(side)
        except ssl.SSLWantReadError:
            sides.reverse()
        except ssl.SSLError:
            return False
    return not sides


def test_generated_certificates_know_each_other(tmp_path: Path):
    objects = template("--values", MINIMAL, *MUTUAL)
    server = write(tmp_path / "server", find(objects, "Secret", "superbatch-tls"))
    client = write(tmp_path / "client", find(objects, "Secret", "superbatch-client-tls"))
    assert (server / "ca.crt").read_text() == (client / "ca.crt").read_text()
    assert handshake(server, client, "superbatch-coordinator.ml.svc")
    assert handshake(server, server, "superbatch-worker.ml.svc"), "workers and coordinator, too"
    assert not handshake(server, client, "superbatch-coordinator.other.svc")
    assert not handshake(server, None, "superbatch-coordinator.ml.svc")
    others = template("--values", MINIMAL, *MUTUAL)
    other = write(tmp_path / "other", find(others, "Secret", "superbatch-client-tls"))
    assert not handshake(server, other, "superbatch-coordinator.ml.svc")


class Release:
    """A coordinator and a worker with what the chart gives their pods."""

    def __init__(self, stack: ExitStack, folder: Path, *options: str):
        state, data = (folder / "state").as_uri(), folder.as_uri()
        values = f"state.uri={state},storage.allowUris={{{data}}}"
        values += ",worker.direct.enabled=true,coordinator.audit.enabled=true"
        objects = template("--set", values, *options)
        secrets = {each["metadata"]["name"]: each for each in objects if each["kind"] == "Secret"}
        self.tls = write(folder / "mounted" / "tls", secrets["superbatch-tls"])
        self.tokens = write(folder / "mounted" / "tokens", secrets["superbatch-tokens"])
        self.client_tls = None
        if client := secrets.get("superbatch-client-tls"):
            self.client_tls = write(folder / "mounted" / "client", client)
        texts = find(objects, "ConfigMap", "superbatch")["data"]
        settings = {
            role: yaml.safe_load(texts[f"{role}.yaml"].replace(MOUNTED, str(folder / "mounted")))
            for role in ("coordinator", "worker")
        }
        anywhere = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}
        coordinator = settings["coordinator"] | anywhere
        coordinator |= {"health_listen": "127.0.0.1:0", "page_listen": None}
        # By the service's name, which this machine does not know.
        del coordinator["coordinator"]["advertise_address"]
        self.coordinator = Process(folder, "coordinator", "serve", coordinator)
        stack.callback(self.coordinator.stop)
        # The certificate holds no address.
        self.uri = self.coordinator.address.replace("127.0.0.1", "localhost")
        worker = settings["worker"] | {"health_listen": "127.0.0.1:0"}
        worker["worker_role"] |= anywhere | {"coordinator": self.uri}
        worker["worker"]["threads"] = 1
        self.worker = Process(folder, "worker", "worker", worker)
        stack.callback(self.worker.stop)
        self.coordinator.wait_for("superbatch_workers", lambda count: count == 1)

    def environment(self) -> dict[str, str]:
        """That of the pod of `helm test`, and of a trainer."""
        shown = {"SUPERBATCH_URI": self.uri, "SUPERBATCH_CA": str(self.tls / "ca.crt")}
        shown["SUPERBATCH_TOKEN"] = (self.tokens / "trainer").read_text()
        if self.client_tls:
            shown["SUPERBATCH_CERT"] = str(self.client_tls / "tls.crt")
            shown["SUPERBATCH_KEY"] = str(self.client_tls / "tls.key")
        return shown

    def connect(self) -> superbatch.Client:
        names = {"URI": "uri", "CA": "ca", "TOKEN": "token", "CERT": "cert", "KEY": "key"}
        shown = {
            names[name.removeprefix("SUPERBATCH_")]: value
            for name, value in self.environment().items()
        }
        return superbatch.connect(shown.pop("uri"), retry_attempts=2, **shown)


@pytest.fixture(scope="module", params=[[], MUTUAL], ids=["tls", "mtls"])
def release(request, tmp_path_factory) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp("release")
    tiny.write_dataset(folder / "pool", rows=64)
    with ExitStack() as stack:
        yield Release(stack, folder, *request.param)


def pool(release: Release) -> str:
    return (release.tls.parents[1] / "pool").as_uri()


def test_the_step_of_helm_test_is_taken(release: Release):
    said = call(
        sys.executable,
        CHART / "files" / "step.py",
        environment={
            **release.environment(),
            "SUPERBATCH_TEST_RUN": "helm-test",
            "SUPERBATCH_TEST_SOURCE": pool(release),
            "SUPERBATCH_TEST_ROWS": "8",
        },
    )
    assert "Batch(step=0, rank=0/1, rows=8) of 64 rows" in said


def test_workers_send_rows_to_trainers(release: Release):
    run = release.connect().open_run(
        superbatch.RunSpec(
            run_id="direct",
            sources=[pool(release)],
            phases=[superbatch.Phase(policy="uniform", super_batch_size=8, sub_batch_size=8)],
            delivery="direct",
        )
    )
    assert len(next(run.batches(rank=0, world_size=1, start_step=0, end_step=1))) == 8
    assert release.coordinator.metric("superbatch_direct_fallbacks_total") == 0
    # It is counted after the last row is sent.
    release.worker.wait_for("superbatch_direct_bytes_total", lambda count: count > 0)


def test_the_audit_log_is_on_standard_output(release: Release):
    spec = superbatch.RunSpec(
        run_id="audited",
        sources=[pool(release)],
        phases=[superbatch.Phase(policy="uniform", super_batch_size=8, sub_batch_size=8)],
    )
    release.connect().open_run(spec).close()
    pipe, text = release.coordinator.process.stdout.fileno(), ""
    acts: list[dict] = []
    while not any(act["run"] == "audited" and act["what"] == "close" for act in acts):
        assert select.select([pipe], [], [], DEADLINE_SECONDS)[0], text
        text += os.read(pipe, 1 << 16).decode()
        acts = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
    opened = next(act for act in acts if act["run"] == "audited")
    assert (opened["what"], opened["who"]) == ("open", "trainer")


def test_a_certificate_is_needed_where_it_is_asked_for(release: Release):
    ca, token = str(release.tls / "ca.crt"), (release.tokens / "trainer").read_text()

    def list_runs() -> list:
        return superbatch.connect(release.uri, ca=ca, token=token, retry_attempts=1).list_runs()

    if release.client_tls is None:
        list_runs()
        return
    with pytest.raises(superbatch.Unavailable, match="(?i)certificate ?required"):
        list_runs()
