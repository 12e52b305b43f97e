"""Embeddings ahead of a run, by the real binary: kept for runs, and written for others."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY, Cluster
from test_accounts import finite, train
from test_end_to_end import inputs, phase  # noqa: F401

from examples.demo.model import Transform, embed, load

ROWS, BLOCK = 384, 64


@pytest.fixture(scope="module")
def data(inputs, tmp_path_factory) -> Path:
    """Six blocks in two shards; one picture is none."""
    table = pyarrow.concat_tables(
        [pyarrow.parquet.read_table(path) for path in sorted((inputs / "pool").iterdir())]
    )[:ROWS]
    images = table["png"].to_pylist()
    images[5] = b"no picture"
    column = pyarrow.array(images, pyarrow.binary())
    table = table.set_column(table.schema.get_field_index("png"), "png", column)
    folder = tmp_path_factory.mktemp("data")
    for shard, first in enumerate((0, ROWS // 2)):
        path = folder / f"{shard}.parquet"
        pyarrow.parquet.write_table(table[first : first + ROWS // 2], path, row_group_size=BLOCK)
    return folder


def embeds(state: str, model: Path, data: Path, *more: object) -> dict:
    command = [BINARY, "embed", "--model", model, "--sources", data.as_uri(), "--state", state]
    ended = subprocess.run(
        [*map(str, command), *map(str, more), "--json"], capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_run_finds_what_was_embedded_ahead(inputs, data, tmp_path):
    with Cluster(tmp_path) as cluster:
        made = embeds(cluster.state, inputs / "reference", data)
        assert (made["rows"], made["blocks"], made["blocks_kept"]) == (ROWS, ROWS // BLOCK, 0)
        assert made["faults"] == 1 and made["flops"] > 0
        assert made["micro_batch_rows"] == 64, "a CPU's"
        asked = finite(inputs, data.as_uri(), "ahead", [phase()])
        run, receipts = train(superbatch.connect(cluster.address), asked, inputs)
        costs = [receipt.summary.cost for receipt in receipts]
        assert len(costs) == 4 and all(cost.reference_flops == 0 for cost in costs)
        assert all(cost.learner_flops > 0 for cost in costs)
        assert run.get_run().accounts.reference_flops == 0
        assert cluster.coordinator.metric("superbatch_reference_rows_computed_total") == 0
        assert receipts[0].summary.reference_digest == made["model"]
        assert receipts[0].summary.dataset_manifest == made["manifest"]


def test_a_run_finds_it_whatever_it_weighs_its_sources_by(inputs, data, tmp_path):
    """Weights decide how often rows take their turn, and not what their embeddings are."""
    paths = sorted(data.iterdir())
    with Cluster(tmp_path) as cluster:
        more = ("--sources", paths[1].as_uri())
        made = embeds(cluster.state, inputs / "reference", paths[0], *more)
        asked = finite(inputs, data.as_uri(), "weighted", [phase()])
        weighted = zip(paths, (1.0, 3.0), strict=True)
        sources = [superbatch.Source(uri=path.as_uri(), weight=w) for path, w in weighted]
        asked = replace(asked, sources=sources)
        run, receipts = train(superbatch.connect(cluster.address), asked, inputs)
        assert receipts and run.get_run().accounts.reference_flops == 0
        assert cluster.coordinator.metric("superbatch_reference_rows_computed_total") == 0
        assert receipts[0].summary.dataset_manifest != made["manifest"]


def test_it_goes_on_where_it_was_left(inputs, data, tmp_path):
    state = (tmp_path / "state").as_uri()
    first = embeds(state, inputs / "reference", data)
    kept = sorted((tmp_path / "state" / "reference").iterdir())
    assert len(kept) == first["blocks"]
    kept[0].unlink()
    again = embeds(state, inputs / "reference", data)
    assert again["blocks_kept"] == first["blocks"] - 1
    assert again["flops"] == pytest.approx(first["flops"] / first["blocks"])
    low = embeds(state, inputs / "reference", data, "--resolution", 8)
    assert low["blocks_kept"] == 0 and low["flops"] < first["flops"], "another fidelity"


def test_files_hold_what_the_models_library_computes(inputs, data, tmp_path):
    state, out = (tmp_path / "state").as_uri(), tmp_path / "out"
    more = ("--out", out, "--embedding-dtype", "f32")
    assert embeds(state, inputs / "reference", data, *more)["files"] == 2
    files = sorted(path.name for path in out.glob("*.parquet"))
    assert files == ["0.parquet.embeddings.parquet", "1.parquet.embeddings.parquet"]
    table = pyarrow.parquet.read_table(out / files[0])
    assert table["id"][7].as_py() == "0.parquet#7"
    faults = table["fault"].to_pylist()
    assert faults[5] == "IMAGE_UNDECODABLE" and faults.count(None) == ROWS // 2 - 1
    source = pyarrow.parquet.read_table(data / "0.parquet")
    rows = [row for row in range(ROWS // 2) if row != 5]
    transform, model = Transform(inputs / "reference"), load(inputs / "reference").eval()
    pixels = transform.images([source["png"][row].as_py() for row in rows])
    ids = transform.captions([source["caption"][row].as_py() for row in rows])
    for name, theirs in zip(
        ("image_embedding", "text_embedding"), embed(model, pixels, ids), strict=True
    ):
        ours = numpy.stack(table[name].to_numpy(zero_copy_only=False))
        assert not ours[5].any()
        assert numpy.abs(ours[rows] - theirs.detach().numpy()).max() < 1e-5
    (out / files[1]).unlink()
    again = embeds(state, inputs / "reference", data, *more)
    assert (again["files"], again["files_kept"], again["flops"]) == (1, 1, 0)


def test_rows_that_where_keeps_have_their_own_numbers(inputs, data, tmp_path):
    """Of some row groups all rows are kept, of others some or none."""
    kept = [key for key in range(ROWS) if 100 <= key < 150 or key >= 256]
    where = "key between '000000100' and '000000149' or key >= '000000256'"
    out = tmp_path / "out"
    state = (tmp_path / "state").as_uri()
    made = embeds(state, inputs / "reference", data, "--out", out, "--where", where)
    assert (made["rows"], made["faults"], made["files"]) == (len(kept), 0, 2)
    found = [
        (identity, row)
        for shard in range(2)
        for identity, row in zip(
            *pyarrow.parquet.read_table(
                out / f"{shard}.parquet.embeddings.parquet", columns=["id", "row"]
            )
            .to_pydict()
            .values(),
            strict=True,
        )
    ]
    half = ROWS // 2
    assert found == [(f"{key // half}.parquet#{key % half}", key % half) for key in kept]


def test_a_folder_holds_embeddings_of_one_thing(inputs, data, tmp_path):
    state, out = (tmp_path / "state").as_uri(), tmp_path / "out"
    embeds(state, inputs / "reference", data, "--out", out)
    for model, *more in (
        ("learner",),
        ("reference", "--patch", "16"),
        ("reference", "--patch-dropout", "0.5"),
        ("reference", "--compute-dtype", "bf16"),
    ):
        command = [BINARY, "embed", "--model", inputs / model, "--sources", data.as_uri(), *more]
        ended = subprocess.run(
            [*map(str, command), "--state", state, "--out", str(out)],
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 1 and "give another folder" in ended.stderr
        what = more[0][2:].replace("-", "_") if more else "model"
        assert f"of {what if 'dtype' in what or what == 'model' else 'fidelity'} " in ended.stderr
