"""Stubs, words, defaults and the documentation's examples."""

import ast
import dataclasses
import inspect
import re
import tomllib
import typing
from pathlib import Path

import pytest
import superbatch_kernels
from superbatch_kernels import Criterion, Loss, Policy, Selection, _kernels, select

ROOT = Path(__file__).parents[3]


def test_words_and_defaults_are_the_kernels():
    assert [list(typing.get_args(words)) for words in (Policy, Loss, Criterion)] == _kernels.words()
    parameters = inspect.signature(select).parameters
    assert {name: parameters[name].default for name in _kernels.defaults()} == _kernels.defaults()


def test_the_clients_extra_is_this_version():
    client = tomllib.loads((ROOT / "client/python/pyproject.toml").read_text())
    assert client["project"]["optional-dependencies"]["kernels"] == [
        f"superbatch-kernels=={superbatch_kernels.__version__}"
    ]


def test_the_stub_says_what_the_extension_has():
    stub = ast.parse(Path(superbatch_kernels.__file__).with_name("_kernels.pyi").read_text())
    functions = {
        node.name: [argument.arg for argument in node.args.args]
        for node in stub.body
        if hasattr(node, "args")
    }
    public = {name for name in dir(_kernels) if not name.startswith("_")}
    assert set(functions) == public
    for name, parameters in functions.items():
        assert list(inspect.signature(getattr(_kernels, name)).parameters) == parameters


def test_every_argument_is_explained():
    named = set(
        re.findall(r"^ {8}(\w+): ", inspect.getdoc(select).replace("\n    ", "\n        "), re.M)
    )
    assert set(inspect.signature(select).parameters) <= named
    body = ast.parse(inspect.getsource(Selection)).body[0].body
    pairs = [
        (field, text) for field, text in zip(body, body[1:]) if isinstance(field, ast.AnnAssign)
    ]
    explained = [field.target.id for field, text in pairs if isinstance(text, ast.Expr)]
    assert explained == [field.name for field in dataclasses.fields(Selection)]


@pytest.mark.parametrize("page", ["docs/kernels-python.md", "scoring-kernels/python/README.md"])
def test_the_examples_of_a_page_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "example"})
