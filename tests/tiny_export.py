"""A small trained ranker, exported for serving."""

from pathlib import Path

from tiny_ranker import tiny_config

from ranking.run import train_ranker
from serving.export import ExportConfig, export_ranker


def export_tiny(
    data: Path, tables: Path, folder: Path, *, seed: int = 0, pt2: bool = False, **model: object
) -> Path:
    """Train a ranker on the tiny dataset and export it; returns the exported folder.

    Args:
        data: the tiny dataset with its request records (fixture `ranker_data`).
        tables: its embedding tables (fixture `random_tables`).
        folder: a new one for the run; the export is its folder ``export``.
        seed: another one gives another ranker.
        pt2: whether the compiled float model is made too, which takes half a minute.
        model: changes of the model's shape.
    """
    config = tiny_config(training={"seed": seed, "epochs": 1}, **model)
    run = folder / "run"
    train_ranker(data, run, tables=tables, config=config)
    export_ranker(run, data, folder / "export", ExportConfig(pt2=pt2))
    return folder / "export"
