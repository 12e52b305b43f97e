"""Draws the pictures of the run page, docs/page-*.png: .venv/bin/python scripts/pictures.py

They are of the demo's joint arm (`make demo QUICK=1`, or its whole), in Chromium, by a run page of
its own on the state that the arm has left. Machines differ in fonts, and a busy one in the times
that the page shows: draw them on an idle one. What their captions in docs/page.md say is printed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
BINARY = Path(os.environ.get("SUPERBATCH_BINARY") or ROOT / "target" / "debug" / "superbatch")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
# Sharp on dense screens, and still small files.
WIDTH, HEIGHT, SCALE = 1280, 1700, 1.5
# Scoring a step's pairs, or its whole super-batch, on a few cores.
SECONDS = 300
MARGIN = 10
# Rows of the step view, and the order in which they show the conditional part.
ROWS, ORDER = 6, "added"

SETTLED = """() => {
    const seen = (element) => {
        const { top, bottom } = element.getBoundingClientRect();
        return bottom > 0 && top < innerHeight;
    };
    const captions = [...document.querySelectorAll(".caption")].filter(seen);
    return [...document.images].filter(seen).every((image) => image.complete)
        && captions.every((caption) => caption.textContent.trim());
}"""


@contextmanager
def page_on(state: Path) -> Iterator[str]:
    """The address of a run page on `state`."""
    command = [BINARY, "page", "--state", state, "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        found = re.search(r"http://\S+", said)
        if found is None:
            sys.exit(f"superbatch page did not come up: {said}")
        yield found.group()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def get(address: str, path: str) -> dict:
    return json.load(urllib.request.urlopen(f"{address}/api/runs{path}", timeout=SECONDS))


def save(page: Page, path: Path, top: float, bottom: float) -> None:
    """The page from `top` to `bottom`, once its pictures and captions are there."""
    page.wait_for_function(SETTLED)
    clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top}
    page.screenshot(path=path, clip=clip, animations="disabled")
    print(f"{path}: {clip['width']:.0f} x {clip['height']:.0f}")


def bottom(page: Page, selector: str) -> float:
    box = page.locator(selector).last.bounding_box()
    return box["y"] + box["height"] + MARGIN


def draw_run(page: Page, run: str, out: Path) -> None:
    """The figures and all charts of the whole run."""
    page.goto(f"/#/runs/{run}")
    expect(page.locator(".tile")).to_have_count(6)
    save(page, out / "page-run.png", 0, bottom(page, ".charts"))


def draw_step(page: Page, run: str, step: int, out: Path) -> None:
    """Scores by chunk, and rows that owe most of their score to others of the batch: so rows of
    several chunks are seen with the conditional part.
    """
    page.goto(f"/#/runs/{run}/steps/{step}")
    page.get_by_label("Sort by").select_option(ORDER)
    last = f".side.chosen .rows > li:nth-child({ROWS})"
    page.locator(last).wait_for()
    save(page, out / "page-step.png", 0, bottom(page, last) - MARGIN)


def draw_pairs(page: Page, address: str, run: str, step: int, out: Path) -> None:
    """The map of pairs, with the pair that adds most to the score beside those of one row."""
    page.keyboard.press("p")
    canvas = page.locator("canvas.heat")
    canvas.wait_for(timeout=1000 * SECONDS)
    found = get(address, f"/{run}/steps/{step}/pairs")
    size, values = len(found["key"]), found["values"]
    others = (n for n in range(size * size) if n % (size + 1))
    image, text = divmod(max(others, key=lambda n: values[n]), size)
    box = canvas.bounding_box()
    cell = box["width"] / size
    canvas.click(position={"x": (text + 0.5) * cell, "y": (image + 0.5) * cell})
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    section = page.locator("section.pairs")
    section.evaluate("section => scrollTo(0, section.offsetTop - 64)")
    box = section.bounding_box()
    save(page, out / "page-pairs.png", box["y"] - MARGIN, box["y"] + box["height"] + MARGIN)
    print(
        f"  step {step}, {size} by {size} pairs: the one shown adds {values[image * size + text]}"
    )


def draw_redraw(page: Page, address: str, run: str, step: int, out: Path) -> None:
    """The same super-batch under independent selection."""
    page.goto(f"/#/compare/{run}")
    page.get_by_label("Step to redraw").fill(str(step))
    page.get_by_label("Policy", exact=True).select_option("independent")
    page.get_by_role("button", name="Draw again").click()
    page.locator(".redrawn").wait_for(timeout=1000 * SECONDS)
    more = page.locator(".thumbs-more button")
    while more.is_visible():
        more.click()
    head = page.locator(".section-head", has_text="The same super-batch").bounding_box()
    # The command below it names the state, which lies elsewhere for everybody.
    end = bottom(page, "section.chart.after")
    save(page, out / "page-redraw.png", head["y"] - MARGIN, end)
    print(f"  step {step}: {page.locator('.redrawn').inner_text()}")
    for row in page.locator("tbody tr").all():
        print(f"  {' | '.join(row.locator('td').all_inner_texts())}")


def draw(address: str, run: str | None, step: int | None, out: Path) -> None:
    if run is None:
        run = get(address, "")["runs"][0]["run"]
    if step is None:
        step = get(address, f"/{run}")["newest"]
    with sync_playwright() as driver:
        # Its own sandbox needs rights that containers lack.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(
            base_url=address,
            viewport={"width": WIDTH, "height": HEIGHT},
            device_scale_factor=SCALE,
            color_scheme="light",
            reduced_motion="reduce",
        )
        page.set_default_timeout(60_000)
        draw_run(page, run, out)
        draw_step(page, run, step, out)
        draw_pairs(page, address, run, step, out)
        draw_redraw(page, address, run, step, out)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    state = ROOT / "target" / "demo" / "joint-0" / "state"
    parser.add_argument("--state", type=Path, default=state, help="default: %(default)s")
    parser.add_argument("--run", help="default: the run with the newest commit")
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="default: %(default)s")
    args = parser.parse_args()
    if not args.state.exists():
        sys.exit(f"{args.state} is missing: run `make demo QUICK=1`")
    with page_on(args.state) as address:
        draw(address, args.run, args.step, args.out)


if __name__ == "__main__":
    main()
