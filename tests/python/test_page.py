"""The run page in a real browser, against real runs: one that goes on, one that was closed, and one
whose service was killed.
"""

import json
import shutil
import urllib.request
from pathlib import Path

import pyarrow.parquet
import pytest
from commands import prints
from pages import (  # noqa: F401
    ROWS,
    STEPS,
    UNTIL,
    browser,
    get,
    inputs,
    page,
    page_on,
    refused,
    service,
)


def test_a_receipt_tells_what_the_page_shows(service):
    """Own scores, losses and those passed over, as the arithmetic has them."""
    run = service.first
    receipt = run.receipt(UNTIL + 1)
    scores = [row.own_score for row in receipt.chosen]
    for row in receipt.chosen:
        assert row.own_score == pytest.approx(row.learner_loss - row.reference_loss, abs=1e-9)
        assert row.chunk > 0 or row.score == pytest.approx(row.own_score, abs=1e-4)
    assert sum(scores) / len(scores) == pytest.approx(receipt.summary.mean_score_chosen, abs=1e-4)
    passed = receipt.passed_over
    assert len(passed) == 24 and not {row.id for row in passed} & {row.id for row in receipt.chosen}
    best = [row.own_score for row in passed if not row.sampled]
    assert best == sorted(best, reverse=True) and len(best) == 12
    assert (
        receipt.summary.uniform_score is not None
        and receipt.summary.uniform_score != receipt.summary.batch_score
    )
    # A step that was committed ahead of its call tells of no wait.
    assert any(run.receipt(step).summary.trainer_wait_seconds for step in range(STEPS))
    uniform = run.receipt(0)
    assert not uniform.passed_over and uniform.summary.uniform_score is None
    assert uniform.chosen[0].own_score is None and uniform.chosen[0].learner_loss is None


def test_the_json_is_what_receipts_say(service):
    base = service.coordinator.page_address
    listed = {run["run"]: run for run in get(base, "/api/runs")["runs"]}
    assert {name: (run["state"], run["newest"]) for name, run in listed.items()} == {
        "first": ("open", STEPS - 1),
        "second": ("closed", STEPS - 1),
    }
    facts = get(base, "/api/runs/first")
    assert [phase["policy"] for phase in facts["phases"]] == ["uniform", "joint"] and facts[
        "totals"
    ]["train_flops"] > 0
    line = get(base, "/api/runs/first/timeline")
    receipts = [service.first.receipt(step).summary for step in range(STEPS)]
    assert line["step"] == list(range(STEPS)) and line["stride"] == 1
    assert line["batch_score"] == [receipt.batch_score for receipt in receipts]
    assert line["seconds"]["total"] == [receipt.cost.seconds.total for receipt in receipts]
    assert line["batch_score"][:UNTIL] == [None] * UNTIL
    step = get(base, f"/api/runs/first/steps/{UNTIL}")
    assert len(step["chosen"]["key"]) == step["chosen_total"] == 24
    whole = get(base, f"/api/runs/first/steps/{UNTIL}/receipt")
    assert [row["id"] for row in whole["chosen"]] == step["chosen"]["id"]


def test_an_example_is_found_in_every_step_that_it_was_a_candidate_of(service):
    base = service.coordinator.page_address
    found = {}
    for number in range(UNTIL, STEPS):
        step = get(base, f"/api/runs/first/steps/{number}")
        for key, score in zip(step["chosen"]["key"], step["chosen"]["score"]):
            found[key] = (number, score)
    for key, (number, score) in list(found.items())[::7]:
        times = {
            time["step"]: time for time in get(base, f"/api/runs/first/examples/{key}")["times"]
        }
        assert times[number]["outcome"] == "chosen" and times[number]["score"] == score
    mix = get(base, "/api/runs/first/mix")
    assert mix["chosen"] == 24 * (STEPS - UNTIL) and mix["scanned"] == 96 * (STEPS - UNTIL)
    assert sum(shard["chosen"] for shard in mix["shards"]) == mix["chosen"]


