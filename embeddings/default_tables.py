"""The embedding tables that ``train-ranker`` makes for itself where it is given none."""

from pathlib import Path

from embeddings.build import build_tables
from embeddings.catalog import RELEVANCE
from embeddings.config import AlignmentConfig, CroppingConfig, DashClipTraining, PretrainingConfig
from features.console import say

MODEL = "dashclip"
TABLES = "tables"

# A few minutes on two cores; `train-dashclip` and `--tables` are for more.
SMALL_RECIPE = DashClipTraining(
    pretraining=PretrainingConfig(epochs=1, limit=8_192),
    cropping=CroppingConfig(limit=8_192),
    alignment=AlignmentConfig(epochs=1, limit=32_768, mined_products=0),
)


def ensure_tables(data: Path, *, recipe: DashClipTraining = SMALL_RECIPE) -> Path:
    """Return the folder of a dataset's embedding tables, made if need be.

    Where the dataset has graded relevance, DashCLIP is trained on it (``data/dashclip``); otherwise
    the tables are of the packaged sentence encoder.

    Args:
        data: dataset folder.
        recipe: of the training.

    Raises:
        BadInputError: an input breaks a rule.
    """
    tables = data / TABLES
    encoder = None
    if (data / RELEVANCE).exists():
        from embeddings.dashclip_encoder import DashClipEncoder
        from embeddings.train import train_dashclip

        say(f"embedding tables: DashCLIP on {data}, small recipe")
        train_dashclip(data, data / MODEL, config=recipe, command="train-ranker")
        encoder = DashClipEncoder(data / MODEL)
    build_tables(data, tables, encoder)
    return tables
