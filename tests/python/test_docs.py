"""Links of the repository's Markdown files, and pages that are generated or held to other files."""

import importlib.util
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import superbatch

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*\b(?:href|src)=\"([^\"]+)\"")


def tracked(ending: str) -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", f"*{ending}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in found.stdout.splitlines() if (ROOT / name).exists()]


def prose(text: str) -> list[str]:
    """Lines outside of fences."""
    lines, fence = [], ""
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if fence:
            fence = "" if line.strip() == fence else fence
        elif mark:
            fence = mark[1]
        else:
            lines.append(line)
    return lines


def slug(heading: str) -> str:
    """The anchor that a heading has on a forge: lower case, blanks as hyphens, without signs."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    found: set[str] = set()
    for line in prose(page.read_text()):
        found |= set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", line))
        if heading := re.match(r"#{1,6} (.*)", line):
            name, count = slug(heading[1]), 0
            while (name if count == 0 else f"{name}-{count}") in found:
                count += 1
            found.add(name if count == 0 else f"{name}-{count}")
    return found


def broken(page: Path) -> list[str]:
    """What is wrong with the links of a page."""
    faults = []
    text = "\n".join(re.sub(r"`[^`]*`", "", line) for line in prose(page.read_text()))
    for link in LINK.findall(text) + HTML_LINK.findall(text):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        way, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / way)) if way else page
        if not target.is_relative_to(ROOT) or not target.exists():
            faults.append(f"{page.relative_to(ROOT)}: {link}: there is no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            faults.append(f"{page.relative_to(ROOT)}: {link}: the page has no such heading")
    return faults


def test_every_link_of_every_page_leads_somewhere():
    pages = tracked(".md")
    assert len(pages) > 30
    assert [fault for page in pages for fault in broken(page)] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("test_docs.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One `A_B`\n[a](#one-a_b) [b](#two) [c](none.md) [d](https://x/none) `[e](none)`\n"
        "```\n[f](none)\n```\n[g](page.md#three)\n"
    )
    assert broken(page) == [
        "page.md: #two: the page has no such heading",
        "page.md: none.md: there is no such file",
        "page.md: page.md#three: the page has no such heading",
    ]


def reasons() -> list[str]:
    """Those of the protocol, in its order, without UNSPECIFIED."""
    proto = (ROOT / "proto/superbatch/v1/errors.proto").read_text()
    found = re.findall(r"^  REASON_(\w+) = \d+;", proto, re.MULTILINE)
    return [name for name in found if name != "UNSPECIFIED"]


def own_reasons() -> list[str]:
    """Those of the Python client alone: of its classes, and two that the compiled part names."""
    classes = {kind.reason for kind in superbatch.Error.__subclasses__()}
    return sorted(classes - set(reasons()) | {"BATCH_CORRUPT", "CANCELLED"})


def test_every_reason_has_an_entry_with_cause_and_remedy():
    entries = re.split(r"^### ", (ROOT / "docs/errors.md").read_text(), flags=re.MULTILINE)[1:]
    named = [entry.split("\n", 1)[0] for entry in entries]
    assert len(reasons()) > 40
    assert sorted(named) == sorted(reasons() + own_reasons())
    for name, entry in zip(named, entries, strict=True):
        assert "**Cause.** " in entry and "**Remedy.** " in entry, name


def test_each_exception_names_its_entry():
    page, known = ROOT / "docs/errors.md", anchors(ROOT / "docs/errors.md")
    for reason in reasons() + own_reasons():
        error = superbatch.Error("text", reason)
        way, _, anchor = error.help.partition("#")
        assert (ROOT / way, anchor in known) == (page, True), reason
        assert error.__notes__ == [f"cause and remedy: {error.help}"]
        assert str(error) == "text"


def script(name: str) -> ModuleType:
    """A script of docs/site."""
    path = ROOT / f"docs/site/{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("name", ["protocol_page", "python_page"])
def test_generated_pages_are_current(name):
    made = script(name)
    assert made.PAGE.read_text() == made.page(), f"run docs/site/{name}.py"


def test_the_pictures_of_selection_show_what_the_page_says():
    pictures = script("pictures")
    world, text = pictures.World(), (ROOT / "docs/selection.md").read_text()
    uniform, independent, joint = (
        world.drawn(policy).batch_score for policy in ("uniform", "independent", "joint")
    )
    told = f"Uniform scores {uniform:.1f}, independent {independent:.1f}, joint {joint:.1f}."
    assert told in text
    # Conditional scores add up to the kernels' own: what the bars show is what was drawn from.
    matrix, drawn = world.learnability(), world.drawn("joint")
    size, before = pictures.SUB_BATCH_SIZE // pictures.N_CHUNKS, drawn.indices
    for place, (index, score) in enumerate(zip(drawn.indices, drawn.scores, strict=True)):
        given = before[: place // size * size]
        shown = matrix[index, index] + matrix[given, index].sum() + matrix[index, given].sum()
        assert shown == pytest.approx(score, abs=1e-3)


def test_every_page_is_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = set(re.findall(r"[\w./-]+\.md", menu))
    pages = {str(page.relative_to(ROOT / "docs")) for page in tracked(".md") if is_page(page)}
    assert named == pages | {"index.md", "contributing.md", "changelog.md"}


def is_page(page: Path) -> bool:
    return page.is_relative_to(ROOT / "docs")
