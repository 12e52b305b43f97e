"""Rows with a list of captions: one is drawn, and it is the same one wherever the row is read."""

import json
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY, Cluster
from test_end_to_end import choices, inputs, phase, reason, service, spec, train  # noqa: F401

STEPS = 4
ROWS = 400
# Rows without a caption, one in forty: empty lists, lists of nulls, nulls.
WITHOUT = ([], [None, None], None)


@pytest.fixture(scope="module")
def pool(inputs) -> Path:  # noqa: F811
    """Parquet with `captions: list<string>`: what each row had, and three others."""
    folder = inputs / "several"
    folder.mkdir()
    table = pyarrow.parquet.read_table(inputs / "pool").slice(0, ROWS)
    lists = [
        WITHOUT[row // 40 % 3]
        if row % 40 == 7
        else [f"{number}: {text} of {row}" for number in range(3)] + [None, f"3: {text} of {row}"]
        for row, text in enumerate(table["caption"].to_pylist())
    ]
    column = pyarrow.array(lists, pyarrow.list_(pyarrow.string()))
    table = table.drop_columns("caption").append_column("captions", column)
    for shard in range(2):
        part = table.slice(shard * ROWS // 2, ROWS // 2)
        pyarrow.parquet.write_table(part, folder / f"{shard}.parquet", row_group_size=32)
    return folder


def served(run: superbatch.Run, steps: int = STEPS) -> list[list[tuple]]:
    """By step: id, caption, and the whole list."""
    names = ("_superbatch_id", "caption", "captions")
    batches = (run.select(step, rank=0, world_size=1) for step in range(steps))
    return [list(zip(*(batch[n].to_pylist() for n in names), strict=True)) for batch in batches]


def uniform(**changes) -> superbatch.Phase:
    return phase(policy="uniform", n_chunks=1, super_batch_size=96, sub_batch_size=90, **changes)


def settings(pool: Path, policy: str, seed: int | None = None) -> dict:
    return {
        "sources": [superbatch.Source(uri=pool, caption_seed=seed)],
        "columns": ["captions"],
        "lag": superbatch.at_most(8),
        "phases": [uniform() if policy == "uniform" else phase()],
        "epochs": 2,
    }


@pytest.mark.parametrize("policy", ["uniform", "joint"])
def test_two_workers_draw_as_one_does(inputs, service, pool, tmp_path, policy):  # noqa: F811
    asked = spec(inputs, f"several-{policy}", **settings(pool, policy))
    run = superbatch.connect(service.address).open_run(asked)
    expected = served(run)
    drawn = [(caption, texts) for rows in expected for _, caption, texts in rows]
    assert all(caption in texts and caption is not None for caption, texts in drawn)
    places = {texts.index(caption) for caption, texts in drawn}
    assert places == {0, 1, 2, 4}, "each of the captions, and never the null"
    with Cluster(tmp_path, workers=2) as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        assert served(run) == expected
        receipts = [run.receipt(step) for step in range(STEPS)]
        # Asked for again by a trainer with two ranks: the rows are read again, and their hashes
        # still fit.
        run = superbatch.connect(cluster.address).open_run(asked, incarnation="again")
        ranks = [run.select(1, rank=rank, world_size=2) for rank in range(2)]
        again = [
            row
            for batch in ranks
            for row in zip(batch["_superbatch_id"].to_pylist(), batch["caption"].to_pylist())
        ]
        assert sorted(again) == sorted(row[:2] for row in expected[1])
        assert [row.content_hash for row in run.receipt(1).chosen] == [
            row.content_hash for row in receipts[1].chosen
        ]


def test_a_row_keeps_its_caption_as_long_as_its_seed(inputs, service, pool):  # noqa: F811
    client = superbatch.connect(service.address)
    captions = {}
    for seed in (None, 0, 1):
        asked = spec(inputs, f"epochs-{seed}", **settings(pool, "uniform", seed))
        rows = [row for step in served(client.open_run(asked), 2 * STEPS) for row in step]
        captions[seed] = {identity: caption for identity, caption, _ in rows}
        assert len(rows) > ROWS, "rows came twice"
        assert all(captions[seed][identity] == caption for identity, caption, _ in rows)
    same = captions[None].keys() & captions[0].keys()
    assert all(captions[None][row] == captions[0][row] for row in same)
    shared = captions[0].keys() & captions[1].keys()
    differing = sum(captions[0][row] != captions[1][row] for row in shared)
    assert 0.6 < differing / len(shared) < 0.9, "three in four"


def test_rows_without_a_caption_are_holes_with_the_reason(inputs, service, pool):  # noqa: F811
    run = superbatch.connect(service.address).open_run(
        spec(inputs, "no-captions", **settings(pool, "uniform"))
    )
    served(run, 4)
    holes = [row for step in range(4) for row in run.receipt(step).bad_rows]
    assert {(row.reason, row.detail) for row in holes} == {
        ("caption_null", "the caption is null"),
        ("caption_null", "its list of captions is empty or all null"),
    }


def test_a_step_is_drawn_again_from_the_same_captions(inputs, pool, tmp_path):  # noqa: F811
    changes = {**settings(pool, "joint", 3), "lag": superbatch.exact(1)}
    with Cluster(tmp_path) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "past", **changes))
        train(run, inputs)
    command = [BINARY, "replay", "past", "--step", "2", "--state", tmp_path / "state", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["same_draw"] and told["rows_shared"] == 24 and told["losses_differ_by"] == 0


def test_a_source_named_twice_gives_two_captions_a_picture(inputs, service, pool):  # noqa: F811
    sources = [superbatch.Source(uri=pool, caption_seed=seed) for seed in (1, 2)]
    changes = {**settings(pool, "uniform"), "sources": sources}
    run = superbatch.connect(service.address).open_run(spec(inputs, "twice", **changes))
    captions = {}
    for rows in served(run):
        for identity, caption, _ in rows:
            captions.setdefault(identity.split(":", 1)[1], set()).add(caption)
    assert max(map(len, captions.values())) == 2


def test_lists_of_something_else_are_refused_by_name(inputs, service, tmp_path):  # noqa: F811
    image = pyarrow.array([b"i"], pyarrow.binary())
    for kind, value in (
        (pyarrow.list_(pyarrow.int64()), [1]),
        (pyarrow.list_(pyarrow.list_(pyarrow.string())), [["a"]]),
        (pyarrow.list_(pyarrow.struct([("raw", pyarrow.string())])), [{"raw": "a"}]),
        (pyarrow.map_(pyarrow.string(), pyarrow.string()), [("en", "a")]),
    ):
        table = pyarrow.table({"jpg": image, "caption": pyarrow.array([value], kind)})
        pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
        with pytest.raises(superbatch.Error) as caught:
            superbatch.connect(service.address).open_run(
                spec(inputs, "other", sources=[tmp_path.as_uri()])
            )
        assert reason(caught) == "SCHEMA_MISMATCH"
        assert "column 'caption' of" in str(caught.value)
        assert "not a string or a list of strings" in str(caught.value)
