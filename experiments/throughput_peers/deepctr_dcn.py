"""Training throughput of DeepCTR-Torch's DCN; runs in an environment that has DeepCTR-Torch only.

Training is DeepCTR-Torch's own ``fit`` (its loader and ``adam``), without its metrics, regularisers
and separate linear part, which other DCNs do not have either and which would only slow it down.
``--cross matrix`` is the cross network of DCNv2, ``--cross vector`` that of the first DCN.
"""

# mypy: disable-error-code="import-not-found"

import argparse
import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import DCN

WARM_UP_STEPS = 5


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
    parser.add_argument("--cross", choices=["matrix", "vector"], default="matrix")
    return parser.parse_args()


def main() -> None:
    """Train for the steps asked for and print one JSON line."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    rows = (WARM_UP_STEPS + options.steps) * options.batch_size
    with np.load(options.data) as data:
        repeats = -(-rows // len(data["clicked"]))
        codes, dense, clicked = (
            np.concatenate([data[name]] * repeats)[:rows] for name in ("codes", "dense", "clicked")
        )
        vocabulary = data["vocabulary"].tolist()
    # float32, in which DeepCTR-Torch holds its ids anyway: all fields share one matrix.
    fields = {f"sparse_{i}": codes[:, i].astype(np.float32) for i in range(codes.shape[1])}
    fields |= {f"dense_{i}": np.nan_to_num(dense[:, i]) for i in range(dense.shape[1])}
    columns = [
        SparseFeat(f"sparse_{i}", vocabulary_size=size, embedding_dim=options.embedding_dim)
        for i, size in enumerate(vocabulary)
    ]
    columns += [DenseFeat(f"dense_{i}", 1) for i in range(dense.shape[1])]
    model = DCN(
        linear_feature_columns=[],
        dnn_feature_columns=columns,
        cross_num=options.cross_layers,
        cross_parameterization=options.cross,
        dnn_hidden_units=tuple(options.deep),
        l2_reg_linear=0,
        l2_reg_embedding=0,
        l2_reg_cross=0,
    )
    model.compile("adam", "binary_crossentropy")
    step_ends: list[float] = []
    model.optim.register_step_post_hook(lambda *_: step_ends.append(time.perf_counter()))
    with contextlib.redirect_stdout(sys.stderr):
        model.fit(
            fields, clicked.astype(np.float32), batch_size=options.batch_size, epochs=1, verbose=0
        )
    seconds = step_ends[-1] - step_ends[WARM_UP_STEPS - 1]
    result = {
        "peer": f"DeepCTR-Torch DCN ({options.cross})",
        "rows_per_second": round(options.steps * options.batch_size / seconds),
        "version": version("deepctr-torch"),
        "torch": torch.__version__,
        "threads": options.threads,
        "step_ms": round(1000 * seconds / options.steps, 2),
    }
    print(json.dumps(result))  # noqa: T201 - the driver reads this line


if __name__ == "__main__":
    main()
