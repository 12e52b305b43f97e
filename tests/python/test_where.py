"""Sources of which only a part may be chosen: by a predicate, by a list of ids, or by what
img2dataset notes. Every served row is compared with what pyarrow filters.
"""

from pathlib import Path

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest
import superbatch
from test_end_to_end import inputs, phase, reason, service, spec  # noqa: F401
from test_inputs import serves, table, uniform  # noqa: F401
from test_tar import index, tars  # noqa: F401

ROWS = 768


@pytest.fixture(scope="module")
def pool(inputs, table) -> tuple[Path, pyarrow.Table]:  # noqa: F811
    """Two shards with what metadata of public data sets have: similarities of 32 bits, some null,
    a language, and uids of 32 digits.
    """
    rng = numpy.random.default_rng(7)
    similarity = rng.random(ROWS, dtype=numpy.float32)
    languages = numpy.array(["en", "de", None], dtype=object)[rng.integers(0, 3, ROWS)]
    uids = [f"{rng.integers(0, 2**63):016x}{rng.integers(0, 2**63):016x}" for _ in range(ROWS)]
    full = (
        table.append_column("similarity", pyarrow.array(similarity, mask=similarity < 0.05))
        .append_column("language", pyarrow.array(languages, pyarrow.string()).dictionary_encode())
        .append_column("uid", pyarrow.array(uids))
    )
    folder = inputs / "scored pool"
    folder.mkdir()
    for number in range(2):
        part = full.slice(number * 384, 384)
        pyarrow.parquet.write_table(part, folder / f"{number}.parquet", row_group_size=50)
    return folder, full


def ids_of(kept: pyarrow.ChunkedArray) -> set[str]:
    """Row ids of the rows that a mask of pyarrow's keeps; null is not kept."""
    rows = [row for row, keeps in enumerate(kept.to_pylist()) if keeps]
    return {f"{row // 384}.parquet#{row % 384}" for row in rows}


def epoch(run: superbatch.Run) -> set[str]:
    found: list[str] = []
    for batch in run.batches(rank=0, world_size=1, start_step=0):
        found += batch["_superbatch_id"].to_pylist()
    assert len(found) == len(set(found))
    return set(found)


def test_an_epoch_of_rows_that_where_and_allow_keep(inputs, service, pool, tmp_path):  # noqa: F811
    folder, full = pool
    field = pyarrow.compute.field
    where = field("similarity") > 0.3
    where &= field("language").cast(pyarrow.string()).isin(["en"])
    listed = full["uid"].to_pylist()[::2]
    halves = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in listed]
    numpy.save(tmp_path / "subset.npy", numpy.sort(numpy.array(halves, numpy.dtype("u8,u8"))))
    numbered = full.append_column("n", pyarrow.array(range(ROWS)))
    inside = set(numbered.filter(where)["n"].to_pylist())
    cases = {
        "where": ({"where": "similarity > 0.3 and language = 'en'"}, inside),
        "allow": ({"allow": tmp_path / "subset.npy"}, set(range(0, ROWS, 2))),
        "both": (
            {
                "where": "not (similarity <= 0.3 or language != 'en')",
                "allow": tmp_path / "subset.npy",
            },
            inside & set(range(0, ROWS, 2)),
        ),
    }
    for name, (kept, expected) in cases.items():
        assert 40 < len(expected) < 400
        source = superbatch.Source(uri=folder, **kept)
        asked = spec(
            inputs,
            f"kept-{name}",
            sources=[source],
            epochs=1,
            phases=[uniform(super_batch_size=len(expected), sub_batch_size=len(expected))],
        )
        run = superbatch.connect(service.address).open_run(asked)
        assert run.dataset.dataset_rows == len(expected)
        assert run.spec.sources[0].where == kept.get("where", "")
        assert epoch(run) == {f"{row // 384}.parquet#{row % 384}" for row in expected}
    ended = index(
        tmp_path / "state",
        folder.as_uri(),
        "--where",
        cases["where"][0]["where"],
        "--allow",
        (tmp_path / "subset.npy").as_uri(),
    )
    assert f'"outside":{ROWS - len(cases["both"][1])}' in ended.stdout, ended.stderr


