"""Writes docs/python.md from the client's docstrings: python docs/site/python_page.py"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/python.md"
PACKAGE = ROOT / "client/python/python/superbatch"
HEAD = """# Python API

The package `superbatch`, for Python 3.11 to 3.13. [The tutorial](tutorial.md) and the
[recipes](recipes/README.md) show it at work. Every failed call raises `superbatch.Error`;
[errors](errors.md) has the cause and remedy of each reason.

Generated from the docstrings by `make docs`.
"""
CLIENT = ("client", "run", "batches", "spec", "record", "errors")
TORCH = (
    "loader",
    "transform",
    "losses",
    "pushes",
    "ranks",
    "fidelities",
    "exported",
    "exported_losses",
)
#: What each section documents: a module, the files that define its names, and the names, or the
#: file whose `__all__` has them.
SECTIONS = [
    ("superbatch", [f"_{name}.py" for name in CLIENT], "__init__.py"),
    ("superbatch.torch", [f"torch/{name}.py" for name in TORCH], "torch/__init__.py"),
    ("superbatch.torch.transformers", ["torch/transformers.py"], ["PushWeights"]),
    ("superbatch.torch.lightning", ["torch/lightning.py"], ["PushWeights"]),
    ("superbatch.open_clip", ["open_clip.py"], ["export", "write_tokenizer"]),
    ("superbatch.siglip", ["siglip.py"], ["write_tokenizer"]),
]
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FIELD = re.compile(r"^([a-z_]+(?:, [a-z_]+)*): ", re.MULTILINE)


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text())


def exported(init: str) -> list[str]:
    """The names of a package's `__all__`."""
    for node in tree(init).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise SystemExit(f"{init} has no __all__")


def is_method_shown(node: ast.AST) -> bool:
    return (
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not node.name.startswith("_")
        and ast.get_docstring(node) is not None
    )


def is_property(node: Definition) -> bool:
    return any(getattr(found, "id", "") == "property" for found in node.decorator_list)


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, bound: bool) -> str:
    given = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0].args
    given.args = given.args[bound:]
    kind = "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    told = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    parts = ", ".join(spaced(part) for part in split(ast.unparse(given)))
    line = f"{kind}{name}({parts}){told}"
    if len(line) <= 100:
        return line
    return f"{kind}{name}(\n    " + ",\n    ".join(split(parts)) + f",\n){told}"


def split(arguments: str) -> list[str]:
    """The arguments, cut at the commas between them."""
    parts, depth = [""], 0
    for sign in arguments:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def spaced(argument: str) -> str:
    """An argument with a default, as formatters write it."""
    if ":" not in argument:
        return argument
    return re.sub(r"(?<![=!<> ])=(?![= ])", " = ", argument, count=1)


def fields(node: ast.ClassDef) -> list[str]:
    """The fields of a dataclass, with their types and defaults."""
    if not any("dataclass" in ast.unparse(found) for found in node.decorator_list):
        return []
    return [
        ast.unparse(part)
        for part in node.body
        if isinstance(part, ast.AnnAssign) and not part.target.id.startswith("_")
    ]


def text(node: Definition) -> str:
    """The docstring as Markdown: lines "name: meaning" become a list, examples stay code."""
    docstring = ast.get_docstring(node) or ""
    lines: list[str] = []
    for line in docstring.splitlines():
        if FIELD.match(line):
            names, meaning = line.split(": ", 1)
            marked = ", ".join(f"`{name}`" for name in names.split(", "))
            if lines and lines[-1] and not lines[-1].startswith(("* ", "  ")):
                lines.append("")
            line = f"* {marked}: {meaning}"
        elif lines and lines[-1].startswith(("* ", "  ")) and line.strip():
            line = f"  {line.strip()}"
        lines.append(line)
    return "\n".join(lines)


def described(node: Definition, module: str) -> Iterator[str]:
    name = f"{module}.{node.name}"
    yield f"### {node.name}\n"
    if not isinstance(node, ast.ClassDef):
        yield f"```python\n{signature(node, name, bound=False)}\n```\n\n{text(node)}\n"
        return
    made = [part for part in node.body if getattr(part, "name", "") == "__init__"]
    if parts := fields(node):
        yield f"```python\n{name}(\n    " + ",\n    ".join(parts) + ",\n)\n```\n"
    elif made and module != "superbatch":
        plain = ast.parse(ast.unparse(made[0])).body[0]
        plain.returns = None
        yield f"```python\n{signature(plain, name, bound=True)}\n```\n"
    yield f"{text(node)}\n"
    for part in filter(is_method_shown, node.body):
        yield f"#### {node.name}.{part.name}\n"
        if not is_property(part):
            yield f"```python\n{signature(part, part.name, bound=True)}\n```\n"
        yield f"{text(part)}\n"


def page() -> str:
    lines = [HEAD]
    for module, names, wanted in SECTIONS:
        about = names[0]
        if isinstance(wanted, str):
            about, wanted = wanted, exported(wanted)
        # Its first paragraph: examples follow it.
        lines += [f"## {module}\n", (ast.get_docstring(tree(about)) or "").split("\n\n")[0] + "\n"]
        found = {
            node.name: node
            for name in names
            for node in tree(name).body
            if isinstance(node, Definition) and node.name in wanted
        }
        # Constants have no definition of a kind that is described.
        if lost := {name for name in wanted if not name.isupper()} - set(found):
            raise SystemExit(f"{module}: no file of SECTIONS defines {', '.join(sorted(lost))}")
        for node in found.values():
            lines += described(node, module)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
