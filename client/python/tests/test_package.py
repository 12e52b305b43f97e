"""Batches, records, exceptions and stubs."""

import ast
import inspect
import pickle
from pathlib import Path

import pyarrow
import pytest
import superbatch
from superbatch import _superbatch
from superbatch._record import record


def a_batch():
    rows = pyarrow.record_batch({"image": [b"1", b"2"], "caption": ["a", "b"]})
    return superbatch.Batch(rows, {"learner": {"version": 3}, "scanned": [{"count": 8}]}, 5, 0, 2)


def test_a_batch_gives_its_columns_and_its_receipt():
    batch = a_batch()
    assert len(batch) == 2
    assert batch["caption"].to_pylist() == ["a", "b"]
    assert batch.table.num_rows == 2
    assert batch.receipt.learner.version == 3 and batch.receipt.scanned[0].count == 8
    with pytest.raises(KeyError, match="image, caption"):
        batch["label"]
    again = pickle.loads(pickle.dumps(batch))
    assert again.record_batch == batch.record_batch and again.receipt == batch.receipt
    assert isinstance(again.receipt.learner, superbatch.Record)


def test_a_record_says_what_it_has():
    with pytest.raises(AttributeError, match="state, step"):
        record({"state": "open", "step": 1}).status


def test_exceptions_keep_reason_and_metadata_when_pickled():
    from superbatch._errors import from_reason

    error = from_reason("WEIGHTS_REFUSED", "not finite", {"tensor": "w"})
    assert isinstance(error, superbatch.WeightsRefused)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.reason, again.metadata, str(again)) == (
        superbatch.WeightsRefused,
        "WEIGHTS_REFUSED",
        {"tensor": "w"},
        "not finite",
    )
    assert type(from_reason("COLUMN_NOT_FOUND", "", {})) is superbatch.Error


def test_the_stubs_say_what_the_extension_has():
    stubs = ast.parse(Path(superbatch.__file__).with_name("_superbatch.pyi").read_text())
    members = [node for node in stubs.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    public = {name for name in dir(_superbatch) if not name.startswith("_")}
    assert {node.name for node in members} == public
    for node in members:
        real = getattr(_superbatch, node.name)
        if isinstance(node, ast.FunctionDef):
            assert parameters(node) == list(inspect.signature(real).parameters)
            continue
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        assert {item.name for item in methods} == {
            name for name in dir(real) if not name.startswith("_")
        }
        for item in methods:
            if not item.decorator_list:
                assert parameters(item) == list(
                    inspect.signature(getattr(real, item.name)).parameters
                ), item.name


def test_everything_public_says_what_it_is():
    things = {name: getattr(superbatch, name) for name in superbatch.__all__}
    things |= {
        f"torch.{name}": thing for name, thing in vars(superbatch.torch).items() if own(name, thing)
    }
    for name, thing in list(things.items()):
        things |= {
            f"{name}.{item}": member for item, member in vars(thing).items() if own(item, member)
        }
    assert "Run.push_weights" in things and "torch.SelectedBatches.loader" in things
    assert [name for name, thing in things.items() if not inspect.getdoc(thing)] == []


def own(name: str, thing: object) -> bool:
    """Whether it is a class, a method or a property of the package."""
    if isinstance(thing, property):
        thing = thing.fget
    return (
        not name.startswith("_") and callable(thing) and thing.__module__.startswith("superbatch")
    )


def test_a_stub_calls_a_property_what_is_one():
    stubs = ast.parse(Path(superbatch.__file__).with_name("_superbatch.pyi").read_text())
    for node in stubs.body:
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            real = inspect.getattr_static(getattr(_superbatch, node.name), item.name)
            assert bool(item.decorator_list) == inspect.isgetsetdescriptor(real), item.name


def parameters(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in node.args.args]
