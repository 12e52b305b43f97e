"""The commands as people and scripts use them: what they print, where, and how they end."""

import json
import math
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import superbatch
from commands import CASE, USAGE, fails, prints, run
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_end_to_end import STEPS, choices, inputs, service, spec, train  # noqa: F401

from examples.demo import tiny

COMMANDS = (
    "serve",
    "worker",
    "check-config",
    "index",
    "embed",
    "inspect",
    "runs",
    "receipts",
    "select",
)


@pytest.fixture(scope="module")
def undisturbed(inputs, service) -> tuple[list, list]:
    """A run without steps ahead, so that nothing is under way and each listing says the same."""
    run = superbatch.connect(service.address).open_run(spec(inputs, "undisturbed", max_ahead=1))
    return train(run, inputs), choices(run)


@pytest.fixture(scope="module")
def state(service, undisturbed) -> str:
    """The state of a service that has a run of a few steps."""
    return service.state


def below(*command: str) -> list[tuple[str, ...]]:
    """The command, and all that are below it, as their own help lists them."""
    text = prints(*command, "--help")
    listed = text.partition("\nCommands:\n")[2].partition("\n\n")[0]
    names = [name for name in re.findall(r"^  ([a-z-]+)", listed, re.M) if name != "help"]
    # Of some commands a run's id comes before what is below them.
    of = ("my-run",) if re.search(r"^Usage: .*<RUN> <COMMAND>", text, re.M) else ()
    return [command, *(found for name in names for found in below(*command, *of, name))]


def test_help_of_every_command_has_examples_that_name_it():
    _, *commands = below()
    assert {("select",), ("state", "gc"), ("weights", "my-run", "rollback")} <= set(commands)
    assert {command[0] for command in commands} >= set(COMMANDS)
    for command in commands:
        examples = prints(*command, "--help").partition("\nExamples:\n")[2]
        assert re.search(rf"^  superbatch {' '.join(command)}\b", examples, re.M), command


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


def test_a_model_folder_is_inspected(inputs, tmp_path):
    folder = inputs / "learner"
    text = prints("inspect", folder)
    for said in (
        "siglip, embeddings of 16 numbers",
        "16 x 16 pixels in patches of 8; 1 layers of width 16, 2 heads, MLP 32",
        "padded ('<pad>', id 0) to 8",
        "finite, and so are embeddings on cpu",
        "scale 10.0",
    ):
        assert said in text, text
    found = json.loads(prints("inspect", folder.as_uri(), "--json"))
    with safe_open(folder / "model.safetensors", "np") as file:
        names = list(file.keys())
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    assert found["weights"]["tensors"] == len(names)
    assert found["weights"]["parameters"] == count
    names = [one["fidelity"] for one in found["fidelities"]]
    assert names == ["full", "resolution=8", "patch=16", "patch_dropout=0.5", "patch_dropout=0.75"]
    costs = [one["of_full"] for one in found["fidelities"]]
    assert costs[0] == 1 > max(costs[1:])
    assert found["image"]["resizes"]["kernel"] == "bilinear without antialiasing"
    clip = json.loads(prints("inspect", tiny.write_clip(tmp_path / "clip"), "--json"))
    assert clip["family"] == "clip" and clip["weights"]["logit_bias"] is None
    (tmp_path / "clip" / "model.safetensors").unlink()
    assert "a learner with first_push" in prints("inspect", tmp_path / "clip")


def test_a_model_folder_that_is_refused_says_why(inputs, tmp_path):
    assert "has no config.json" in fails("inspect", tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(inputs / "learner", folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    assert "make them agree" in fails("inspect", folder)
    config["model_type"] = "coca"
    (folder / "config.json").write_text(json.dumps(config))
    assert "model_type 'coca' is not supported" in fails("inspect", folder)
    shutil.copy(inputs / "learner" / "config.json", folder)
    weights = load_file(folder / "model.safetensors")
    weights["logit_bias"] = weights["logit_bias"] * float("nan")
    save_file(weights, folder / "model.safetensors")
    said = fails("inspect", folder)
    assert "logit_bias" in said and "finite" in said


def test_a_command_line_that_is_none_is_told_from_a_failure():
    assert "frobnicate" in fails("frobnicate", code=USAGE)
    assert "<RUN>" in fails("receipts", code=USAGE)
    assert "<SOURCE>" in fails("index", code=USAGE)
    assert "--embeddings" in fails("select", code=USAGE)
    assert "Usage: " in fails(code=USAGE)


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
    assert run["last_step"] == STEPS - 1
    assert (run["scanned"], run["selected"]) == (STEPS * 96, STEPS * 24)
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
        str(STEPS - 1),
        str(STEPS * 96),
        str(STEPS * 24),
        "24",
        "joint",
    ]


def test_receipts_say_why_a_batch_was_chosen(state, undisturbed):
    chosen = undisturbed[1]
    shown = [
        json.loads(line)
        for line in prints("receipts", "undisturbed", "--state", state, "--json").splitlines()
    ]
    assert [receipt["summary"]["step"] for receipt in shown] == list(range(STEPS))
    assert [
        [(row["id"], row["score"], row["position"]) for row in receipt["chosen"]]
        for receipt in shown
    ] == chosen
    (one,) = map(
        json.loads,
        prints("receipts", "undisturbed", "--step", 2, "--state", state, "--json").splitlines(),
    )
    assert one == shown[2]

    head, *lines = prints("receipts", "undisturbed", "--state", state, "--last", 2).splitlines()
    assert head.split()[:4] == ["step", "gen", "policy", "mode"] and len(lines) == 2
    assert [int(line.split()[0]) for line in lines] == [STEPS - 2, STEPS - 1]
    in_full = prints("receipts", "undisturbed", "--step", 2, "--state", state)
    assert (
        "undisturbed step 2 generation 0" in in_full
        and "joint learnability sigmoid, 3 chunks, seed 5" in in_full
    )
    assert "96 of super_batch_size 96, 0 holes" in in_full
    (scores,) = [line for line in in_full.splitlines() if line.startswith("scores")]
    number = r"-?\d+\.\d{5}"
    assert re.fullmatch(
        rf"scores +sub-batch {number} \(mean conditional score, of a uniform draw {number} "
        r"expected\), "
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
