"""Replays on the run page: the map of pairs, and a draw under another policy."""

import shutil

import pages
import pytest
from pages import STEPS, UNTIL, browser, get, inputs, page, refused, service  # noqa: F401


@pytest.fixture(scope="module")
def replaying(service, tmp_path_factory):
    """The address of a page of its own, on a copy of the state."""
    state = tmp_path_factory.mktemp("replaying") / "state"
    shutil.copytree(service.folder / "state", state)
    with pages.page_on(state) as address:
        yield address


@pytest.fixture
def own_page(browser, replaying):
    yield from pages.tab_of(browser, replaying)


def test_a_page_of_its_own_replays_and_one_beside_a_service_does_not(service, replaying):
    beside = service.coordinator.page_address
    assert get(replaying, "/api/about")["replays"] and not get(beside, "/api/about")["replays"]
    at = f"/api/runs/first/steps/{UNTIL + 1}"
    for what in ("pairs", "redraw"):
        code, body = refused(beside, f"{at}/{what}")
        assert code == 501 and "superbatch replay" in body
    receipt = get(replaying, f"{at}/receipt")
    pairs = get(replaying, f"{at}/pairs")
    assert len(pairs["values"]) == 24 * 24 and pairs["criterion"] == "learnability"
    assert pairs["missing"] is None and pairs["chosen_total"] == 24
    assert sum(pairs["values"]) / 24 == pytest.approx(
        receipt["summary"]["batch_score"], abs=2e-3
    ), "the terms of all pairs are the batch's score"
    own = [row["own_score"] for row in receipt["chosen"]]
    assert pairs["values"][::25] == pytest.approx(own, abs=2e-3), "the diagonal"
    assert get(replaying, f"{at}/redraw")["same_draw"]
    other = get(replaying, f"{at}/redraw?policy=uniform&filter_ratio=0.5")
    assert other["redrawn"]["policy"] == "uniform" and len(other["rows"]) == 48
    assert refused(replaying, f"{at}/redraw?policy=best")[0] == 400
    assert refused(replaying, "/api/runs/first/steps/x/pairs")[0] == 400
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert refused(replaying, f"{at}/pairs", **elsewhere)[0] == 403
    # Of a uniform step no weights are known, so the reference alone speaks.
    alone = get(replaying, "/api/runs/first/steps/0/pairs")
    assert alone["criterion"] == "easy" and "without the learner" in alone["missing"]


COLOURS = """() => {
    const canvas = document.querySelector("canvas.heat");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    const found = new Set();
    for (let n = 0; n < pixels.length; n += 4) found.add(pixels.slice(n, n + 3).join());
    return found.size;
}"""


def test_pairs_are_a_map_that_keys_move_through(own_page):
    own_page.goto(f"/#/runs/first/steps/{UNTIL + 1}")
    own_page.get_by_role("heading", name="Pairs in draw order").wait_for()
    assert own_page.locator("canvas.heat").count() == 0, "nothing is scored before it is asked for"
    own_page.keyboard.press("p")
    own_page.locator("canvas.heat").wait_for()
    assert own_page.evaluate(COLOURS) > 50
    details = own_page.locator(".pair-details")
    assert "of its own pair" in details.inner_text()
    own_page.keyboard.press("ArrowRight")
    own_page.keyboard.press("ArrowRight")
    own_page.get_by_text("Text drawn 2, chunk 0").wait_for()
    assert "by this image and this text" in details.inner_text()
    own_page.wait_for_function(
        "() => [...document.querySelectorAll('.pair-details .caption')]"
        ".every(c => c.textContent.trim())"
    )
    own_page.keyboard.press("Shift+ArrowDown")
    own_page.get_by_text("Image drawn 8, chunk 1").wait_for()
    assert own_page.url.endswith(f"steps/{UNTIL + 1}"), "keys of the map turn no page"
    for width in (1280, 390):
        own_page.set_viewport_size({"width": width, "height": 844})
        assert own_page.evaluate("document.documentElement.scrollWidth") <= width
    before = own_page.evaluate("document.querySelector('canvas.heat').toDataURL()")
    own_page.evaluate("document.activeElement.blur()")
    own_page.keyboard.press("t")
    assert own_page.evaluate("document.querySelector('canvas.heat').toDataURL()") != before


def test_a_step_is_drawn_again_under_another_policy(own_page):
    own_page.goto("/#/compare/first/second")
    own_page.get_by_label("Step to redraw").fill(str(UNTIL + 1))
    own_page.get_by_role("button", name="Draw again").click()
    own_page.get_by_text("The same examples in the same order.").wait_for()
    own_page.get_by_label("Policy", exact=True).select_option("uniform")
    line = own_page.locator(".command code").last
    assert f"superbatch replay first --step {UNTIL + 1} --policy uniform" in line.inner_text()
    own_page.get_by_role("button", name="Draw again").click()
    own_page.get_by_text("of 24 were chosen then").wait_for()
    assert own_page.locator("tr", has_text="Drawn again").locator("td").nth(1).inner_text() == (
        "uniform"
    )
    assert own_page.locator("tr", has_text="Uniform, expected").count() == 1
    own_page.get_by_label("Step to redraw").fill("0")
    own_page.get_by_label("Policy", exact=True).select_option("joint")
    own_page.get_by_role("button", name="Draw again").click()
    own_page.get_by_text("decided without the learner").wait_for()


def test_a_page_beside_a_service_says_who_replays(page):
    page.goto(f"/#/runs/first/steps/{UNTIL + 1}")
    page.get_by_text("superbatch page --state").wait_for()
    assert page.locator("canvas.heat").count() == 0
    page.goto("/#/compare/first/second")
    page.get_by_text("superbatch replay first --step").wait_for()
    assert page.get_by_role("button", name="Draw again").count() == 0