def test_what_is_wrong_is_said_and_nothing_is_let_in(service, inputs):
    base = service.coordinator.page_address
    assert refused(base, "/api/runs/none")[0] == 404
    code, body = refused(base, "/api/runs/first/steps/999")
    assert code == 404 and f"the newest is {STEPS - 1}" in body
    assert refused(base, "/api/runs/..%2f..%2fetc/timeline")[0] == 404
    assert refused(base, "/api/runs/first/pictures/9.9.9")[0] == 400
    assert refused(base, "/api/runs/first/timeline?from=x")[0] == 400
    assert refused(base, "/api/runs", method="POST")[0] == 405
    assert refused(base, "/api/runs", Host="evil.example")[0] == 421
    assert refused(base, "/nothing.js")[0] == 404
    index = urllib.request.urlopen(base + "/", timeout=10)
    assert "default-src 'none'" in index.headers["content-security-policy"]
    picture = urllib.request.urlopen(base + "/api/runs/first/pictures/0.0.0?size=64", timeout=10)
    assert picture.headers["content-type"] == "image/jpeg" and picture.read(3) == b"\xff\xd8\xff"
    assert refused(base, "/api/runs/first/pictures/0.0.5")[0] == 404, "row 5 has no image"


def test_a_page_of_its_own_shows_a_state_and_changes_nothing(service, tmp_path):
    """A copy of the state, as a service that was killed leaves it."""
    state = tmp_path / "state"
    shutil.copytree(service.folder / "state", state)
    before = contents(state)
    with page_on(state) as base:
        assert {run["run"] for run in get(base, "/api/runs")["runs"]} == {"first", "second"}
        assert get(base, "/api/runs/first/timeline")["newest"] == STEPS - 1
        get(base, "/api/runs/first/mix")
        get(base, "/api/runs/first/mix/rows")
    assert contents(state) == before


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_run_that_cannot_be_read_is_told_among_the_others(service, tmp_path):
    state = tmp_path / "state"
    shutil.copytree(service.folder / "state", state)
    newer = state / "runs" / "later" / "run.json"
    newer.parent.mkdir()
    newer.write_text('{"format": 4000000000}')
    with page_on(state) as base:
        listed = {run["run"]: run for run in get(base, "/api/runs")["runs"]}
        assert set(listed) == {"first", "later", "second"}
        assert "newer build" in listed["later"]["error"] and "error" not in listed["first"]
        assert refused(base, "/api/runs/later")[0] == 501
    lines = [json.loads(line) for line in prints("runs", "--state", state, "--json").splitlines()]
    assert [run["state"] for run in lines] == ["open", "unreadable", "closed"]
    said = prints("runs", "--state", state).splitlines()
    assert said[-1].startswith("later cannot be read: ") and "newer build" in said[-1]


def test_an_address_that_names_the_data_has_one_picture(service):
    """Ids of runs and addresses are used again, for other data: what a browser keeps without asking
    must be named by more than them.
    """
    base, at = service.coordinator.page_address, "/api/runs/first/pictures/0.0.0?size=64"
    data = get(base, "/api/runs/first")["data"]

    def kept(query: str) -> tuple[str, str]:
        headers = urllib.request.urlopen(base + at + query, timeout=30).headers
        return headers["cache-control"], headers["etag"]

    forever, tag = kept(f"&data={data}")
    assert "immutable" in forever
    for query in ("", "&data=0123456789abcdef"):
        assert kept(query) == ("private, no-cache", tag)
    assert refused(base, at, **{"If-None-Match": tag})[0] == 304


def test_the_mix_tells_what_receipts_hold_and_measures_the_rest(service, inputs):
    base = service.coordinator.page_address
    mix = get(base, "/api/runs/first/mix")
    assert mix["pool"] == ROWS == sum(source["rows"] for source in mix["sources"])
    assert sum(shard["pool_share"] for shard in mix["shards"]) == pytest.approx(1)
    receipts = [service.first.receipt(step) for step in range(UNTIL, STEPS)]
    assert mix["steps"] == list(range(UNTIL, STEPS))
    for model in ("learner", "reference"):
        means = [
            sum(getattr(row, f"{model}_loss") for row in receipt.chosen) / len(receipt.chosen)
            for receipt in receipts
        ]
        assert mix["losses"][f"{model}_chosen"] == pytest.approx(means)
    chosen = [row for receipt in receipts for row in receipt.chosen]
    rows = {(row.shard, row.row) for row in chosen}
    assert mix["contents"] == {
        "chosen": len(chosen),
        "again": len(chosen) - len(rows),
        "copies": len(rows) - len({bytes(row.content_hash) for row in chosen}),
    }
    measured = get(base, "/api/runs/first/mix/rows")
    assert 0 < measured["chosen"] < measured["scanned"]
    tables = [pyarrow.parquet.read_table(path) for path in (inputs / "pool").glob("*.parquet")]
    lengths = {len(text) for table in tables for text in table["caption"].to_pylist()}
    sizes = {len(png) for table in tables for png in table["png"].to_pylist() if png}
    for name, known in (("caption_chars", lengths), ("image_bytes", sizes)):
        bins = measured[name]["bins"]
        assert {bins[0]["least"], bins[-1]["most"], measured[name]["median_chosen"]} <= known
        assert sum(part["chosen_share"] for part in bins) == pytest.approx(1)


