"""The README's Python runs as it stands, and its tables name what exists."""

import re
import shutil
import tomllib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_block_runs(tiny_dataset, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shutil.copytree(tiny_dataset, tmp_path / "data" / "mine")
    (tmp_path / "data" / "mine" / "relevance.parquet").unlink()  # nothing to train DashCLIP on
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert 0 < names["metrics"]["slices"]["all"]["auc"] < 1
    assert len(names["probabilities"]) == len(names["impressions"])
    assert np.isfinite(names["probabilities"]).all()
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert str(names["metrics"]["slices"]["all"]["auc"]) in capsys.readouterr().out


def test_every_command_is_described():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    table = README.split("## Commands")[1].split("## The model")[0]
    for name in scripts:
        assert f"| `{name}" in table


def test_the_layout_names_every_package():
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} | {"tests"}
    layout = README.split("## Layout")[1]
    assert packages == {name for name in packages if f"\n{name}/" in layout}
