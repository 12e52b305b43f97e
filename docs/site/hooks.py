"""Makes pages of what the documentation links to outside of docs/, so that a site without network
has it: the README as the first page, other Markdown files, and source files as listings.
"""

import posixpath
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
NAMED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LANGUAGES = {
    ".py": "python", ".rs": "rust", ".proto": "protobuf", ".toml": "toml", ".yaml": "yaml",
    ".yml": "yaml", ".sh": "bash", ".sbatch": "bash", ".json": "json", ".html": "html",
}  # fmt: skip
#: Pages of source files are found by links, and would bury the others in a search.
NO_SEARCH = "---\nsearch:\n  exclude: true\n---\n\n"
PICTURES = (".png", ".jpg", ".svg")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")


def tracked() -> set[str]:
    """The repository's files, and those that are not added to it yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")) - {""}


def page_of(path: str, files: set[str]) -> str | None:
    """The page or file of the site that shows what the repository has at `path`."""
    if path in NAMED:
        return NAMED[path]
    if path.startswith("docs/") and path in files:
        return path.removeprefix("docs/")
    if path in files:
        return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"
    if any(name.startswith(f"{path}/") for name in files):
        return f"source/{path}/index.md"
    return None


def without_code(markdown: str) -> Iterator[tuple[str, bool]]:
    """Lines, and whether a link in them is one: not within a fence."""
    fence = ""
    for line in markdown.split("\n"):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip() == fence:
            fence = ""
            yield line, False
            continue
        yield line, not fence


def targets(markdown: str, path: str) -> set[str]:
    """Paths in the repository that the page at `path` links to."""
    return {
        resolved(path, link[2])
        for line, counts in without_code(markdown)
        if counts
        for link in LINK.finditer(line)
        if "://" not in link[2]
    }


def resolved(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def listing(path: str, files: set[str]) -> str:
    """A page that shows a file of the repository, or what is in a folder of it."""
    if path in files:
        text = (ROOT / path).read_text()
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
        return f"# {path}\n\n{fence}{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n{fence}\n"
    here = sorted(name for name in files if name.startswith(f"{path}/"))
    lines = [
        f"* [{name.removeprefix(path + '/')}]({name.removeprefix(path + '/')})" for name in here
    ]
    return f"# {path}\n\n" + "\n".join(lines) + "\n"


def on_files(files, config):
    known, places = tracked(), {}
    waiting = {f"docs/{file.src_uri}" for file in files.documentation_pages()} | set(NAMED)
    while waiting:
        path = waiting.pop()
        page = page_of(path, known)
        if page is None or page in places or Path(path).suffix in PICTURES:
            continue
        # Links of a folder's listing begin in the folder.
        places[page] = path if path in known else f"{path}/index.md"
        markdown = (ROOT / path).read_text() if path.endswith(".md") else listing(path, known)
        if page != path.removeprefix("docs/"):
            head = NO_SEARCH if page.startswith("source/") else ""
            files.append(File.generated(config, page, content=head + markdown))
        waiting |= targets(markdown, places[page])
    config.extra["places"] = places
    return files


def on_page_markdown(markdown, page, config, files):
    known, uri = tracked(), page.file.src_uri
    place = config.extra["places"][uri]

    def moved(link: re.Match) -> str:
        target = None if "://" in link[2] else page_of(resolved(place, link[2]), known)
        if target is None:
            return link[0]
        way = posixpath.relpath(target, posixpath.dirname(uri) or ".")
        return f"{link[1]}{way}{link[3] or ''})"

    return "\n".join(
        LINK.sub(moved, line) if counts else line for line, counts in without_code(markdown)
    )