def test_a_run_is_shown_from_the_list_to_its_steps(page):
    page.goto("/")
    page.get_by_role("link", name="first").click()
    page.get_by_role("heading", name="first").wait_for()
    page.get_by_text("Batch score over uniform").wait_for()
    assert page.locator(".tile").count() == 6 and page.locator(".chart canvas").count() == 6
    assert page.locator("tbody tr").count() == STEPS
    # The canvas holds a line in the chosen colour.
    drawn = page.evaluate("""() => {
        const canvas = document.querySelector(".chart.tall canvas");
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let blue = 0;
        for (let n = 0; n < pixels.length; n += 4)
            blue += pixels[n + 2] > 200 && pixels[n] < 90 && pixels[n + 3] > 200;
        return blue;
    }""")
    assert drawn > 50
    page.locator("tbody").get_by_role("link", name=str(STEPS - 1), exact=True).click()
    page.get_by_role("heading", name="Examples").wait_for()


def test_a_step_shows_the_chosen_beside_those_passed_over(page):
    page.goto(f"/#/runs/first/steps/{UNTIL + 1}")
    chosen, passed = page.locator(".side.chosen li"), page.locator(".side.passed li")
    chosen.first.wait_for()
    assert (chosen.count(), passed.count()) == (24, 24)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.rows .caption')].every(c => c.textContent.trim())"
    )
    page.wait_for_function(
        "() => [...document.querySelectorAll('.side.chosen img')]"
        ".filter(i => i.naturalWidth > 0).length > 5"
    )
    page.get_by_label("Sort by").select_option("score")
    scores = [
        float(text.replace("−", "-"))
        for text in page.locator(".side.chosen .score b").all_text_contents()
    ]
    assert scores == sorted(scores, reverse=True)
    page.get_by_label("Chunk").select_option("1")
    assert chosen.count() == 8
    # Chunks are counted as receipts and the commands count them.
    assert all("chunk 1 ·" in text for text in page.locator(".side.chosen .id").all_inner_texts())
    page.get_by_label("Chunk").select_option("")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type("circle")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.side.chosen .caption')]"
        ".every(c => c.textContent.includes('circle'))"
    )
    assert 0 < chosen.count() < 24
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    page.wait_for_url(f"**/#/runs/first/steps/{UNTIL + 2}")


def test_a_hostile_caption_stays_text(page):
    page.goto(f"/#/runs/first/steps/{UNTIL}")
    page.locator(".rows .caption", has_text="onerror").first.wait_for()
    page.locator(".row", has_text="onerror").first.click()
    page.locator("dialog p.caption", has_text="<script>").wait_for()
    assert page.title() == "first · Superbatch"
    assert (
        page.locator("main script, dialog script, main img[src='x'], dialog img[src='x']").count()
        == 0
    )
    page.get_by_role("link", name="Each time it was a candidate").click()
    page.get_by_role("heading", name="Each time it was a candidate").wait_for()
    assert page.title() == "first · Superbatch"


def test_every_view_fits_a_phone_and_both_themes(page):
    page.set_viewport_size({"width": 390, "height": 844})
    for address in (
        "",
        "runs/first",
        f"runs/first/steps/{UNTIL}",
        "runs/first/mix",
        "runs/first/examples/0.0.0",
        "compare/first/second",
    ):
        page.goto(f"/#/{address}")
        page.locator("main h1").first.wait_for()
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, address
        assert page.locator("[role=alert]").count() == 0, address
    before = page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor") != before
