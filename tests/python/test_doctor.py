"""`superbatch doctor` before a worker is started, with the settings of one that works."""

import json
import socket
from pathlib import Path

import pytest
from commands import fails, run
from secured import authority, folder, service

COORDINATOR, TOKEN = "worker_role.coordinator", "worker_role.token_file"


@pytest.fixture
def settings(service, tmp_path):
    """Writes the settings of the service's own worker, with changes to `worker_role`."""

    def write(**changes: object) -> Path:
        known = json.loads((service.folder / "worker.yaml").read_text())
        known["worker_role"] |= changes
        path = tmp_path / "worker.json"
        path.write_text(json.dumps(known))
        return path

    return write


def failed(settings: Path, check: str) -> str:
    """What is said of the one check that fails."""
    ended = run("doctor", "--config", settings, "--role", "worker")
    assert ended.returncode == 1 and ended.stdout == "", ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("FAIL  ")]
    (line,) = lines
    assert line.startswith(f"FAIL  {check}: "), line
    assert "sbt_" not in ended.stderr
    return line


def test_a_worker_that_will_work_is_well(service, settings):
    ended = run("doctor", "--config", settings(), "--role", "worker")
    assert ended.returncode == 0, ended.stderr
    for check in ("worker_role.listen", "worker_role.metrics_listen", TOKEN, COORDINATOR, "device"):
        assert f"ok    {check}: " in ended.stdout, ended.stdout
    assert "\nok    listen: " not in ended.stdout, "that is the coordinator's"
    assert f"{service.address} would register this worker" in ended.stdout
    assert "sbt_" not in ended.stdout


def test_what_keeps_a_worker_from_its_coordinator_is_named(service, settings, tmp_path):
    token = tmp_path / "token"
    token.write_text(service.secrets["reader"])
    said = failed(settings(token_file=str(token)), COORDINATOR)
    assert "`worker`" in said, "the scope that the token lacks"
    token.write_text("sbt_" + "0" * 64)
    assert "not valid" in failed(settings(token_file=str(token)), COORDINATOR)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"https://127.0.0.1:{closed.getsockname()[1]}"
    assert "cannot be reached" in failed(settings(coordinator=address), COORDINATOR)
    taken = service.worker.address.removeprefix("https://")
    assert "cannot listen" in failed(settings(listen=taken), "worker_role.listen")


def test_a_tokens_file_is_no_token(service, settings):
    path = settings(token_file=str(service.tokens))
    said = fails("doctor", "--config", path, "--role", "worker")
    assert "2 of" in said, "neither the file nor the coordinator can be used"
