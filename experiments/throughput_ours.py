"""The ranker's own side of the throughput comparison: one JSON line with its rows/s.

The rate is taken over the training loop as it is used, reading, decoding and encoding the request
records included, after a warm-up.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

from features.requests import RequestsManifest
from features.schema import DatasetSchema
from ranking.bundle import PretrainedTables
from ranking.config import ModelConfig, RankerConfig, TrainingConfig, TransformConfig
from ranking.ranker import Ranker
from ranking.run import TrainingData
from ranking.training import Progress, Trainer

_WARM_UP_STEPS = 10


def configuration(options: argparse.Namespace) -> RankerConfig:
    """Return the ranker to time.

    ``dcn`` is the peers' model: full-matrix cross layers beside a deep network, no binned copies
    of the dense features, one linear layer on top. ``two-tower`` adds the embedding tower with the
    purchase history. ``recipe`` is the default two-tower model.
    """
    if options.variant == "recipe":
        model, transforms = ModelConfig(), TransformConfig()
    else:
        model = ModelConfig(
            embedding_tower=options.variant == "two-tower",
            embedding_dim=options.embedding_dim,
            cross_layers=options.cross_layers,
            cross_rank=0,
            deep=options.deep,
            head=(),
        )
        transforms = TransformConfig(bins=0)
    training = TrainingConfig(
        batch_rows=options.batch_size,
        threads=options.threads,
        evaluate_week=options.weeks[-1] + 1,
        train_weeks=len(options.weeks),
    )
    return RankerConfig(model=model, transforms=transforms, training=training)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--weeks", type=int, nargs="+", required=True)
    parser.add_argument("--variant", choices=["dcn", "two-tower", "recipe"], required=True)
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--cross-layers", type=int, default=2)
    parser.add_argument(
        "--deep", type=lambda text: tuple(int(n) for n in text.split(",")), default=(128, 64)
    )
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Train on the weeks asked for and print one JSON line."""
    options = parse_arguments()
    config = configuration(options)
    schema = DatasetSchema.load(options.records.parent)
    data = TrainingData.plan(schema, RequestsManifest.load(options.records), config)
    tables = None
    if config.model.embedding_tower:
        tables = PretrainedTables.read(options.records.parent / "tables").content
    ranker = Ranker(config.model, *data.fit_transforms(config), tables)
    rows = data.train_rows()
    trainer = Trainer(ranker, schema, data.train_files(), rows, config.training)
    ticks: list[tuple[float, int]] = []

    def on_step(progress: Progress, loss: float) -> None:
        ticks.append((time.perf_counter(), progress.rows))

    trainer.run(on_step=on_step)
    (begin, first), (end, last) = ticks[_WARM_UP_STEPS], ticks[-1]
    result = {
        "peer": f"ours, {options.variant}",
        "rows_per_second": round((last - first) / (end - begin)),
        "version": version("dashclip-ranker"),
        "torch": version("torch"),
        "threads": options.threads,
        "dense_parameters": sum(p.numel() for p in ranker.dense_parameters()),
    }
    print(json.dumps(result))  # noqa: T201 - the driver reads this line


if __name__ == "__main__":
    main()
