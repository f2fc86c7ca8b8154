"""``benchmark-retrieval``: the paper's retrieval table (Table 1) on a dataset folder."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from features.console import run_command

if TYPE_CHECKING:
    from embeddings.encoder import Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Compare how well a trained model and the usual baselines retrieve products for queries.

    What is not there, a checkpoint or a package, is a line of the table that says so.
    """

    data: Path
    """The dataset folder, with relevance labels."""
    output: Path
    """The folder to write: retrieval.json and retrieval.md."""
    model: Path | None = None
    """A trained model; it is asked those queries that it was not trained on. Without one, the
    baselines are asked the held-out fifth."""
    k: tuple[int, ...] = (10,)
    """Length of the list, one or more; the first is the main one."""
    clip: str = "openai/clip-vit-base-patch32"
    """CLIP's checkpoint: a name on the model hub or a local folder."""
    blip: str = "Salesforce/blip-itm-base-coco"
    """BLIP's checkpoint; a .pth file of its own release too, such as BLIP-14M."""
    flava: str = "facebook/flava-full"
    """FLAVA's checkpoint."""
    search: Literal["exact", "faiss"] = "exact"
    """How the nearest products are found; FAISS is the faster for large pools."""
    max_broken_images: float = 0.1
    """The largest share of broken images that is put up with; each counts as missing."""


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _benchmark, prog="benchmark-retrieval")


def _benchmark(options: Options) -> None:
    from experiments.retrieval_rows import Methods
    from experiments.retrieval_table import benchmark_retrieval

    methods = Methods(
        untrained=_untrained(options.model),
        checkpoints={"clip": options.clip, "blip": options.blip, "flava": options.flava},
        search=options.search,
    )
    benchmark_retrieval(
        options.data,
        options.output,
        model=options.model,
        methods=methods,
        ks=options.k,
        max_broken_images=options.max_broken_images,
        command=" ".join(["benchmark-retrieval", *sys.argv[1:]]),
    )


def _untrained(model: Path | None) -> "Encoder | None":
    """Return the start that a DashCLIP model keeps beside itself."""
    from embeddings.dashclip_encoder import DashClipEncoder
    from embeddings.train import START

    start = None if model is None else model / START
    return DashClipEncoder(start) if start is not None and start.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
