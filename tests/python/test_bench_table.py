"""The table of `make bench`: what is read of a benchmark's output, kept, and said of changes."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench
from scripts.bench import BenchFailed, Ratio

ROOT = Path(__file__).parents[2]
SCRIPT = """
print("some words")
print("ratio\\tRows: speed of a peer\\t1.250\\tgoal=1.5\\tprocessor=0.700")
print("ratio\\tmemory\\t1.100\\tgoal=1.2\\tbetter=lower")
raise SystemExit(STATUS)
"""


def ended_with(status: int) -> list[str]:
    return [sys.executable, "-c", SCRIPT.replace("STATUS", str(status))]


def test_lines_are_read_as_they_are_written():
    ratios = [
        Ratio(1.25),
        Ratio(0.5, goal=0.87),
        Ratio(1.4, goal=1.2, lower_is_better=True),
        Ratio(2.0, processor=0.125),
    ]
    for ratio in ratios:
        assert bench.parsed(bench.line("a name: of, it", ratio) + "\n") == ("a name: of, it", ratio)


def test_ratios_are_gathered_and_other_lines_shown(capfd):
    ratios = bench.run("a", ended_with(0))
    assert ratios == {
        "Rows: speed of a peer": Ratio(1.25, goal=1.5, processor=0.7),
        "memory": Ratio(1.1, goal=1.2, lower_is_better=True),
    }
    shown = capfd.readouterr().out
    assert "some words" in shown and "ratio\t" not in shown


@pytest.mark.parametrize(
    "said", ["ratio\tname\n", "ratio\tname\tfast\n", "ratio\tname\t1\tgaol=2\n"]
)
def test_a_line_that_is_no_ratio_is_a_failure(said):
    with pytest.raises(BenchFailed, match="no ratio"):
        bench.gathered([said], print)


def test_a_bench_that_fails_or_measures_nothing_is_a_failure():
    with pytest.raises(BenchFailed, match="ended with 3"):
        bench.run("a", ended_with(3))
    with pytest.raises(BenchFailed, match="printed no ratio"):
        bench.run("a", [sys.executable, "-c", "print('ratio      0.5')"])


def test_one_that_fails_costs_the_others_nothing(tmp_path):
    out, keep = tmp_path / "out.tsv", tmp_path / "keep.tsv"
    bench.write(keep, {"old": Ratio(3.0)})
    seen = []

    def one(name: str) -> dict[str, Ratio]:
        seen.append(bench.read(out))
        if name == "broken":
            raise BenchFailed("it ended with 2")
        return {name: Ratio(1.0)}

    ratios, failed = bench.measure(["a", "broken", "b"], out, keep, one)
    assert failed == {"broken": "it ended with 2"}
    assert ratios == {"a": Ratio(1.0), "b": Ratio(1.0)} == bench.read(out)
    assert seen == [{}, {"a": Ratio(1.0)}, {"a": Ratio(1.0)}], "written after each"
    assert bench.read(keep) == {"old": Ratio(3.0), **ratios}


def test_a_table_is_read_as_it_was_written(tmp_path):
    ratios = {
        "a": Ratio(1.25, goal=1.5, processor=0.7),
        "b": Ratio(1.1, goal=1.2, lower_is_better=True),
    }
    bench.write(tmp_path / "table.tsv", ratios)
    assert bench.read(tmp_path / "table.tsv") == ratios
    assert bench.read(tmp_path / "missing.tsv") == {}


def test_changes_are_judged_by_their_direction():
    def said(now: Ratio, before: Ratio) -> str:
        (text,) = bench.compared({"a": now}, {"a": before})
        return text

    assert "better by 20%" in said(Ratio(1.2), Ratio(1.0))
    assert "WORSE by 20%" in said(Ratio(0.8), Ratio(1.0))
    lower = {"lower_is_better": True}
    assert "WORSE by 20%" in said(Ratio(1.2, **lower), Ratio(1.0, **lower))
    assert "better by 20%" in said(Ratio(0.8, **lower), Ratio(1.0, **lower))
    steady = said(Ratio(1.05), Ratio(1.0))
    assert "better" not in steady and "WORSE" not in steady
    text = said(Ratio(1.0, processor=0.5), Ratio(1.0, processor=1.0))
    assert "processor time WORSE by 50%" in text
    assert "new" in bench.compared({"a": Ratio(1.0)}, {})[0]


def test_goals_are_judged_by_their_direction():
    def said(ratio: Ratio) -> str:
        return bench.compared({"a": ratio}, {})[0]

    assert "goal >= 1.5 MISSED" in said(Ratio(1.4, goal=1.5))
    assert "MISSED" not in said(Ratio(1.5, goal=1.5))
    assert "goal <= 1.2 MISSED" in said(Ratio(1.3, goal=1.2, lower_is_better=True))
    assert "MISSED" not in said(Ratio(1.1, goal=1.2, lower_is_better=True))


def test_the_kept_table_can_be_read():
    assert bench.read(bench.KEPT)


def test_every_bench_has_a_target():
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in bench.BENCHES if f"\nbench-{name}:" not in makefile] == []


def test_no_bench_runs_or_replaces_what_tests_run():
    targets = [*(f"bench-{name}" for name in bench.BENCHES), "load"]
    recipes = subprocess.run(
        ["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "target/release/python" in recipes
    assert "target/debug" not in recipes and "_superbatch.abi3.so" not in recipes


def test_a_release_client_has_a_folder_of_its_own(tmp_path):
    """It never takes the place of the one in the tree, which tests use."""
    for folder, package, extension, library in (
        ("client/python/python", "superbatch", "_superbatch", "lib_superbatch.so"),
        ("scoring-kernels/python/python", "superbatch_kernels", "_kernels", "lib_kernels.so"),
    ):
        tree = tmp_path / folder / package
        tree.mkdir(parents=True)
        (tree / "__init__.py").write_text("")
        (tree / f"{extension}.abi3.so").write_text("debug")
        released = tmp_path / "target/release"
        released.mkdir(parents=True, exist_ok=True)
        (released / library).write_text("release")
    for _ in range(2):
        subprocess.run([ROOT / "scripts/release_python.sh"], cwd=tmp_path, check=True)
    for package, extension in (("superbatch", "_superbatch"), ("superbatch_kernels", "_kernels")):
        made = tmp_path / "target/release/python" / package
        assert (made / "__init__.py").exists()
        assert (made / f"{extension}.abi3.so").read_text() == "release"
    debug = tmp_path / "client/python/python/superbatch/_superbatch.abi3.so"
    assert debug.read_text() == "debug"
