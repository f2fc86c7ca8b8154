"""Generated impressions end to end: features, one epoch, and the reachable AUC.

::

    OUTPUT/large/IMPRESSIONS/          with another seed than 0, IMPRESSIONS-seed-SEED
      data/           the generated dataset with its request records
      run/            the ranker
      stages.json     what each stage took; one that is there is not repeated

The size asked for comes after a hundredth and a tenth of it, so that memory can be seen not to
grow with the number of impressions.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.load_checks import Check, Part, at_least, at_most
from experiments.scaling_rates import Mark, feature_marks, rates, training_marks
from experiments.scaling_results import GIB, ScalingConfig, figure, run_python
from features.console import say
from features.files import write_text

_FEWEST = 200_000
_MOST_GIB = 6
_MOST_SHORT = 0.002
_LEAST_SPEED = 0.9  # of the start's, at the end
_TRUTH = "truth.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """One command of the way from nothing to a trained ranker."""

    name: str
    arguments: tuple[str, ...]


def measure(config: ScalingConfig) -> Part:
    """Generate, build features and train at three sizes; checks are of the largest."""
    sizes = sorted({max(_FEWEST, config.impressions // share) for share in (100, 10, 1)})
    found = {size: _measure_size(config, size) for size in sizes}
    return Part(
        checks=tuple(_checks(found)),
        figures={"seed": config.seed, "sizes": {str(size): part for size, part in found.items()}},
    )


def _measure_size(config: ScalingConfig, impressions: int) -> dict[str, Any]:
    """Return the stages, the speed over time, and what the ranker reached of what it could."""
    seed = f"-seed-{config.seed}" if config.seed else ""
    folder = config.output / "large" / f"{impressions}{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data, run = folder / "data", folder / "run"
    write_text(folder / "train.toml", f'[training]\ndevice = "cpu"\nthreads = {config.threads}\n')
    stages = {
        stage.name: _run_stage(folder, stage, impressions)
        for stage in _stages(folder, impressions, config)
    }
    truth = json.loads((data / _TRUTH).read_text(encoding="utf-8"))
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    reached = metrics["slices"]["all"]
    return {
        "truth": truth,
        "stages": stages,
        "features_over_time": _over_time(feature_marks(data / "requests")),
        "training_over_time": _over_time(training_marks(run / "tensorboard")),
        "training": metrics["training"],
        "auc": reached["auc"],
        "auc_short": truth["reachable_auc"] - reached["auc"],
        "log_loss": reached["log_loss"],
        "log_loss_over": reached["log_loss"] - truth["reachable_log_loss"],
    }


def _stages(folder: Path, impressions: int, config: ScalingConfig) -> tuple[_Stage, ...]:
    data, run = str(folder / "data"), str(folder / "run")
    options = {"impressions": impressions, "seed": config.seed, "processes": config.threads}
    generate = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    toml = str(folder / "train.toml")
    train = ("--data", data, "--tables", f"{data}/tables", "--output", run, "--config", toml)
    build = "import sys; from features.cli import main; sys.exit(main())"
    return (
        _Stage(
            name="generate", arguments=("-m", "experiments.synthetic", "--output", data, *generate)
        ),
        _Stage(name="features", arguments=("-c", build, "--data", data)),
        _Stage(name="train", arguments=("-m", "ranking.cli", *train)),
    )


def _run_stage(folder: Path, stage: _Stage, impressions: int) -> dict[str, float]:
    """Run a stage unless ``stages.json`` has it, and return what it took."""
    file = folder / "stages.json"
    done = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if stage.name not in done:
        say(f"{impressions:,} impressions: {stage.name}")
        ended = asdict(run_python(stage.arguments))
        del ended["text"]
        done[stage.name] = ended | {"rows_per_second": impressions / ended["seconds"]}
        write_text(file, json.dumps(done, indent=1) + "\n")
    found: dict[str, float] = done[stage.name]
    return found


def _over_time(stretches: Sequence[Sequence[Mark]]) -> list[float]:
    return [round(rate, 1) for rate in rates(stretches)]


def _checks(found: dict[int, dict[str, Any]]) -> list[Check]:
    checks = [
        figure(f"{size:,} impressions: peak memory of {name}, GiB", stage["peak_bytes"] / GIB)
        for size, part in list(found.items())[:-1]
        for name, stage in part["stages"].items()
    ]
    size, part = list(found.items())[-1]
    for name, stage in part["stages"].items():
        peak, speed = stage["peak_bytes"] / GIB, stage["rows_per_second"]
        checks.append(at_most(f"{size:,} impressions: peak memory of {name}, GiB", peak, _MOST_GIB))
        checks.append(figure(f"{size:,} impressions: rows/s of {name}", speed))
    for name in ("features", "training"):
        over_time = part[f"{name}_over_time"]
        third = max(1, len(over_time) // 3)
        share = median(over_time[-third:]) / median(over_time[:third])
        what = f"{size:,} impressions: rows/s of {name}, last third over first"
        checks.append(at_least(what, share, _LEAST_SPEED))
    checks.append(figure(f"{size:,} impressions: reachable AUC", part["truth"]["reachable_auc"]))
    what = f"{size:,} impressions: AUC short of the reachable one"
    checks.append(at_most(what, part["auc_short"], _MOST_SHORT))
    return checks