def test_joint_selection_and_receipts_name_rows_as_they_are_stored(inputs, service, pool, table):
    folder, full = pool
    source = superbatch.Source(uri=folder, where="similarity between 0.2 and 0.7")
    asked = spec(inputs, "kept-joint", sources=[source], lag=superbatch.at_most(8), max_ahead=1)
    run = superbatch.connect(service.address).open_run(asked)
    shards = {f"{number}.parquet": full.slice(number * 384, 384) for number in range(2)}
    serves(run, shards, 3)
    similarity = full["similarity"].to_pylist()
    for step in range(3):
        receipt = run.receipt(step)
        for row in [*receipt.chosen, *receipt.passed_over]:
            assert 0.2 <= similarity[row.shard * 384 + row.row] <= 0.7
    # As it is asked for again after the coordinator forgot it.
    first = [row.id for row in run.receipt(0).chosen]
    again = superbatch.connect(service.address).open_run(asked, incarnation="again")
    assert sorted(again.select(0, rank=0, world_size=1)["_superbatch_id"].to_pylist()) == sorted(
        first
    )


def test_samples_of_tars_are_kept_by_their_json(inputs, service, tars):  # noqa: F811
    source = superbatch.Source(uri=tars, where="number < 64 and kind is not null")
    asked = spec(inputs, "kept-tar", sources=[source], epochs=1, phases=[uniform()], max_ahead=1)
    run = superbatch.connect(service.address).open_run(asked)
    expected = {f"{shard:05d}.tar#{row}" for shard in range(3) for row in range(64)}
    assert epoch(run) == expected


def test_what_can_never_be_kept_is_refused_by_name(inputs, service, pool):  # noqa: F811
    folder, _ = pool
    for where, wanted, says in (
        ("similarity >", "RUN_SPEC_IMPOSSIBLE", "at character 13"),
        ("similarty > 0.3", "COLUMN_NOT_FOUND", "'similarty' (where, at character 1)"),
        ("language > 0.3", "SCHEMA_MISMATCH", "compared with 0.3"),
        ("similarity > 2", "DATASET_EMPTY", "where leaves out 768"),
    ):
        source = superbatch.Source(uri=folder, where=where)
        asked = spec(inputs, "kept-never", sources=[source], phases=[uniform()])
        with pytest.raises(superbatch.Error) as caught:
            superbatch.connect(service.address).open_run(asked)
        assert reason(caught) == wanted and says in str(caught.value), caught.value


def test_failed_downloads_are_no_candidates(inputs, service, table, tmp_path):  # noqa: F811
    """As img2dataset's Parquet writer leaves them: with a status, an error and no image."""
    failed = [row % 4 == 0 for row in range(ROWS)]
    images = [
        None if gone else image
        for gone, image in zip(failed, table["png"].to_pylist(), strict=True)
    ]
    part = table.set_column(
        table.schema.get_field_index("png"), "png", pyarrow.array(images, pyarrow.binary())
    )
    status = ["failed_to_download" if gone else "success" for gone in failed]
    errors = ["HTTP Error 404" if gone else None for gone in failed]
    part = part.append_column("status", [status]).append_column("error_message", [errors])
    (tmp_path / "pool").mkdir()
    pyarrow.parquet.write_table(part, tmp_path / "pool" / "00000.parquet", row_group_size=100)
    source = (tmp_path / "pool").as_uri()
    ended = index(tmp_path / "state", source)
    assert '"not_downloaded":192' in ended.stdout and '"without_image":0' in ended.stdout
    # A super-batch may be as large as the sub-batch: none of its rows is a hole.
    asked = spec(inputs, "downloaded", sources=[source], epochs=1, phases=[uniform()], max_ahead=1)
    run = superbatch.connect(service.address).open_run(asked)
    found = epoch(run)
    assert len(found) == ROWS - 192 and all(int(row.rsplit("#")[1]) % 4 for row in found)
    assert not run.receipt(0).bad_rows
