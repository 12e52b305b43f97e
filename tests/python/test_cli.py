"""The commands as people and scripts use them: what they print, where, and how they end."""

import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS
from safetensors import safe_open
from safetensors.numpy import save_file
from test_end_to_end import STEPS, inputs, service, spec, undisturbed  # noqa: F401

GOLDEN = Path(__file__).parents[2] / "scoring-kernels" / "tests" / "golden"
CASE = GOLDEN / "joint-sigmoid-learnability-B64-b16-N4.safetensors"
COMMANDS = ("serve", "worker", "check-config", "index", "runs", "receipts", "select")
# How clap ends for a command line that it cannot parse.
USAGE = 2


def run(*arguments, **settings) -> subprocess.CompletedProcess:
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.run(
        [BINARY, *map(str, arguments)], text=True, timeout=DEADLINE_SECONDS, **settings
    )


def prints(*arguments) -> str:
    ended = run(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def fails(*arguments, code: int = 1) -> str:
    """The one line of an error. Nothing of it, and no half of a result, goes to standard output."""
    ended = run(*arguments)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert "panicked" not in ended.stderr
    if code == USAGE:
        return ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("superbatch: ")]
    assert len(said) == 1, ended.stderr
    return said[0]


@pytest.fixture(scope="module")
def state(service, undisturbed) -> str:
    """The state of a service that has a run of a few steps."""
    return service.state


# ------------------------------------------------------------------------------------------------------------
# help


def test_help_teaches(tmp_path):
    help_text = prints("--help")
    assert all(f"\n  {command} " in help_text for command in COMMANDS)
    assert "superbatch serve" in help_text and "superbatch.connect(" in help_text
    assert re.fullmatch(r"superbatch \d+\.\d+\.\d+\S*\n", prints("--version"))
    for command in COMMANDS:
        text = prints(command, "--help")
        options = re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", text, re.M)
        # A selection from a file has neither a service nor a state.
        assert {"--help"} | ({"--config", "--state"} if command != "select" else set()) <= set(
            options
        ), command
        # Every option says what it is for, beside it or below.
        assert all(re.search(rf"{option}(?: <[^>]*>)?\s+[A-Z]", text) for option in options), (
            command
        )


def test_a_command_line_that_is_none_is_told_from_a_failure():
    assert "frobnicate" in fails("frobnicate", code=USAGE)
    assert "<RUN>" in fails("receipts", code=USAGE)
    assert "<SOURCE>" in fails("index", code=USAGE)
    assert "--embeddings" in fails("select", code=USAGE)
    assert "Usage: " in fails(code=USAGE)


# ----------------------------------------------------------------------------------------------------------
# config


def written(folder: Path, text: str) -> Path:
    path = folder / "service.yaml"
    path.write_text(text)
    return path


def test_a_good_config_is_printed_with_all_defaults_and_is_one_itself(tmp_path):
    path = written(tmp_path, "coordinator: {lease_seconds: 7}\nstate: s3://bucket/prefix\n")
    shown = prints("check-config", "--config", path)
    assert (
        shown.startswith("# ok\n")
        and "lease_seconds: 7.0\n" in shown
        and "grace_seconds: 30.0\n" in shown
    )
    assert prints("check-config", "--config", written(tmp_path, shown)) == shown
    assert "\nstate: memory:///x\n" in prints(
        "check-config", "--config", path, "--state", "memory:///x"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "coordinator: {leese_seconds: 3}",
            ["coordinator.leese_seconds", "did you mean coordinator.lease_seconds"],
        ),
        ("coordinator: {max_runs: many}", ["coordinator.max_runs", '"many"']),
        ("coordinator: {lease_seconds: 0}", ["coordinator.lease_seconds", "above 0"]),
        ("worker: {device: quantum}", ["worker.device", "cuda"]),
        ("state: [1]", ["state"]),
        ("state: http://foo/bar", ["state", "'http://foo/bar'", "use file, s3, gs, az or memory"]),
        (
            "listen: localhost:50171",
            ["listen", '"localhost:50171"', "an IP address and port such as 127.0.0.1:50051"],
        ),
        ("- 1", ["mapping"]),
        ("a: [1\n", ["not YAML", "line"]),
    ],
)
def test_a_bad_config_is_refused_by_file_and_field(tmp_path, text, says):
    path = written(tmp_path, text)
    said = fails("check-config", "--config", path)
    assert all(part in said for part in says), said
    assert str(path) in said, "it does not say which file"
    # The service itself refuses it in the same words.
    assert fails("serve", "--config", path) == said


