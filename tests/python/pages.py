"""The run page for tests: real runs, a browser, and what both need."""

import contextlib
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY, Cluster
from safetensors.torch import load_file

from examples.demo import tiny

# Two epochs, with which the run is over: no step is chosen ahead.
ROWS, STEPS = 288, 6
UNTIL = 2
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
BROWSER_MISSING = (
    "no Chromium: the run page was NOT looked at in a browser "
    "(apt-get install chromium; pip install playwright)"
)


def write_inputs(folder: Path) -> Path:
    tiny.write_dataset(folder / "pool", rows=ROWS)
    for shard in (folder / "pool").glob("*.parquet"):
        table = pyarrow.parquet.read_table(shard)
        captions = [
            f"{HOSTILE} {n}" if n % 7 == 3 else text
            for n, text in enumerate(table["caption"].to_pylist())
        ]
        images = [
            None if n % 97 == 5 else image for n, image in enumerate(table["png"].to_pylist())
        ]
        table = table.set_column(
            table.schema.get_field_index("caption"), "caption", pyarrow.array(captions)
        )
        table = table.set_column(
            table.schema.get_field_index("png"), "png", pyarrow.array(images, pyarrow.binary())
        )
        pyarrow.parquet.write_table(table, shard, row_group_size=64)
    tiny.write_siglip(folder / "learner", seed=0)
    tiny.write_siglip(folder / "reference", seed=1)
    return folder


def serve(folder: Path, inputs: Path):
    """A service with a run that goes on and one that was closed."""
    with Cluster(folder) as cluster:
        client = superbatch.connect(cluster.address)
        cluster.first = train(client, inputs, "first")
        train(client, inputs, "second", policy="independent").close()
        yield cluster


@contextlib.contextmanager
def page_on(state: Path):
    """The address of a run page of its own."""
    process = subprocess.Popen(
        [BINARY, "page", "--state", state, "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield re.search(r"http://\S+", process.stdout.readline()).group()
    finally:
        process.terminate()
        assert process.wait(60) == 0
        process.stdout.close()


def train(client, inputs: Path, run_id: str, policy: str = "joint") -> superbatch.Run:
    """A run of a uniform phase and one of `policy`, which pushes after each step."""
    run = open_run(client, inputs, run_id, policy)
    take_steps(run, inputs, STEPS)
    return run


def open_run(client, inputs: Path, run_id: str, policy: str = "joint") -> superbatch.Run:
    phases = [
        superbatch.Phase(policy="uniform", super_batch_size=96, sub_batch_size=24),
        superbatch.Phase(
            from_step=UNTIL, policy=policy, super_batch_size=96, sub_batch_size=24, n_chunks=3
        ),
    ]
    learner = superbatch.Learner(
        model_uri=(inputs / "learner").as_uri(),
        snapshot_uri=(inputs / "learner" / "model.safetensors").as_uri(),
    )
    return client.open_run(
        superbatch.RunSpec(
            run_id=run_id,
            sources=[(inputs / "pool").as_uri()],
            reference=(inputs / "reference").as_uri(),
            learner=learner,
            phases=phases,
            loss="sigmoid",
            seed=5,
            micro_batch_rows=16,
            epochs=2,
        )
    )


def take_steps(run: superbatch.Run, inputs: Path, steps: int, start: int = 0) -> None:
    """Takes the steps from `start` to `steps`, not included; each pushes other weights."""
    weights = load_file(inputs / "learner/model.safetensors")
    for batch in run.batches(rank=0, world_size=1, start_step=start, end_step=steps):
        run.push_weights(
            {name: tensor * (1 + 0.05 * batch.step) for name, tensor in weights.items()},
            step=batch.step,
        )
    run.flush()


def get(base: str, path: str, **headers: str) -> dict:
    request = urllib.request.Request(base + path, headers=headers)
    return json.loads(urllib.request.urlopen(request, timeout=30).read())


def refused(base: str, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(base + path, headers=headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    return caught.value.code, caught.value.read().decode()


def open_browser():
    """Chromium, or the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason=BROWSER_MISSING)
    if CHROMIUM is None:
        pytest.skip(BROWSER_MISSING)
    with playwright.sync_playwright() as driver:
        # Its own sandbox needs rights that containers lack.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def tab_of(browser, address):
    """A tab that fails the test on any error of its scripts, or anything that the policy blocks."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=address)
    tab, errors = context.new_page(), []
    tab.set_default_timeout(30_000)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on(
        "console",
        lambda message: (
            errors.append(message.text)
            if message.type == "error" and "404" not in message.text
            else None
        ),
    )
    yield tab
    context.close()
    assert not errors, errors


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def service(tmp_path_factory, inputs):
    yield from serve(tmp_path_factory.mktemp("service"), inputs)


@pytest.fixture(scope="module")
def browser():
    yield from open_browser()


@pytest.fixture
def page(browser, service):
    yield from tab_of(browser, service.coordinator.page_address)
