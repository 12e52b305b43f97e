"""Wrong arguments are refused by name, with what was given and what to give instead."""

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import superbatch
import torch
from superbatch import _weights
from superbatch._arguments import file_uri, whole
from superbatch._run import placed


def refused(field: str, call, *arguments, **keywords) -> str:
    with pytest.raises(superbatch.Error) as caught:
        call(*arguments, **keywords)
    assert (caught.value.reason, caught.value.metadata) == ("INVALID_ARGUMENT", {"field": field})
    assert str(caught.value).startswith(f"{field}: ")
    return str(caught.value)


A_PHASE = superbatch.Phase(policy="uniform", super_batch_size=8, sub_batch_size=8)


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        (
            {"lag": 1},
            "lag",
            "cannot be 1; give superbatch.exact(n) or superbatch.at_most(n), such as "
            "superbatch.exact(1)",
        ),
        ({"lag": "fresh"}, "lag", "superbatch.exact(1)"),
        ({"phases": A_PHASE}, "phases", "cannot be a Phase; give a list"),
        ({"phases": [A_PHASE, "joint"]}, "phases[1]", "superbatch.Phase(policy="),
        ({"phases": [replace(A_PHASE, tuning=0.95)]}, "phases[0].tuning", "superbatch.Tuning("),
        ({"sources": "file:///data"}, "sources", "give a list: ['file:///data']"),
        ({"sources": Path("/data")}, "sources", "give a list"),
        ({"sources": superbatch.Source(uri="file:///data")}, "sources", "give a list"),
        ({"sources": ["file:///data", 3]}, "sources[1]", "cannot be 3"),
        ({"sources": ["file:///data", Path("data")]}, "sources[1]", "an absolute path"),
        ({"sources": [superbatch.Source(uri=Path("data"))]}, "sources[0].uri", "an absolute path"),
        ({"columns": "url"}, "columns", "give a list: ['url']"),
        ({"learner": "file:///model"}, "learner", "superbatch.Learner(model_uri="),
        ({"reference": 3}, "reference", "superbatch.Reference(model_uri="),
        ({"fork_of": "other"}, "fork_of", "superbatch.Fork(run_id="),
        ({"run_id": 7}, "run_id", "cannot be 7; give a string"),
    ],
)
def test_what_is_no_part_of_a_spec_is_refused_by_name(spec, change, field, said):
    assert said in refused(field, replace(spec, **change).to_dict)


def test_an_absolute_path_is_its_uri(spec):
    learner = superbatch.Learner(model_uri=Path("/models/a b"))
    given = replace(
        spec, sources=[Path("/data/{0..3}/*.parquet")], learner=learner, reference=Path("/models/r")
    )
    plain = given.to_dict()
    assert plain["sources"] == [{"uri": "file:///data/{0..3}/*.parquet"}]
    assert plain["learner"] == {"model_uri": "file:///models/a%20b"}
    assert plain["reference"] == {"model_uri": "file:///models/r"}
    assert file_uri("uri", Path("/a%b")) == "file:///a%25b"


@pytest.mark.parametrize("uri", [50171, None, Path("/socket")])
def test_a_uri_is_a_string(uri):
    assert "http://HOST:PORT" in refused("uri", superbatch.connect, uri)


def test_bounds_of_retries_are_numbers():
    absent = "http://127.0.0.1:1"
    assert "'5'" in refused("retry_seconds", superbatch.connect, absent, retry_seconds="5")
    refused("retry_seconds", superbatch.connect, absent, retry_seconds=-1)
    refused("timeout", superbatch.connect, absent, timeout=None)
    refused("retry_attempts", superbatch.connect, absent, retry_attempts=-1)


def test_numbers_are_whole_and_within_the_protocols_bounds():
    assert (whole("step", numpy.int64(3)), whole("step", torch.tensor(3))) == (3, 3)
    assert "cannot be -1; give a whole number of at least 0" in refused("step", whole, "step", -1)
    for value in (1.5, "1", None, 1 << 64):
        refused("step", whole, "step", value)
    assert "at least 0" in refused("rank", placed, -1, 2)
    refused("rank", placed, 1 << 32, 2)
    refused("world_size", placed, 0, 0)


def test_a_run_is_opened_by_a_spec_and_named_by_a_string(silent, spec):
    client = superbatch.connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "superbatch.RunSpec(" in refused("spec", client.open_run, "demo")
    refused("incarnation", client.open_run, spec, incarnation=1)
    refused("run_id", client.get_run, 1)
    refused("run_id", client.close_run, 1)


def test_weights_are_a_state_dict():
    assert "cannot be a Sequential; give what it holds: model.state_dict()" in refused(
        "state_dict",
        _weights.blocks,
        torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(9))),
        0,
    )
    assert "model.state_dict()" in refused("state_dict", _weights.blocks, [torch.ones(1)], 0)