def test_a_config_that_is_not_there_and_a_misspelt_variable(tmp_path):
    assert str(tmp_path / "none.yaml") in fails("check-config", "--config", tmp_path / "none.yaml")
    ended = run("check-config", env={**os.environ, "SUPERBATCH_COORDINATOR__MAX_RUN": "1"})
    assert ended.returncode == 1
    assert (
        "SUPERBATCH_COORDINATOR__MAX_RUN" in ended.stderr and "coordinator.max_runs" in ended.stderr
    )


# -----------------------------------------------------------------------------------------------------------
# start


def test_ports_in_use_and_hosts_beyond_this_machine_end_a_start(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for config, field in [
            ({"listen": address}, "listen"),
            ({"listen": "127.0.0.1:0", "metrics_listen": address}, "metrics_listen"),
        ]:
            path = written(tmp_path, json.dumps({"state": tmp_path.as_uri(), **config}))
            said = fails("serve", "--config", path)
            assert f"cannot listen on {address}" in said and f"`{field}`" in said
        config = {"state": tmp_path.as_uri(), "worker_role": {"listen": address}}
        said = fails("worker", "--config", written(tmp_path, json.dumps(config)))
        assert f"cannot listen on {address}" in said and "`worker_role.listen`" in said
    for command in ("serve", "worker"):
        assert "allow_insecure" in fails(
            command, "--listen", "0.0.0.0:0", "--state", tmp_path.as_uri()
        )
    path = written(tmp_path, '{"listen": "0.0.0.0:0", "allow_insecure": true}')
    assert "storage.allow_uris" in fails("serve", "--config", path, "--state", tmp_path.as_uri())


def test_states_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for command in ("serve", "worker"):
        said = fails(command, "--listen", "127.0.0.1:0", "--state", (tmp_path / "file").as_uri())
        assert (tmp_path / "file").as_uri() in said
        assert "the setting `state`" in said
    assert "what://x" in fails("runs", "--state", "what://x")
    assert "as in file:///state" in fails("runs", "--state", "file://state")
    for command in ("serve", "worker"):
        assert "give an IP address and port" in fails(
            command, "--listen", "localhost:0", code=USAGE
        )


# -------------------------------------------------------------------------------------------------
# index, runs, receipts


def test_index_says_what_it_found_and_a_run_finds_it(inputs, service):
    source = (inputs / "pool").as_uri()
    text = prints("index", source, "--state", service.state)
    found = json.loads(prints("index", source, "--state", service.state, "--json"))
    assert f"dataset manifest {found['digest']}" in text and "2 shards, 12 blocks, 768 rows" in text
    assert "image in 'png', caption in 'caption'" in text
    assert (found["rows"], found["sources"][0]["uri"]) == (768, source)
    assert {column["name"] for column in found["sources"][0]["columns"]} == {
        "key",
        "png",
        "caption",
        "kind",
        "split",
    }
    run = superbatch.connect(service.address).open_run(spec(inputs, "indexed"))
    assert run.dataset.dataset_manifest == found["digest"]


def test_index_refuses_what_is_no_data(inputs, tmp_path):
    state = ("--state", tmp_path.as_uri())
    assert (tmp_path / "none").as_uri() in fails("index", (tmp_path / "none").as_uri(), *state)
    said = fails("index", (inputs / "pool").as_uri(), "--image-column", "colour", *state)
    assert "'colour'" in said and "png" in said and "caption" in said
    assert "file:///" in fails("index", inputs / "pool", *state), "a path is told how to be a URI"


def test_runs_are_listed_for_people_and_programs(state, tmp_path):
    assert prints("runs", "--state", tmp_path.as_uri()) == f"no runs in {tmp_path.as_uri()}\n"
    assert prints("runs", "--state", tmp_path.as_uri(), "--json") == ""
    known = {
        run["run"]: run
        for run in map(json.loads, prints("runs", "--state", state, "--json").splitlines())
    }
    run = known["undisturbed"]
    wanted = {"state": "open", "generation": 0, "policy": "joint", "sub_batch": 24, "failure": None}
    assert {name: run[name] for name in wanted} == wanted
    steps = run["last_step"] + 1
    assert steps >= STEPS and (run["scanned"], run["selected"]) == (steps * 96, steps * 24)
    head, *lines = prints("runs", "--state", state).splitlines()
    assert head.split() == [
        "run",
        "state",
        "generation",
        "last_step",
        "scanned",
        "selected",
        "sub_batch",
        "policy",
    ]
    (line,) = [line.split() for line in lines if line.startswith("undisturbed ")]
    assert line[1:] == [
        "open",
        "0",
        str(steps - 1),
        str(steps * 96),
        str(steps * 24),
        "24",
        "joint",
    ]


def test_receipts_say_why_a_batch_was_chosen(state, undisturbed):
    chosen = undisturbed[1]
    shown = [
        json.loads(line)
        for line in prints("receipts", "undisturbed", "--state", state, "--json").splitlines()
    ]
    assert [receipt["summary"]["step"] for receipt in shown[:STEPS]] == list(range(STEPS))
    assert [
        [(row["id"], row["score"], row["position"]) for row in receipt["chosen"]]
        for receipt in shown[:STEPS]
    ] == chosen
    (one,) = map(
        json.loads,
        prints("receipts", "undisturbed", "--step", 2, "--state", state, "--json").splitlines(),
    )
    assert one == shown[2]

    head, *lines = prints("receipts", "undisturbed", "--state", state, "--last", 2).splitlines()
    assert head.split()[:4] == ["step", "gen", "policy", "mode"] and len(lines) == 2
    assert [int(line.split()[0]) for line in lines] == [len(shown) - 2, len(shown) - 1]
    in_full = prints("receipts", "undisturbed", "--step", 2, "--state", state)
    assert (
        "undisturbed step 2 generation 0" in in_full
        and "joint learnability sigmoid, 3 chunks, seed 5" in in_full
    )
    assert "96 of super_batch_size 96, 0 holes" in in_full
    (scores,) = [line for line in in_full.splitlines() if line.startswith("scores")]
    number = r"-?\d+\.\d{5}"
    assert re.fullmatch(
        rf"scores +sub-batch {number} \(mean conditional score, of a uniform draw {number} expected\), "
        rf"chosen {number} and candidates {number} "
        r"\(mean unconditional scores\)",
        scores,
    )
    drawn = [line.split() for line in in_full.splitlines() if re.match(r" *\d+ +\d+ ", line)]
    assert [row[-1] for row in drawn] == [row[0] for row in chosen[2]]


def test_receipts_that_are_not_there(state, tmp_path):
    said = fails("receipts", "nobody", "--state", state)
    assert f"no run 'nobody' in the state {state}; `superbatch runs`" in said and "--state" in said
    said = fails("receipts", "nobody", "--state", tmp_path.as_uri())
    assert (
        f"no run 'nobody' in the state {tmp_path.as_uri()}, where nothing is; name" in said
        and "--state" in said
    )
    (tmp_path / "datasets").mkdir()
    assert "which holds no runs" in fails(
        "receipts", "nobody", "--step", 1, "--state", tmp_path.as_uri()
    )
    assert "at least 1" in fails("receipts", "nobody", "--last", 0, "--state", state, code=USAGE)
    assert "step 999 of run 'undisturbed'" in fails(
        "receipts", "undisturbed", "--step", 999, "--state", state
    )
    assert "--step" in fails(
        "receipts", "undisturbed", "--generation", 0, "--state", state, code=USAGE
    )


# ----------------------------------------------------------------------------------------------------------
# select


@pytest.mark.parametrize(
    "path",
    [
        CASE,
        *(
            GOLDEN / f"{name}.safetensors"
            for name in (
                "joint-sigmoid-hard-B256-b51-N16",
                "joint-softmax-learnability-B64-b16-N4",
                "independent-softmax-easy-B64-b16-N4",
            )
        ),
    ],
    ids=lambda path: path.stem,
)
def test_select_draws_what_the_oracle_says_on_every_backend(path):
    with safe_open(path, "np") as file:
        expected, metadata = file.get_tensor("expected").tolist(), file.metadata()
    for backend in ("native", "torch"):
        drawn = json.loads(prints("select", "--embeddings", path, "--backend", backend))
        assert drawn["indices"] == expected, backend
        assert sum(drawn["chunks"]) == int(metadata["b"])
        assert set(drawn["seconds"]) == {"load", "select"}
        if "batch_score" in metadata:
            assert drawn["batch_score"] == pytest.approx(float(metadata["batch_score"]), rel=1e-4)


def test_select_takes_flags_before_the_file_and_says_what_is_wrong(tmp_path):
    drawn = json.loads(
        prints(
            "select", "--embeddings", CASE, "--sub-batch-size", 7, "--n-chunks", 3, "--threads", 1
        )
    )
    assert drawn["chunks"] == [3, 2, 2] and len(set(drawn["indices"])) == 7
    assert "100" in fails("select", "--embeddings", CASE, "--sub-batch-size", 100)
    assert str(tmp_path / "none") in fails("select", "--embeddings", tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    assert "not a safetensors file" in fails("select", "--embeddings", tmp_path / "text")
    assert "joint" in fails("select", "--embeddings", CASE, "--policy", "best", code=USAGE)
    said = fails("select", "--embeddings", CASE, "--temperature", 2)
    assert (
        "temperature belongs to policy independent, and the policy is joint; leave it out" in said
    )


def test_select_warns_of_rows_that_are_not_normalised(tmp_path):
    with safe_open(CASE, "np") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    assert run("select", "--embeddings", CASE).stderr == ""
    tensors["learner_txt"] = 3 * tensors["learner_txt"]
    save_file(tensors, tmp_path / "long.safetensors", metadata)
    ended = run("select", "--embeddings", tmp_path / "long.safetensors")
    assert (ended.returncode, len(json.loads(ended.stdout)["indices"])) == (0, 16)
    (said,) = ended.stderr.splitlines()
    assert said.startswith(
        "superbatch: warning: learner text: rows are not L2-normalised (median norm 3.000, candidate "
    ), said


# -----------------------------------------------------------------------------------------------------------
# pipes


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("check-config", "--state"),
        ("runs", "--state"),
        ("receipts", "undisturbed", "--json", "--state"),
        ("receipts", "undisturbed", "--step", "0", "--state"),
        ("select", "--embeddings", str(CASE)),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_reader_that_has_gone_ends_a_command_in_silence(state, arguments):
    """As in `superbatch receipts RUN | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = run(*arguments, *([state] if arguments[-1] == "--state" else []), stdout=writer)
    finally:
        os.close(writer)
    assert ended.stderr == ""


# --------------------------------------------------------------------------------------------------------
# policies


def test_select_draws_by_every_policy_and_leaves_out_what_it_is_told_to():
    select = lambda *flags: json.loads(prints("select", "--embeddings", CASE, "--seed", 1, *flags))  # noqa: E731
    size = {
        policy: len(set(select("--policy", policy)["indices"]))
        for policy in (
            "uniform",
            "independent",
            "joint",
            "joint_top_k",
            "top_k",
            "rank",
            "proportional",
            "k_center",
        )
    }
    assert set(size.values()) == {16}
    assert "weights" not in select("--policy", "rank")
    weights = select("--policy", "proportional", "--weight-exponent", 1)["weights"]
    assert len(weights) == 16 and max(weights) == 1 and min(weights) > 0
    cold = select("--policy", "independent", "--temperature", 1e-9)["indices"]
    assert sorted(cold) == sorted(select("--policy", "top_k")["indices"])
    thinned = select("--policy", "top_k", "--clip-score-at-least", 0.05)
    assert 0 < thinned["left_out"] <= 48
    assert "temperature" in fails(
        "select", "--embeddings", CASE, "--policy", "independent", "--temperature", 0
    )
