"""TLS, tokens and the audit log, by the real binary and the Python client."""

import json
import os
import pwd
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import superbatch
from commands import run
from grpc_apart import Channel, Refused
from secured import authority, command, folder, in_python, new_token, refused, service, wait_until
from test_end_to_end import inputs, phase, reason, spec, train, weights  # noqa: F401


def test_a_trainer_runs_over_tls_with_a_token(inputs, service, tmp_path):
    assert service.address.startswith("https://") and service.worker.address.startswith("https://")
    run = service.connect().open_run(spec(inputs, "team-a-1"))
    assert [len(ids) for ids in train(run, inputs)] == [24] * 4
    run.rewind(2, mode="replay")
    run.close()

    def told() -> list[tuple[str, str, str]]:
        return [
            (line["what"], line["outcome"], line["who"])
            for line in service.audited()
            if line["run"] == "team-a-1"
        ]

    # An answer may come before its line is in the log.
    wait_until(lambda: ("close", "accepted", "trainer") in told())
    told = told()
    assert told[0] == ("open", "accepted", "trainer") and told[-2:] == [
        ("rewind", "accepted", "trainer"),
        ("close", "accepted", "trainer"),
    ]
    assert ("push", "accepted", "trainer") in told
    # The same by the environment and by a file, as a trainer's other processes would.
    (tmp_path / "token").write_text(service.secrets["trainer"])
    names = (
        "import superbatch, sys; print([run.run_id for run in "
        "superbatch.connect(sys.argv[1]).list_runs()])"
    )
    environment = {"SUPERBATCH_CA": service.ca, "SUPERBATCH_TOKEN_FILE": str(tmp_path / "token")}
    assert "team-a-1" in in_python(names, service.address, environment)


def test_a_refused_push_is_in_the_audit_log(inputs, service):
    run = service.connect().open_run(spec(inputs, "team-a-3"))
    run.select(0, rank=0, world_size=1)
    bad = {name: tensor * float("nan") for name, tensor in weights(inputs, 0).items()}
    with pytest.raises(superbatch.WeightsRefused):
        run.push_weights(bad, step=0)
        run.flush()

    def told() -> list[tuple]:
        lines = [line for line in service.audited() if line["run"] == "team-a-3"]
        return [(line["what"], line.get("reason"), line["who"]) for line in lines]

    wait_until(lambda: ("push", "WEIGHTS_REFUSED", "trainer") in told())
    run.close()


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
    wait_until(lambda: "denied" in {line["what"] for line in service.audited()})


def test_metrics_may_need_a_token(service):
    for token, status in ((None, 401), ("reader", 403)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            service.metrics(token)
        assert caught.value.code == status
    assert "superbatch_access_refused_total" in service.metrics("admin")


def test_a_worker_answers_nobody_but_its_coordinator(service):
    trust, name = Path(service.ca).read_bytes(), ("grpc.ssl_target_name_override", "worker.test")
    with Channel(service.worker.address, trust, [name]) as channel:
        for method in ("FetchRows", "PrepareModel", "Score", "Select"):
            for metadata in ([], [("authorization", f"Bearer {service.secrets['admin']}")]):
                path = f"/superbatch.v1.WorkerService/{method}"
                with pytest.raises(Refused) as caught:
                    channel.call(path, [b""], metadata=metadata)
                assert caught.value.code == "UNAUTHENTICATED", method


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


def test_tokens_that_are_made_and_revoked_are_in_the_audit_log(tmp_path):
    tokens, audit = tmp_path / "tokens.yaml", tmp_path / "audit.jsonl"
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"audit": {"file": str(audit)}}))
    named_by = {
        "option": (("--audit", audit), {}),
        "file": (("--config", settings), {}),
        "environment": ((), {"SUPERBATCH_AUDIT__FILE": str(audit)}),
    }
    for name, (options, environment) in named_by.items():
        for act in ("new", "revoke"):
            ended = run(
                *("token", act, name, "--file", tokens, *options), env={**os.environ, **environment}
            )
            assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    told = [(line["what"], line["detail"]["token"], line["outcome"]) for line in lines]
    acts = ("token new", "token revoke")
    assert told == [(act, name, "accepted") for name in named_by for act in acts]
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"uid {os.getuid()}"
    assert {line["who"] for line in lines} == {user}
    # Settings of the environment that are wrong do not keep a token from being revoked.
    wrong = {**os.environ, "SUPERBATCH_AUDIT__FILES": "x"}
    assert run("token", "new", "last", "--file", tokens, env=wrong).returncode == 0
    ended = run("token", "revoke", "last", "--file", tokens, env=wrong)
    assert ended.returncode == 0 and "SUPERBATCH_AUDIT__FILES" in ended.stderr


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
