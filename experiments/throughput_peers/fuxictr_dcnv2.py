"""Training throughput of FuxiCTR's DCNv2; runs in an environment that has FuxiCTR only.

The network is the parallel DCNv2 of FuxiCTR's model zoo (which the package does not install),
assembled from FuxiCTR's own base model, embedding, cross and MLP layers; numeric fields go through
its ``Linear(1, embedding_dim)``, losses and optimiser are the zoo's defaults (binary cross entropy,
Adam 1e-3, no regulariser, gradient norm clipped at 10). Training is FuxiCTR's own ``fit``.

``--loader npz`` is FuxiCTR's loader; ``--loader memory`` hands ``fit`` ready tensors instead, so
that its figure is the arithmetic alone: more than a user of FuxiCTR gets.
"""

# mypy: disable-error-code="import-not-found"

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
from fuxictr.pytorch.layers import CrossNetV2, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel

WARM_UP_STEPS = 5


class DCNv2(BaseModel):
    """Parallel deep and cross network over FuxiCTR's layers; times each of its training steps."""

    def __init__(self, feature_map: FeatureMap, options: argparse.Namespace, model_root: str):
        super().__init__(
            feature_map, model_id="DCNv2", verbose=0, model_root=model_root, metrics=["AUC"]
        )
        self.embedding_layer = FeatureEmbedding(feature_map, options.embedding_dim)
        input_dim = feature_map.sum_emb_out_dim()
        self.crossnet = CrossNetV2(input_dim, options.cross_layers)
        self.parallel_dnn = MLP_Block(input_dim=input_dim, hidden_units=list(options.deep))
        self.fc = torch.nn.Linear(input_dim + options.deep[-1], 1)
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.step_ends: list[float] = []
        self.last_step = WARM_UP_STEPS + options.steps

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the click probabilities [B, 1] of a batch of columns."""
        embedded = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        both = torch.cat([self.crossnet(embedded), self.parallel_dnn(embedded)], dim=-1)
        return {"y_pred": self.output_activation(self.fc(both))}

    def train_step(self, batch_data: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run FuxiCTR's step, note when it ended, and stop after the last one wanted."""
        loss = super().train_step(batch_data)
        self.step_ends.append(time.perf_counter())
        self._stop_training = len(self.step_ends) >= self.last_step
        return loss

    def eval_step(self) -> None:
        """Skip FuxiCTR's evaluation after an epoch: only training is timed."""

    def load_weights(self, checkpoint: str) -> None:
        """Skip reading back the best weights at the end of ``fit``."""


class MemoryLoader:
    """Batches of ready tensors, shuffled by batch; takes no time of its own."""

    def __init__(self, columns: dict[str, np.ndarray], batch_size: int):
        rows = len(columns["clicked"]) // batch_size * batch_size
        tensors = {
            name: torch.from_numpy(column[:rows]).split(batch_size)
            for name, column in columns.items()
        }
        self.batches = [
            {name: parts[i] for name, parts in tensors.items()} for i in range(rows // batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for i in torch.randperm(len(self.batches)).tolist():
            yield self.batches[i]


def build_feature_map(vocabulary: np.ndarray, dense: int, embedding_dim: int) -> FeatureMap:
    """Declare the fields as FuxiCTR's preprocessing would."""
    feature_map = FeatureMap("records", "")
    feature_map.default_emb_dim = embedding_dim
    feature_map.labels = ["clicked"]
    for i, size in enumerate(vocabulary.tolist()):
        spec = {"source": "", "type": "categorical", "vocab_size": size}
        feature_map.features[f"sparse_{i}"] = spec
    for i in range(dense):
        feature_map.features[f"dense_{i}"] = {"source": "", "type": "numeric"}
    feature_map.num_fields = len(feature_map.features)
    feature_map.set_column_index()
    return feature_map


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=".npz: codes, sizes, dense, ...")
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--cross-layers", type=int, default=3)
    parser.add_argument(
        "--deep", type=lambda text: [int(n) for n in text.split(",")], default=[256, 128]
    )
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=40, help="steps timed, after a warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loader", choices=["npz", "memory"], default="npz")
    parser.add_argument("--workers", type=int, default=0, help="of FuxiCTR's npz loader")
    return parser.parse_args()


def main() -> None:
    """Train for the steps asked for and print one JSON line."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with np.load(options.data) as data:
        codes, dense = data["codes"], np.nan_to_num(data["dense"])
        vocabulary, clicked = data["vocabulary"], data["clicked"].astype(np.float32)
    columns = {f"sparse_{i}": codes[:, i].astype(np.int64) for i in range(codes.shape[1])}
    columns |= {f"dense_{i}": np.ascontiguousarray(dense[:, i]) for i in range(dense.shape[1])}
    columns["clicked"] = clicked
    feature_map = build_feature_map(vocabulary, dense.shape[1], options.embedding_dim)
    with tempfile.TemporaryDirectory() as scratch:
        if options.loader == "memory":
            loader = MemoryLoader(columns, options.batch_size)
        else:
            path = str(Path(scratch) / "train.npz")
            np.savez(path, **columns)
            loader = NpzDataLoader(
                feature_map,
                path,
                batch_size=options.batch_size,
                shuffle=True,
                num_workers=options.workers,
            )
        model = DCNv2(feature_map, options, scratch)
        model.fit(loader, epochs=math.ceil(model.last_step / len(loader)))
    seconds = model.step_ends[-1] - model.step_ends[WARM_UP_STEPS - 1]
    result = {
        "peer": "FuxiCTR DCNv2",
        "rows_per_second": round(options.steps * options.batch_size / seconds),
        "version": version("fuxictr"),
        "torch": torch.__version__,
        "threads": options.threads,
        "loader": options.loader if options.loader == "memory" else f"npz, {options.workers}",
        "step_ms": round(1000 * seconds / options.steps, 2),
    }
    print(json.dumps(result))  # noqa: T201 - the driver reads this line


if __name__ == "__main__":
    main()
