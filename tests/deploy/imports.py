"""What Python code imports when it runs, found in its text, and what a command of pip installs."""

import ast
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tools import ROOT

#: Where an image has the packages that are made of this repository's own files.
OWN = {
    "demo": ROOT / "docker" / "demo",
    "examples": ROOT / "examples",
    "superbatch": ROOT / "client" / "python" / "python" / "superbatch",
}
#: Of these, what a function imports is for whoever calls it: extras that a user installs.
OPTIONAL_WITHIN = {"superbatch"}
#: Extensions in Rust, which have no text.
BUILT = {"superbatch._superbatch", "superbatch_kernels"}


def source(module: str) -> Path | None:
    """The file of a module of our own."""
    first, *rest = module.split(".")
    if first not in OWN:
        return None
    path = OWN[first].joinpath(*rest)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file if file.is_file() else None


def is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST, into_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not into_functions:
            continue
        elif not is_for_checkers(child):
            yield from statements(child, into_functions)


def imported(module: str) -> Iterator[str]:
    """The modules that a module of our own imports, by their whole names."""
    file = source(module)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(file.read_text())
    for found in statements(tree, module.split(".")[0] not in OPTIONAL_WITHIN):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
            continue
        above = package.split(".")[: len(package.split(".")) - found.level + 1]
        base = ".".join([*(above if found.level else []), *filter(None, [found.module])])
        yield base
        for alias in found.names:
            if source(f"{base}.{alias.name}"):
                yield f"{base}.{alias.name}"


def foreign(module: str) -> dict[str, str]:
    """The packages of others that the module imports, directly or through modules of our own, each
    with one that imports it.
    """
    seen, found, waiting = set(), {}, [module]
    while waiting:
        module = waiting.pop()
        # A folder without `__init__.py` is a package, too, and imports nothing.
        if module in seen or not source(module):
            continue
        seen.add(module)
        if "." in module:
            waiting.append(module.rpartition(".")[0])
        for name in imported(module):
            first = name.split(".")[0]
            if source(name):
                waiting.append(name)
            elif first in OWN:
                assert name in BUILT, f"{module} imports {name}, which is not there"
            elif first not in sys.stdlib_module_names and first not in BUILT:
                found.setdefault(first, module)
    return found


def installed(requirements: list[str]) -> set[str]:
    """What pip installs for these requirements: they, and what they need, as the packages here
    say.
    """
    seen, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) in seen:
            continue
        seen.add((name, *sorted(wanted.extras)))
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            extras = wanted.extras or {""}
            if not need.marker or any(need.marker.evaluate({"extra": each}) for each in extras):
                waiting.append(need)
    return {name for name, *_ in seen}


def distributions(package: str) -> set[str]:
    """The names under which PyPI has what is imported as `package`."""
    return {canonicalize_name(name) for name in metadata.packages_distributions().get(package, [])}
