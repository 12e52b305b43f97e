"""Views of the run page in a real browser, by what they say and draw."""

import pytest
from pages import STEPS, UNTIL, browser, get, inputs, page, service  # noqa: F401

# How many pixels of a canvas have the colour of what is chosen.
BLUE = """
    const blue = (canvas) => {
      const { width, height } = canvas;
      const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
      let found = 0;
      for (let n = 0; n < pixels.length; n += 4)
        found += pixels[n + 2] > 200 && pixels[n] < 90 && pixels[n + 3] > 200;
      return found;
    };
"""


def test_two_runs_are_compared_in_one_step(page, service):  # noqa: F811
    base = service.coordinator.page_address

    def told(step: int) -> str:
        ours, theirs = (
            set(get(base, f"/api/runs/{run}/steps/{step}")["chosen"]["key"])
            for run in ("first", "second")
        )
        alone = [ours - theirs, theirs - ours]
        page.get_by_text(f"{len(ours & theirs)} example").first.wait_for()
        for run, keys in zip(("first", "second"), alone):
            chart = page.locator("section.chart", has_text=f"Chosen by {run} alone")
            assert chart.locator(".unit").inner_text() == str(len(keys))
            assert chart.locator("img").count() == len(keys)
            links = [link.get_attribute("href") for link in chart.locator("a").all()]
            assert {link.rsplit("/", 1)[1] for link in links} == keys
        return page.locator("p", has_text="Batch scores:").inner_text()

    page.goto("/#/compare/first/second")
    last = told(STEPS - 1)
    assert "Both looked at the same super-batch." in last
    # Of a uniform step nothing was scored, and two runs of one seed choose the same.
    page.get_by_label("Step", exact=True).fill("0")
    page.keyboard.press("Tab")
    page.get_by_text("24 examples of 24 and 24 are in both").wait_for()
    assert "Batch scores: – and –." in told(0)


def test_a_list_of_runs_that_fails_hides_no_comparison(page):  # noqa: F811
    failed = {"error": "the list is away"}
    page.route("**/api/runs", lambda route: route.fulfill(status=404, json=failed))
    page.goto("/#/compare/first/second")
    page.get_by_text("Other runs cannot be listed. the list is away").wait_for()
    page.get_by_text("In one step").wait_for()


def test_a_wait_among_many_steps_without_one_is_shared_by_all(page):  # noqa: F811
    page.goto("/")
    waited = page.evaluate("""async () => {
        const { waited, pace } = await import("/format.js");
        const steps = [...Array(20).keys()];
        const wait = steps.map((step) => (step === 7 ? 2 : null));
        const committed_unix_ms = steps.map((n) => 2000 * n);
        const line = { step: steps, trainer_wait: wait, committed_unix_ms };
        return [waited(line), pace(line), waited({ ...line, trainer_wait: wait.fill(null) })];
    }""")
    assert waited == [pytest.approx(0.1), 2, 0]


def test_a_value_between_gaps_is_drawn(page):  # noqa: F811
    page.goto("/")
    drawn = page.evaluate(
        "async () => {"
        + BLUE
        + """
        const { Group, Lines } = await import("/chart.js");
        const series = [{ key: "a", label: "a", color: "--chosen" }];
        const lines = new Lines({ title: "a", group: new Group(), series });
        document.getElementById("main").replaceChildren(lines.element);
        return [[null, null, 1, null, null], [null, null, null, null, null]].map((a) => {
            lines.set([0, 1, 2, 3, 4], { a });
            return blue(lines.canvas);
        });
    }"""
    )
    assert drawn[0] > 4 and drawn[1] == 0


def test_all_pictures_of_a_draw_can_be_seen(page):  # noqa: F811
    page.goto("/")
    page.evaluate("""async () => {
        const { thumbs } = await import("/thumbs.js");
        const rows = [...Array(30).keys()].map((n) => ({ key: `0.0.${n}`, title: `row ${n}` }));
        document.getElementById("main").replaceChildren(thumbs("first", rows));
    }""")
    assert page.locator(".thumbs img").count() == 24
    assert "24 of 30 are shown" in page.locator("main").inner_text()
    page.get_by_role("button", name="Show 6 more").click()
    assert page.locator(".thumbs img").count() == 30
    assert not page.get_by_role("button", name="more").is_visible()


def test_the_mix_shows_the_pool_and_measures_rows_when_it_is_asked_to(page):  # noqa: F811
    page.goto("/#/runs/first/mix")
    page.get_by_role("columnheader", name="Of the pool").first.wait_for()
    row = page.locator("table.mix").first.locator("tbody tr")
    assert "100 %" in row.first.inner_text(), "one source is the whole pool"
    assert page.get_by_role("heading", name="Losses of the chosen").count() == 1
    assert page.get_by_text("No rule looks for them").count() == 1
    assert page.get_by_text("Median").count() == 0, "no block is read before it is asked for"
    page.get_by_role("button", name="Measure a sample of rows").click()
    page.get_by_text("Median").first.wait_for()
    assert page.get_by_role("heading", name="Length of captions").count() == 1
    assert page.get_by_role("heading", name="Size of images").count() == 1
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_are_asked_for_by_the_data_they_are_of(page, service):  # noqa: F811
    data = get(service.coordinator.page_address, "/api/runs/first")["data"]
    for address in (f"runs/first/steps/{UNTIL}", "runs/first/examples/0.0.0"):
        page.goto(f"/#/{address}")
        page.locator("main img").first.wait_for()
        source = page.locator("main img").first.get_attribute("src")
        assert f"data={data}" in source
