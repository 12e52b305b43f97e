"""A real Kubernetes control plane on this machine: etcd, an API server and the controllers. No
nodes, so pods stay Pending.
"""

import json
import os
import secrets
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import yaml
from tools import call, tool

DEADLINE_SECONDS = 120
ADMIN = "system:masters"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class ControlPlane(ExitStack):
    """Started by `with`; everything ends with it."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.token = secrets.token_hex(16)
        client, peer, self.port, managing = free_ports(4)
        etcd = f"http://127.0.0.1:{client}"
        self.address = f"https://127.0.0.1:{self.port}"
        key, public = folder / "accounts.key", folder / "accounts.pub"
        call("openssl", "genrsa", "-out", key, "2048")
        call("openssl", "rsa", "-in", key, "-pubout", "-out", public)
        tokens = folder / "tokens.csv"
        tokens.write_text(f'{self.token},admin,1,"{ADMIN}"\n')
        self.kubeconfig = self.write_kubeconfig()
        self.start(
            "etcd",
            [
                f"--data-dir={folder / 'etcd'}",
                f"--listen-client-urls={etcd}",
                f"--advertise-client-urls={etcd}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}",
                "--log-level=error",
            ],
        )
        self.start(
            "kube-apiserver",
            [
                f"--etcd-servers={etcd}",
                f"--secure-port={self.port}",
                "--bind-address=127.0.0.1",
                f"--cert-dir={folder / 'certificates'}",
                f"--service-account-key-file={public}",
                f"--service-account-signing-key-file={key}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--token-auth-file={tokens}",
                "--authorization-mode=RBAC",
                "--service-cluster-ip-range=10.96.0.0/24",
            ],
        )
        self.wait("the API server", lambda: self.get("/readyz") == "ok")
        self.start(
            "kube-controller-manager",
            [
                f"--kubeconfig={self.kubeconfig}",
                f"--service-account-private-key-file={key}",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
                f"--secure-port={managing}",
                f"--cert-dir={folder / 'certificates'}",
            ],
        )

    def write_kubeconfig(self) -> Path:
        path = self.folder / "kubeconfig"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "here",
                    "clusters": [
                        {
                            "name": "here",
                            "cluster": {"server": self.address, "insecure-skip-tls-verify": True},
                        }
                    ],
                    "users": [{"name": "admin", "user": {"token": self.token}}],
                    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
                }
            )
        )
        path.chmod(0o600)
        return path

    def start(self, name: str, arguments: list[str]) -> None:
        log = self.enter_context((self.folder / f"{name}.log").open("w"))
        process = subprocess.Popen(
            [tool(name), *arguments], stdout=log, stderr=log, cwd=self.folder
        )
        self.callback(self.end, process)

    @staticmethod
    def end(process: subprocess.Popen) -> None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def wait(self, what: str, reached) -> None:
        until = monotonic() + DEADLINE_SECONDS
        while not reached():
            logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
            assert monotonic() < until, f"{what} did not come:\n{logs}"
            sleep(0.2)

    def ask(self, method: str, path: str, body: dict | None = None) -> str | None:
        """The answer's text, or None where there is no such thing or no server yet."""
        request = urllib.request.Request(
            self.address + path,
            method=method,
            data=body and json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        context = ssl._create_unverified_context()
        try:
            return urllib.request.urlopen(request, timeout=30, context=context).read().decode()
        except urllib.error.HTTPError as error:
            if error.code in (404, 500, 503):
                return None
            raise AssertionError(
                f"{method} {path}: {error.code} {error.read().decode()}"
            ) from error
        except (urllib.error.URLError, ConnectionError):
            return None

    def get(self, path: str) -> str | None:
        return self.ask("GET", path)

    def find(self, path: str) -> dict | None:
        text = self.get(path)
        return text and json.loads(text)

    def define(self, definitions: list[Path]) -> None:
        """Installs custom resources."""
        root = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        names = []
        for path in definitions:
            definition = yaml.safe_load(path.read_text())
            names.append(definition["metadata"]["name"])
            self.ask("POST", root, definition)

        def established(name: str) -> bool:
            conditions = (self.find(f"{root}/{name}") or {}).get("status", {}).get("conditions", [])
            return any(
                one["type"] == "Established" and one["status"] == "True" for one in conditions
            )

        for name in names:
            self.wait(name, lambda name=name: established(name))

    def helm(self, *arguments: str | Path) -> str:
        """Runs helm against it. Warnings of the API server fail the call."""
        done = subprocess.run(
            [tool("helm"), *(str(argument) for argument in arguments)],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "KUBECONFIG": str(self.kubeconfig),
                "HELM_CACHE_HOME": str(self.folder / "helm"),
            },
        )
        assert done.returncode == 0, done.stderr
        assert "warn" not in done.stderr.lower() and "\nW" not in "\n" + done.stderr, done.stderr
        return done.stdout
