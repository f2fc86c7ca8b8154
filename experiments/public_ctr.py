"""The ranker's network on public CTR data with fixed splits, to stand beside BARS's figures.

A folder with ``train``, ``valid`` and ``test`` files is read and encoded once; each seed is
trained, kept and never repeated as long as data and settings stay what they are.
"""

import dataclasses
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.public_ctr_config import (
    PublicConfig,
    Reference,
    reference_for,
    settings_for,
    spread,
)
from experiments.public_ctr_page import public_page
from features.console import print_table, say
from features.files import write_text

if TYPE_CHECKING:
    from experiments.public_ctr_data import EncodedData

# What changes no seed's outcome but for rounding.
_ASIDE = ("seeds", "threads")


def run_public(folder: Path, output: Path, config: PublicConfig | None = None) -> dict[str, Any]:
    """Train on the dataset of ``folder`` with every seed; write ``public.json`` and ``public.md``.

    Args:
        folder: with ``train``, ``valid`` and ``test`` (``.csv``, ``.parquet``, ``.libsvm`` or
            ``.txt``). Its name is the dataset's.
        output: folder for the encoded data, the seeds' results and the two files.
        config: settings; by default `settings_for` the folder's name.

    Returns:
        The content of ``public.json``.

    Raises:
        BadInputError: a split is missing, empty or of one class, ``label`` is missing or not 0 or
            1, the splits' columns differ, or training diverged.
    """
    from experiments.public_ctr_data import load_or_encode

    name = folder.resolve().name
    config = config or settings_for(name)
    reference = reference_for(name)
    data = load_or_encode(folder, output, config)
    runs = output / "seeds" / _identity(data, config)[:16]
    results = [_seed_result(data, config, seed, runs) for seed in config.seeds]
    document = {
        "dataset": name,
        "model": "parallel DCNv2 + DNN",
        "metrics": _summary(results),
        "seeds": results,
        "data": _data_facts(data),
        "settings": asdict(config),
        "reference": _reference_document(reference, data, config) if reference else None,
        "versions": _versions(),
    }
    write_text(output / "public.json", json.dumps(document, indent=2) + "\n")
    write_text(output / "public.md", public_page(document))
    return document


def print_public(document: dict[str, Any]) -> None:
    """Print what `run_public` returned as a table on standard output."""
    rows: list[tuple[str, ...]] = [
        (f"seed {one['seed']}", f"{one['auc']:.5f}", f"{one['log_loss']:.5f}")
        for one in document["seeds"]
    ]
    rows.append(("mean", *(_with_spread(document["metrics"], m) for m in ("auc", "log_loss"))))
    if reference := document["reference"]:
        rows.append(
            (
                f"BARS, mean of {reference['runs']}",
                *(_with_spread(reference["metrics"], m) for m in ("auc", "log_loss")),
            )
        )
    print_table(f"{document['dataset']}, test rows", ("", "AUC", "log loss"), rows)
    for caveat in reference["differences"] if reference else ():
        say(f"not comparable with BARS: {caveat}")


def _with_spread(metrics: dict[str, Any], name: str) -> str:
    deviation = metrics[f"{name}_std"]
    mean = f"{metrics[f'{name}_mean']:.5f}"
    return mean if deviation is None else f"{mean} ± {deviation:.5f}"


def _identity(data: "EncodedData", config: PublicConfig) -> str:
    """Return the fingerprint of all that decides a seed's outcome."""
    settings = {name: value for name, value in asdict(config).items() if name not in _ASIDE}
    text = json.dumps({"data": data.fingerprint, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _seed_result(
    data: "EncodedData", config: PublicConfig, seed: int, runs: Path
) -> dict[str, Any]:
    """Return one seed's result, trained now or earlier."""
    path = runs / f"seed-{seed}.json"
    if path.is_file():
        say(f"seed {seed}: from {path}")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    result = _train_seed(data, config, seed, runs / f"seed-{seed}.safetensors")
    write_text(path, json.dumps(result, indent=2) + "\n")
    (runs / f"seed-{seed}.safetensors").unlink(missing_ok=True)
    return result


def _train_seed(
    data: "EncodedData", config: PublicConfig, seed: int, checkpoint: Path
) -> dict[str, Any]:
    import torch

    from experiments.public_ctr_training import SeedRun
    from features.hardware import keep_freed_memory

    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        run = SeedRun(data, config, seed)
        run.train(checkpoint)
        auc, log_loss = run.scores("test")
    finally:
        torch.set_num_threads(threads)
    best = run.history[run.plateau.best]
    rows = len(data.splits["train"]) * len(run.history)
    return {
        "seed": seed,
        "auc": auc,
        "log_loss": log_loss,
        "valid_auc": best.auc,
        "valid_log_loss": best.log_loss,
        "best_epoch": run.plateau.best + 1,
        "epochs": len(run.history),
        "rows_per_second": rows / sum(epoch.seconds for epoch in run.history),
        "threads": config.threads,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "history": [asdict(epoch) for epoch in run.history],
    }


def _summary(results: list[dict[str, Any]]) -> dict[str, float | None]:
    return _moments({m: [one[m] for one in results] for m in ("auc", "log_loss")})


def _moments(values: dict[str, list[float]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, numbers in values.items():
        found[f"{name}_mean"], found[f"{name}_std"] = spread(numbers)
    return found


def _data_facts(data: "EncodedData") -> dict[str, Any]:
    return {
        "rows": {split: len(rows) for split, rows in data.splits.items()},
        "positives": {split: int(rows.clicked.sum()) for split, rows in data.splits.items()},
        "categorical": len(data.fields.categorical),
        "numeric": len(data.fields.numeric),
        "table_rows": data.table_rows,
        "fingerprint": data.fingerprint,
    }


def _reference_document(
    reference: Reference, data: "EncodedData", config: PublicConfig
) -> dict[str, Any]:
    """Return BARS's figures, and what speaks against standing them beside ours."""
    differences = []
    rows = tuple(len(split) for split in data.splits.values())
    if rows != reference.rows:
        wanted, given = (", ".join(f"{n:,}" for n in one) for one in (reference.rows, rows))
        differences.append(f"its split has {wanted} rows, this one {given}")
    for field in dataclasses.fields(config):
        wanted, given = getattr(reference.config, field.name), getattr(config, field.name)
        if field.name not in _ASIDE and wanted != given and not _found_by_itself(field.name, data):
            differences.append(f"its {field.name} is {wanted}, here {given}")
    return {
        "name": reference.name,
        "source": reference.source,
        "runs": len(reference.auc),
        "metrics": _moments({"auc": [*reference.auc], "log_loss": [*reference.log_loss]}),
        "differences": differences,
    }


def _found_by_itself(name: str, data: "EncodedData") -> bool:
    """Whether a setting was not needed: libsvm files tell their numeric fields."""
    names = data.fields.categorical + data.fields.numeric
    return name == "numeric" and all(one.startswith("field_") for one in names)


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    packages = {name: version(name) for name in ("dashclip-ranker", "torch", "torchrec")}
    return {"python": platform.python_version()} | packages
