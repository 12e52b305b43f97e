"""The run page while a run goes on: it follows the run, and the run does not notice it."""

import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pages
import pytest
import superbatch
from cluster import Cluster
from pages import STEPS, UNTIL, browser, get, inputs, open_run, take_steps, train  # noqa: F401

READERS = 24


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("live")) as cluster:
        yield cluster


@pytest.fixture
def tab(browser, cluster):  # noqa: F811
    yield from pages.tab_of(browser, cluster.coordinator.page_address)


def has_rows(steps: int) -> str:
    """Of one step each; steps that need no newer weights are chosen ahead."""
    return f"() => document.querySelectorAll('tbody tr').length >= {steps}"


def test_a_run_is_followed_while_it_goes_on(tab, cluster, inputs):  # noqa: F811
    run = open_run(superbatch.connect(cluster.address), inputs, "followed")
    tab.goto("/#/runs/followed")
    tab.get_by_text("No step is committed yet.").wait_for()
    assert tab.locator("#live").inner_text() == "no commit yet"
    take_steps(run, inputs, UNTIL + 1)
    tab.wait_for_function(has_rows(UNTIL + 1))
    assert tab.locator(".tile").count() == 6
    assert tab.locator("#live").inner_text() == "live"
    shown = tab.locator(".tiles").inner_text()
    take_steps(run, inputs, STEPS, start=UNTIL + 1)
    tab.wait_for_function(has_rows(STEPS))
    assert tab.locator(".tiles").inner_text() != shown, "figures are those of the newest steps"
    assert f"step {STEPS - 1}" in tab.locator("header.title").inner_text()
    run.close()
    tab.wait_for_function("() => document.getElementById('live').textContent === 'closed'")


def test_many_readers_change_nothing_of_a_run(cluster, inputs):  # noqa: F811
    """They read all that the page has, with the pictures, while a run goes on that was run without
    them before.
    """
    client = superbatch.connect(cluster.address)
    alone = train(client, inputs, "alone")
    base, is_over = cluster.coordinator.page_address, threading.Event()
    paths = ["", "/timeline", "/mix", "/mix/rows", f"/steps/{UNTIL}/receipt", "/examples/0.0.0"]
    paths += [f"/pictures/0.{row % 2}.{row}?size=512" for row in range(24)]

    def read(number: int) -> set[int]:
        found = set()
        while not is_over.is_set():
            path = paths[number % len(paths)]
            number += 1
            try:
                answer = urllib.request.urlopen(f"{base}/api/runs/alone{path}", timeout=60)
                answer.read()
                found.add(answer.status)
            except urllib.error.HTTPError as error:
                found.add(error.code)
        return found

    with ThreadPoolExecutor(READERS) as pool:
        readers = [pool.submit(read, number) for number in range(READERS)]
        try:
            watched = train(client, inputs, "watched")
        finally:
            is_over.set()
        statuses = set().union(*(reader.result() for reader in readers))
    # One row in 97 has no image.
    assert statuses == {200} or statuses == {200, 404}
    for step in range(STEPS):
        ours, theirs = watched.receipt(step), alone.receipt(step)
        assert [row.id for row in ours.chosen] == [row.id for row in theirs.chosen], step
        assert ours.summary.mode == theirs.summary.mode
    assert get(base, "/api/runs/watched")["newest"] == STEPS - 1
