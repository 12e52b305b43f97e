"""Who a process is to S3: credentials that expire, nobody at all, and a reader who pays.

Before a real S3 server stands one that checks what S3 checks, and hands out credentials as EKS and
EC2 do. They are good for a few seconds.
"""

import json
import os
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic, sleep

import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS, Cluster
from s3_store import BUCKET, PassOn, Proxy, remote, store
from test_end_to_end import (
    STEPS,
    choices,
    inputs,
    service,
    spec,
    train,
    undisturbed,
)

GOOD_FOR_SECONDS = 5
#: What a pod is given to ask for credentials.
POD_TOKEN = "of-the-pod"
ROLE = "reader"
SESSION = "of-the-session"


class Checked(PassOn):
    def pass_on(self) -> None:
        if self.path.startswith(("/pod", "/metadata/")):
            self.read()
            self.say(*self.server.credentials_for(self))
        elif fault := self.server.fault(self.headers):
            self.read()
            self.server.refused.append((fault, self.command, self.path))
            content = f"<Error><Code>{fault}</Code><Message>{fault}</Message></Error>"
            self.say(403, "" if self.command == "HEAD" else content)
        else:
            super().pass_on()

    def read(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def say(self, status: int, content: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on


class Door(Proxy):
    """Passes on requests that carry credentials which it handed out and which have not expired."""

    def __init__(self, port: int):
        self.lock = threading.Lock()
        #: By session token: the key's id, and when it expires.
        self.issued: dict[str, tuple[str, float]] = {}
        self.used: set[str] = set()
        self.refused: list[tuple[str, str, str]] = []
        super().__init__(port)
        self.RequestHandlerClass = Checked

    def issue(self, seconds: float = GOOD_FOR_SECONDS) -> dict[str, str]:
        with self.lock:
            number = len(self.issued)
            token, key = f"token-{number}", f"KEY{number}"
            self.issued[token] = (key, monotonic() + seconds)
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        return {
            "AccessKeyId": key,
            "SecretAccessKey": "secret",
            "Token": token,
            "Expiration": until.isoformat().replace("+00:00", "Z"),
        }

    def credentials_for(self, request: PassOn) -> tuple[int, str]:
        headers, path = request.headers, request.path
        if path == "/pod":
            known = headers.get("Authorization") == POD_TOKEN
            return (200, json.dumps(self.issue())) if known else (401, "")
        if request.command == "PUT" and path == "/metadata/latest/api/token":
            return 200, SESSION
        if headers.get("X-aws-ec2-metadata-token") != SESSION:
            return 401, ""
        roles = "/metadata/latest/meta-data/iam/security-credentials/"
        if path == roles:
            return 200, ROLE
        return (200, json.dumps(self.issue())) if path == roles + ROLE else (404, "")

    def fault(self, headers) -> str | None:
        token = headers.get("X-Amz-Security-Token", "")
        key, until = self.issued.get(token, ("", 0.0))
        if f"Credential={key}/" not in headers.get("Authorization", ""):
            return "InvalidAccessKeyId"
        with self.lock:
            self.used.add(token)
        return None if monotonic() < until else "ExpiredToken"

    def wait_for_expiry(self) -> None:
        """Until the first credentials that were used are no longer good."""
        with self.lock:
            first = min(self.used, key=lambda token: self.issued[token][1])
        end = monotonic() + DEADLINE_SECONDS
        while monotonic() < self.issued[first][1]:
            assert monotonic() < end
            sleep(0.02)


class PublicDoor(Door):
    """A public bucket's: who signs has to be known, and nobody is."""

    def fault(self, headers) -> str | None:
        if "Authorization" in headers:
            return "InvalidAccessKeyId"
        # The store behind it has no public buckets, and looks at no signature.
        scope = "20260101/us-east-1/s3/aws4_request"
        headers["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential=public/{scope}, SignedHeaders=host, Signature=0"
        )
        return None


class TollDoor(Door):
    """Of a bucket whose readers pay: each request has to say that it will."""

    def fault(self, headers) -> str | None:
        return None if headers.get("x-amz-request-payer") == "requester" else "AccessDenied"


@pytest.fixture
def door(store, monkeypatch) -> Iterator:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    made = []

    def make(kind: type[Door] = Door) -> Door:
        made.append(kind(store.port))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def where(door: Door, **more: str) -> dict[str, str]:
    endpoint = f"http://127.0.0.1:{door.port}"
    return {"AWS_REGION": "us-east-1", "AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true", **more}


def index(environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    command = [BINARY, "index", f"s3://{BUCKET}/pool", "--state", (folder / "state").as_uri()]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("how", ["pod", "metadata"])
def test_credentials_that_expire_are_fetched_anew(inputs, door, tmp_path, undisturbed, how):
    """Data, models and state of a run whose processes were told no key."""
    door = door()
    at = f"http://127.0.0.1:{door.port}/{how}"
    (tmp_path / "token").write_text(POD_TOKEN)
    environment = {
        "pod": where(
            door,
            AWS_CONTAINER_CREDENTIALS_FULL_URI=at,
            AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(tmp_path / "token"),
        ),
        "metadata": where(door, AWS_METADATA_ENDPOINT=at),
    }[how]
    state = f"s3://{BUCKET}/state-by-{how}"
    with Cluster(tmp_path, workers=1, state=state, environment=environment) as cluster:
        run = superbatch.connect(cluster.address).open_run(remote(f"by-{how}"))
        ids = train(run, inputs, end=2)
        door.wait_for_expiry()
        ids += train(run, inputs, start=2)
        assert ids == undisturbed[0]
        assert choices(run) == undisturbed[1]
    assert not door.refused
    assert len(door.used) > 1
    # The first ones are really no longer good.
    token, (key, _) = next(iter(door.issued.items()))
    headers = {"X-Amz-Security-Token": token, "Authorization": f"AWS4 Credential={key}/x"}
    late = urllib.request.Request(f"http://127.0.0.1:{door.port}/{BUCKET}", headers=headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(late, timeout=30)
    assert (caught.value.code, "ExpiredToken" in caught.value.read().decode()) == (403, True)


def test_a_session_token_of_the_environment_is_not_renewed_and_says_so(door, tmp_path):
    door = door()
    given = door.issue(seconds=3600)
    environment = where(
        door,
        AWS_ACCESS_KEY_ID=given["AccessKeyId"],
        AWS_SECRET_ACCESS_KEY=given["SecretAccessKey"],
        AWS_SESSION_TOKEN=given["Token"],
    )
    ended = index(environment, tmp_path)
    assert ended.returncode == 0, ended.stderr
    door.issued[given["Token"]] = (given["AccessKeyId"], 0.0)
    ended = index(environment, tmp_path)
    assert ended.returncode != 0 and "ExpiredToken" in ended.stderr
    assert given["SecretAccessKey"] not in ended.stderr


def test_a_public_bucket_is_read_without_a_signature(inputs, door, tmp_path, undisturbed):
    door = door(PublicDoor)
    signed = where(door, AWS_ACCESS_KEY_ID="nobody", AWS_SECRET_ACCESS_KEY="secret")
    ended = index(signed, tmp_path)
    assert ended.returncode != 0 and "InvalidAccessKeyId" in ended.stderr
    door.refused.clear()
    environment = where(door, AWS_SKIP_SIGNATURE="true")
    with Cluster(tmp_path / "cluster", environment=environment) as cluster:
        run = superbatch.connect(cluster.address).open_run(remote("public"))
        assert train(run, inputs) == undisturbed[0]
    assert not door.refused


def test_a_reader_who_pays_says_so_in_every_request(inputs, door, tmp_path, undisturbed):
    door = door(TollDoor)
    known = where(door, AWS_ACCESS_KEY_ID="payer", AWS_SECRET_ACCESS_KEY="secret")
    ended = index(known, tmp_path)
    assert ended.returncode != 0 and "AccessDenied" in ended.stderr
    door.refused.clear()
    state, environment = f"s3://{BUCKET}/state-paid", {**known, "AWS_REQUEST_PAYER": "true"}
    with Cluster(tmp_path / "cluster", state=state, environment=environment) as cluster:
        run = superbatch.connect(cluster.address).open_run(remote("paid"))
        assert train(run, inputs) == undisturbed[0]
    assert not door.refused
