"""Which grader a TOML file or a folder names."""

from pathlib import Path

from embeddings.labeling.config import (
    CausalConfig,
    CrossEncoderConfig,
    EndpointConfig,
    read_grader_config,
)
from embeddings.labeling.grades import Grader
from embeddings.labeling.ledger import Ledger


def open_grader(path: Path, ledger: Ledger | None = None) -> Grader:
    """Return a grader that is ready to grade.

    Args:
        path: a grader's TOML file, or a folder that ``label-relevance fine-tune`` wrote.
        ledger: what an endpoint may spend and where it notes what it spent.

    Raises:
        BadInputError: the configuration is wrong, or a model cannot be had.
    """
    config = read_grader_config(path)
    folder = path if path.is_dir() else path.parent
    if isinstance(config, EndpointConfig):
        from embeddings.labeling.endpoint import Endpoint

        return Endpoint(config, folder, ledger)
    if isinstance(config, CausalConfig):
        from embeddings.labeling.causal import CausalGrader

        return CausalGrader.open(config, folder)
    if isinstance(config, CrossEncoderConfig):
        from embeddings.labeling.cross_encoder import CrossEncoder

        return CrossEncoder.open(config, folder)
    from embeddings.labeling.similarity import SimilarityGrader

    return SimilarityGrader.open(config, folder)
