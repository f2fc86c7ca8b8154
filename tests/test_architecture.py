"""Imports go one way, and the commands answer at once."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Each package may import those before it and none after it.
LAYERS = ("features", "embeddings", "ranking", "serving", "experiments")
# What takes long to import: a command loads it only once it has work to do.
HEAVY = (
    *("captum", "duckdb", "fastapi", "fbgemm_gpu", "matplotlib", "openai", "peft"),
    *("sklearn", "torch", "torchrec", "transformers", "uvicorn"),
)

ANSWER_HELP = f"""
import importlib, sys
module, function = sys.argv.pop(1).split(":")
try:
    sys.exit(getattr(importlib.import_module(module), function)())
finally:
    print("loaded:", *sorted({{*{HEAVY!r}}} & {{*sys.modules}}), file=sys.stderr)
"""


def imported_packages(source, package):
    """Return the top-level packages that ``source``, a module of ``package``, imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(package if node.level else (node.module or "").partition(".")[0])
    return found


def upward_imports(package, source):
    """Return the later layers that a module of ``package`` must not import, and does."""
    later = LAYERS[LAYERS.index(package) + 1 :]
    return sorted(imported_packages(source, package) & set(later))


def test_the_finder_sees_every_form_of_import():
    source = """
import features.errors as errors
from embeddings import tables
from . import towers
def late():
    import serving.bundle
    from experiments.datasets import complete_journey
"""
    assert imported_packages(source, "ranking") == {
        *("features", "embeddings", "ranking", "serving", "experiments")
    }
    assert upward_imports("ranking", source) == ["experiments", "serving"]
    assert upward_imports("experiments", source) == []


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_one_way(package):
    upward = {
        str(path.relative_to(ROOT)): wrong
        for path in sorted((ROOT / package).rglob("*.py"))
        if (wrong := upward_imports(package, path.read_text(encoding="utf-8")))
    }
    assert upward == {}


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_help_is_answered_without_heavy_imports(command):
    done = subprocess.run(
        [sys.executable, "-c", ANSWER_HELP, PROJECT["scripts"][command], "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert command in done.stdout
    assert done.stderr.splitlines()[-1].split() == ["loaded:"]


@pytest.mark.parametrize("dataset", sorted(PROJECT["entry-points"]["dashclip.datasets"]))
def test_dataset_builders_exist(dataset):
    module, _, function = PROJECT["entry-points"]["dashclip.datasets"][dataset].partition(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert function in names
