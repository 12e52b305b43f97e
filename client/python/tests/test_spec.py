"""Run specs cross to the Rust client as dicts, which refuses what it does not know."""

from dataclasses import fields, replace

import pytest
import superbatch
from superbatch import _superbatch

POLICIES = (
    "uniform",
    "independent",
    "joint",
    "joint_top_k",
    "top_k",
    "rank",
    "proportional",
    "k_center",
)


def refused(spec: dict) -> superbatch.Error:
    with pytest.raises(superbatch.Error) as caught:
        _superbatch.check_spec(spec)
    assert caught.value.reason == "INVALID_ARGUMENT"
    return caught.value


def test_a_full_spec_is_accepted(spec):
    plain = spec.to_dict()
    _superbatch.check_spec(plain)
    assert "run_id" not in plain and "epochs" not in plain
    assert plain["sources"] == [
        {"uri": "file:///data/{00000..00003}.parquet"},
        {"uri": "s3://b/p", "weight": 2.0},
    ]
    assert plain["reference"] == {"model_uri": "file:///models/reference"}
    assert plain["lag"] == {"exact": 1}
    assert plain["phases"][1]["n_chunks"] == 4 and "gain" not in plain["phases"][0]


def test_every_field_of_the_protocol_can_be_given(spec):
    full = replace(
        spec,
        reference=superbatch.Reference(model_uri="file:///r", logit_bias=-10.0),
        learner=superbatch.Learner(
            model_uri="file:///l",
            first_push=True,
            logit_bias=-9.5,
            trained_fidelities=[superbatch.Approximation(resolution=8)],
        ),
        lag=superbatch.at_most(2),
        push_every_steps=2,
        micro_batches=2,
        fallback="serve_flagged",
        max_ahead=3,
        epochs=1,
        window_blocks=4,
        embedding_dtype="f32",
        micro_batch_rows=32,
        max_bad_row_share=0.5,
        fork_of=superbatch.Fork(run_id="other", step=3),
        compute_dtype="bf16",
        train_flops_per_example=1e9,
        need_deadline_seconds=5.0,
        phases=[
            superbatch.Phase(
                policy=policy,
                super_batch_size=64,
                sub_batch_size=16,
                from_step=step,
                criterion="hard",
                n_chunks=4,
                gain=1.0,
                fidelity="approximate",
                approximation=superbatch.Approximation(resolution=16),
                allow_untrained_fidelity=True,
                multi_resolution=superbatch.MultiResolution(share=0.25, whole_step=False),
                tuning=superbatch.Tuning(
                    **{field.name: 0.5 for field in fields(superbatch.Tuning)}
                ),
            )
            for step, policy in enumerate(POLICIES)
        ],
    )
    assert None not in full.to_dict().values()
    assert len(full.to_dict()["phases"][0]["tuning"]) == 7
    _superbatch.check_spec(full.to_dict())


@pytest.mark.parametrize(
    ("change", "field", "valid"),
    [
        ({"batch_size": 64}, "batch_size", "micro_batch_rows"),
        ({"loss": "hinge"}, "loss", "sigmoid, softmax"),
        ({"fallback": "unspecified"}, "fallback", "wait, serve_flagged, uniform, reference_only"),
        ({"fallback": "UNSPECIFIED"}, "fallback", "wait, serve_flagged, uniform, reference_only"),
        ({"phases": [{"policy": "best"}]}, "phases[0].policy", ", ".join(POLICIES)),
        ({"phases": [{"tuning": {"heat": 1}}]}, "phases[0].tuning.heat", "temperature, pressure"),
        ({"phases": [{"tuning": {"pressure": "high"}}]}, "phases[0].tuning.pressure", ""),
        (
            {"phases": [{"approximation": {"size": 1}}]},
            "phases[0].approximation.size",
            "resolution",
        ),
        (
            {"phases": [{"multi_resolution": {"share": 0}}]},
            "phases[0].multi_resolution.share",
            "leave it out",
        ),
        ({"phases": [{"policy": "joint", "size": 1}]}, "phases[0].size", "super_batch_size"),
        ({"phases": [{}, {"sub_batch_size": -1}]}, "phases[1].sub_batch_size", ""),
        ({"learner": {"model_uri": 3}}, "learner.model_uri", ""),
        ({"learner": {"random_seed": 1, "first_push": True}}, "learner.initial", "random_seed"),
        ({"lag": {"exact": 1, "at_most": 1}}, "lag", "exact"),
        ({"seed": "seven"}, "seed", ""),
        ({"sources": [{"weight": 0}]}, "sources[0].weight", "leave it out"),
        ({"phases": [{"gain": 0.0}]}, "phases[0].gain", "leave it out"),
        ({"max_bad_row_share": 0}, "max_bad_row_share", "leave it out"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_valid(change, field, valid):
    error = refused(change)
    assert error.metadata["field"] == field
    assert valid in str(error)


def test_a_first_push_that_is_off_is_no_choice():
    _superbatch.check_spec(
        {"learner": {"model_uri": "m", "first_push": False, "snapshot_uri": "s"}}
    )
