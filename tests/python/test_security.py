"""TLS, tokens and the audit log, by the real binary and the Python client."""

import json
import subprocess
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS, Process
from test_end_to_end import inputs, phase, reason, spec, train  # noqa: F401

EXTENSIONS = "subjectAltName=DNS:localhost,DNS:worker.test,IP:127.0.0.1"


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Authority:
    """A certificate authority in a folder, as docs/security.md makes one."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.ca, self.key = (
            folder,
            folder / f"{name}-ca.pem",
            folder / f"{name}-ca.key",
        )
        openssl(
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            2,
            "-subj",
            f"/CN={name} authority",
            "-keyout",
            self.key,
            "-out",
            self.ca,
        )

    def sign(self, name: str, extensions: str = EXTENSIONS) -> tuple[str, str]:
        """A certificate and its key."""
        cert, key, request = (self.folder / f"{name}.{ending}" for ending in ("pem", "key", "csr"))
        extra = self.folder / f"{name}.ext"
        extra.write_text(extensions)
        openssl(
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-subj",
            f"/CN={name}",
            "-keyout",
            key,
            "-out",
            request,
        )
        openssl(
            "x509",
            "-req",
            "-in",
            request,
            "-CA",
            self.ca,
            "-CAkey",
            self.key,
            "-CAcreateserial",
            "-days",
            2,
            "-extfile",
            extra,
            "-out",
            cert,
        )
        return str(cert), str(key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("security")


@pytest.fixture(scope="module")
def authority(folder) -> Authority:
    return Authority(folder, "own")


def command(*arguments: object) -> str:
    return subprocess.run(
        [BINARY, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout


def new_token(file: Path, name: str, *arguments: str) -> str:
    return command("token", "new", name, "--file", file, *arguments).strip()


class Secured:
    """A coordinator and a worker that speak TLS to each other, with tokens."""

    def __init__(self, stack: ExitStack, folder: Path, authority: Authority, **tls: str):
        self.folder, self.tokens, self.audit = (
            folder,
            folder / "tokens.yaml",
            folder / "audit.jsonl",
        )
        self.ca, (self.cert, self.key) = str(authority.ca), authority.sign("server")
        self.secrets = {
            "trainer": new_token(self.tokens, "trainer", "--runs", "team-a-*"),
            "reader": new_token(self.tokens, "reader", "--scopes", "read"),
            "worker": new_token(self.tokens, "worker", "--scopes", "worker"),
            "admin": new_token(self.tokens, "admin", "--scopes", "admin"),
            "brief": new_token(self.tokens, "brief", "--expires", "1ms"),
        }
        (folder / "worker.token").write_text(self.secrets["worker"] + "\n")
        state = (folder / "state").as_uri()
        # The worker's certificate is for another name than its address.
        worker_cert, worker_key = authority.sign("worker", "subjectAltName=DNS:worker.test")
        self.coordinator = Process(
            folder,
            "coordinator",
            "serve",
            {
                "listen": "127.0.0.1:0",
                "metrics_listen": "127.0.0.1:0",
                "health_listen": "127.0.0.1:0",
                "page_listen": None,
                "state": state,
                "tls": {
                    "cert": self.cert,
                    "key": self.key,
                    "ca": self.ca,
                    "worker_name": "worker.test",
                    **tls,
                },
                "auth": {"tokens_file": str(self.tokens), "metrics": True},
                "audit": {"file": str(self.audit)},
                "coordinator": {"workers_embedded": False},
                "log": {"filter": "debug"},
            },
        )
        stack.callback(self.coordinator.stop)
        self.worker = Process(
            folder,
            "worker",
            "worker",
            {
                "state": state,
                "worker": {"threads": 1},
                "tls": {"cert": worker_cert, "key": worker_key, "ca": self.ca, **tls},
                "log": {"filter": "debug"},
                "worker_role": {
                    "coordinator": self.coordinator.address,
                    "listen": "127.0.0.1:0",
                    "metrics_listen": "127.0.0.1:0",
                    "token_file": str(folder / "worker.token"),
                },
            },
        )
        stack.callback(self.worker.stop)

    @property
    def address(self) -> str:
        return self.coordinator.address

    def connect(self, token: str | None = "trainer", **options) -> superbatch.Client:
        token = self.secrets.get(token, token)
        return superbatch.connect(
            self.address, **{"ca": self.ca, "token": token, "retry_attempts": 2, **options}
        )

    def metrics(self, token: str | None) -> str:
        headers = {"Authorization": f"Bearer {self.secrets[token]}"} if token else {}
        request = urllib.request.Request(self.coordinator.metrics_address, headers=headers)
        return urllib.request.urlopen(request, timeout=10).read().decode()

    def audited(self) -> list[dict]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@pytest.fixture(scope="module")
def service(folder, authority):
    with ExitStack() as stack:
        yield Secured(stack, folder, authority)


def refused(service: Secured, token: str | None, call) -> superbatch.Error:
    with pytest.raises(superbatch.Error) as caught:
        call(service.connect(token))
    assert "sbt_" not in str(caught.value)
    return caught.value


def wait_until(reached) -> None:
    until = monotonic() + DEADLINE_SECONDS
    while not reached():
        assert monotonic() < until
        sleep(0.05)


# -----------------------------------------------------------------------------------------------------------
# a whole run


def test_a_trainer_runs_over_tls_with_a_token(inputs, service, tmp_path):
    assert service.address.startswith("https://") and service.worker.address.startswith("https://")
    run = service.connect().open_run(spec(inputs, "team-a-1"))
    assert [len(ids) for ids in train(run, inputs)] == [24] * 4
    run.rewind(2, mode="replay")
    run.close()
    told = [
        (line["what"], line["outcome"], line["who"])
        for line in service.audited()
        if line["run"] == "team-a-1"
    ]
    assert told[0] == ("open", "accepted", "trainer") and told[-2:] == [
        ("rewind", "accepted", "trainer"),
        ("close", "accepted", "trainer"),
    ]
    assert ("push", "accepted", "trainer") in told
    # The same by the environment and by a file, as a trainer's other processes would.
    (tmp_path / "token").write_text(service.secrets["trainer"])
    names = "import superbatch, sys; print([run.run_id for run in superbatch.connect(sys.argv[1]).list_runs()])"
    environment = {"SUPERBATCH_CA": service.ca, "SUPERBATCH_TOKEN_FILE": str(tmp_path / "token")}
    assert "team-a-1" in in_python(names, service.address, environment)


def in_python(code: str, argument: str, environment: dict) -> str:
    import os
    import sys

    ended = subprocess.run(
        [sys.executable, "-c", code, argument],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return ended.stdout


# -----------------------------------------------------------------------------------------------------------
# refusals


def test_each_call_needs_its_scope(inputs, service):
    asked = spec(
        inputs,
        "team-a-2",
        phases=[phase(policy="uniform", n_chunks=1)],
        reference=None,
        learner=None,
    )
    for token in (None, "sbt_" + "0" * 64, "brief"):
        error = refused(service, token, lambda client: client.open_run(asked))
        assert error.reason == "UNAUTHENTICATED" and error.metadata["scope"] == "open"
    error = refused(service, "reader", lambda client: client.open_run(asked))
    assert (
        error.reason == "PERMISSION_DENIED"
        and error.metadata["scope"] == "open"
        and "`open`" in str(error)
    )
    for token in ("worker", "reader"):
        error = refused(service, token, lambda client: client.close_run("team-a-2"))
        assert error.reason == "PERMISSION_DENIED" and error.metadata["scope"] == "open"
    error = refused(service, "worker", lambda client: client.list_runs())
    assert error.metadata["scope"] == "read", "a worker reads no trainer's calls"
    run = service.connect().open_run(asked)
    reader = service.connect("reader")
    assert reader.get_run("team-a-2").summary.run_id == "team-a-2"
    assert len(run.select(0, rank=0, world_size=1)) == 24
    run.close()


def test_a_token_is_for_its_runs_and_says_nothing_of_others(inputs, service):
    asked = spec(
        inputs,
        "team-b-1",
        phases=[phase(policy="uniform", n_chunks=1)],
        reference=None,
        learner=None,
    )
    service.connect("admin").open_run(asked)
    said = {
        refused(service, "trainer", lambda client, id=id: client.get_run(id)).reason
        for id in ("team-b-1", "team-b-none")
    }
    assert said == {"PERMISSION_DENIED"}
    error = refused(service, "trainer", lambda client: client.open_run(asked))
    assert error.metadata["run_id"] == "team-b-1"
    listed = [run.run_id for run in service.connect("trainer").list_runs()]
    assert "team-b-1" not in listed
    assert "team-b-1" in [run.run_id for run in service.connect("admin").list_runs()]
    assert {"denied"} <= {line["what"] for line in service.audited()}


def test_the_service_and_the_client_know_each_other_by_certificate(service, authority, folder):
    other = Authority(folder, "other")
    with pytest.raises(superbatch.Unavailable, match="UnknownIssuer"):
        service.connect(ca=str(other.ca))
    with pytest.raises(superbatch.Unavailable):
        superbatch.connect(service.address.replace("https", "http"), retry_attempts=1).list_runs()
    with pytest.raises(superbatch.Error, match="nope.pem"):
        service.connect(ca="nope.pem")
    with pytest.raises(superbatch.Error, match="without TLS"):
        superbatch.connect("http://192.0.2.1:50051", token="sbt_x")


def test_old_tls_is_not_spoken(service):
    host = service.address.removeprefix("https://")

    def handshake(version: str) -> bool:
        ended = subprocess.run(
            [
                "openssl",
                "s_client",
                version,
                "-cipher",
                "DEFAULT:@SECLEVEL=0",
                "-alpn",
                "h2",
                "-connect",
                host,
            ],
            input=b"",
            capture_output=True,
        )
        return b"Cipher is (NONE)" not in ended.stdout and b"New, " in ended.stdout

    assert handshake("-tls1_2") and handshake("-tls1_3")
    assert not handshake("-tls1_1") and not handshake("-tls1")


def test_metrics_may_need_a_token(service):
    for token, status in ((None, 401), ("reader", 403)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            service.metrics(token)
        assert caught.value.code == status
    assert "superbatch_access_refused_total" in service.metrics("admin")


def test_a_worker_answers_nobody_but_its_coordinator(service):
    import grpc

    host = service.worker.address.removeprefix("https://")
    trust = grpc.ssl_channel_credentials(Path(service.ca).read_bytes())
    with grpc.secure_channel(
        host, trust, [("grpc.ssl_target_name_override", "worker.test")]
    ) as channel:
        prepare = channel.unary_unary("/superbatch.v1.WorkerService/PrepareModel")
        for metadata in ([], [("authorization", f"Bearer {service.secrets['admin']}")]):
            with pytest.raises(grpc.RpcError) as caught:
                prepare(b"", metadata=metadata, timeout=30)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


# -----------------------------------------------------------------------------------------------------------
# changes


def test_tokens_are_made_and_revoked_under_a_running_service(service):
    token = new_token(service.tokens, "late", "--scopes", "read")

    def may() -> bool:
        try:
            service.connect(token).list_runs()
        except superbatch.Error as error:
            assert error.reason in ("UNAUTHENTICATED", "OVERLOADED")
            return False
        return True

    wait_until(may)
    command("token", "revoke", "late", "--file", service.tokens)
    wait_until(lambda: not may())
    # What cannot be read changes nothing.
    kept = service.tokens.read_text()
    service.tokens.write_text("no tokens")
    wait_until(
        lambda: (
            'superbatch_reloads_total{what="tokens",outcome="error"}' in service.metrics("admin")
        )
    )
    assert service.connect("trainer").list_runs() is not None
    service.tokens.write_text(kept)


def test_a_renewed_certificate_is_shown_without_a_restart(folder, authority):
    new, place = Authority(folder, "new"), folder / "renewed"
    place.mkdir()

    def install(of: Authority, name: str) -> None:
        for made, kept in zip(of.sign(name), ("cert.pem", "key.pem")):
            (place / kept).write_bytes(Path(made).read_bytes())

    install(authority, "first")
    with ExitStack() as stack:
        process = Process(
            place,
            "renewed",
            "serve",
            {
                "listen": "127.0.0.1:0",
                "metrics_listen": "127.0.0.1:0",
                "page_listen": None,
                "state": (place / "state").as_uri(),
                "tls": {"cert": str(place / "cert.pem"), "key": str(place / "key.pem")},
            },
        )
        stack.callback(process.stop)
        client = superbatch.connect(process.address, ca=str(authority.ca))
        install(new, "second")

        def known() -> bool:
            try:
                superbatch.connect(process.address, ca=str(new.ca), retry_attempts=1)
            except superbatch.Unavailable:
                return False
            return True

        wait_until(known)
        assert client.list_runs() == [], "connections that are open go on"


def test_clients_show_certificates_where_they_are_asked_to(folder, authority, inputs):
    place = folder / "mutual"
    place.mkdir()
    with ExitStack() as stack:
        service = Secured(stack, place, authority, client_ca=str(authority.ca))
        with pytest.raises(superbatch.Unavailable, match="(?i)certificate ?required"):
            service.connect()
        stranger = Authority(place, "stranger").sign(
            "stranger-client", "extendedKeyUsage=clientAuth"
        )
        with pytest.raises(superbatch.Unavailable):
            service.connect(cert=stranger[0], key=stranger[1])
        cert, key = authority.sign("client", "extendedKeyUsage=clientAuth")
        run = service.connect(cert=cert, key=key).open_run(spec(inputs, "team-a-mutual"))
        assert len(run.select(0, rank=0, world_size=1)) == 24, "coordinator and worker show theirs"


# -----------------------------------------------------------------------------------------------------------
# silence


def test_secrets_are_nowhere(service):
    settings = service.folder / "coordinator.yaml"
    shown = [
        command("check-config", "--config", settings),
        command("token", "list", "--config", settings),
        command("token", "list", "--json", "--config", settings),
        service.metrics("admin"),
        service.audit.read_text(),
        service.tokens.read_text(),
        service.coordinator.log.read_text(),
        service.worker.log.read_text(),
    ]
    assert all(len(text) > 100 for text in shown)
    for name, secret in service.secrets.items():
        for text in shown:
            assert secret not in text and "sbt_" not in text, name
    assert "PRIVATE KEY" not in "".join(shown)


def test_probes_ask_a_port_of_their_own(service, folder):
    line = next(
        line for line in service.coordinator.log.read_text().splitlines() if "health_listen" in line
    )
    address = line.split("address=")[1].split()[0]
    assert command("health", "--address", f"http://{address}") == "serving\n"
    for name in ("liveness", "superbatch.v1.SelectionService"):
        assert command("health", "--address", f"http://{address}", "--service", name) == "serving\n"
    ended = subprocess.run(
        [BINARY, "health", "--address", "http://127.0.0.1:1"], capture_output=True, text=True
    )
    assert ended.returncode == 1 and "nothing answers" in ended.stderr
    import grpc

    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/superbatch.v1.SelectionService/ListRuns")(b"", timeout=30)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_noise_and_silence_do_not_stop_the_service(service):
    import os
    import random
    import socket

    import grpc

    noise = random.Random(1)
    host, port = service.address.removeprefix("https://").split(":")
    pages = service.coordinator.metrics_address.removeprefix("http://").split("/")[0].split(":")
    before = resident(service)
    with ExitStack() as stack:

        def open_to(address: tuple[str, int], said: bytes) -> None:
            connection = stack.enter_context(socket.create_connection(address))
            if said:
                connection.sendall(said)

        for _ in range(300):
            open_to((host, int(port)), b"")
            open_to(
                (host, int(port)), os.urandom(64) if noise.random() < 0.5 else b"PRI * HTTP/2.0\r\n"
            )
        for _ in range(20):
            open_to((pages[0], int(pages[1])), b"GET /metrics HTTP/1.1\r\nx-slow: ")
        trust = grpc.ssl_channel_credentials(Path(service.ca).read_bytes())
        metadata = [("authorization", f"Bearer {service.secrets['admin']}")]
        with grpc.secure_channel(f"{host}:{port}", trust) as channel:
            for method in ("OpenRun", "GetRun", "Rewind", "CloseRun", "AppendPhases", "GetReceipt"):
                call = channel.unary_unary(f"/superbatch.v1.SelectionService/{method}")
                for length in (1, 7, 100, 5000):
                    with pytest.raises(grpc.RpcError) as caught:
                        call(noise.randbytes(length), metadata=metadata, timeout=30)
                    assert caught.value.code() not in (
                        grpc.StatusCode.UNAVAILABLE,
                        grpc.StatusCode.DEADLINE_EXCEEDED,
                    )
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/superbatch.v1.SelectionService/GetRun")(
                    bytes(9 << 20), metadata=metadata, timeout=60
                )
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert service.connect("reader").list_runs() is not None
        assert resident(service) - before < 200 << 20
    assert service.coordinator.process.poll() is None


def resident(service: Secured) -> float:
    line = next(
        line
        for line in service.metrics("admin").splitlines()
        if line.startswith("process_resident_memory_bytes ")
    )
    return float(line.split()[1])
