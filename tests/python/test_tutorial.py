"""docs/tutorial.md: its files, run in its order."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
from recipe import EXAMPLES, Recipes, module, recipes  # noqa: F401  (a fixture)

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"


def files() -> dict[str, str]:
    """The page's Python files, by the names that it gives them."""
    text = PAGE.read_text()
    return dict(re.findall(r"`(\w+\.py)`[^`]*```python\n(.*?)```", text, re.DOTALL))


def unpack(pool: Path, folder: Path) -> None:
    """A folder of pictures and a CSV file of captions, as many people have them."""
    (folder / "pictures").mkdir()
    with open(folder / "captions.csv", "w") as out:
        writer = csv.writer(out)
        writer.writerow(["file", "caption"])
        for row in pyarrow.parquet.read_table(pool).to_pylist():
            (folder / "pictures" / f"{row['key']}.png").write_bytes(row["png"])
            writer.writerow([f"{row['key']}.png", row["caption"]])


def test_the_tutorial_runs_as_it_is_written(recipes: Recipes, tmp_path):
    unpack(recipes.inputs / "pool", tmp_path)
    shutil.copytree(recipes.inputs / "reference", tmp_path / "models/reference")
    told = {}
    assert list(files()) == ["pack.py", "learner.py", "first.py"]
    for name, code in files().items():
        path = tmp_path / name
        path.write_text(code.replace("http://127.0.0.1:50051", recipes.address))
        done = subprocess.run(
            [sys.executable, name],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        told[name] = done.stdout.splitlines()
    assert len(told["first.py"]) == 17
    assert re.fullmatch(r"[+-]\d+\.\d{3}  a \w+ \w+", told["first.py"][0])
    assert told["first.py"][-1].startswith("chosen ")


def test_its_trainer_resumes_where_the_page_says(recipes: Recipes, tmp_path, capfd):
    command = re.search(r"python train\.py (.*?)--steps 20 (--\S+ \d+)", PAGE.read_text(), re.S)
    assert (EXAMPLES / "pytorch/train.py").exists()
    sizes = dict(re.findall(r"--(su\w+-batch-size) (\d+)", command[1]))
    train, begun = module("pytorch"), []
    for steps in (4, 6):
        given = recipes.arguments("tutorial", steps=steps, checkpoints=tmp_path, **sizes)
        train.main([*given, "--save-every", "2"])
        begun.append(capfd.readouterr().out.split("\n")[0].split(" loss")[0])
    assert begun == ["step 0", "step 4"]
