"""A service with TLS and tokens, and the authority that signs its certificates."""

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
                "page_listen": "127.0.0.1:0",
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


def resident(service: Secured) -> float:
    line = next(
        line
        for line in service.metrics("admin").splitlines()
        if line.startswith("process_resident_memory_bytes ")
    )
    return float(line.split()[1])
