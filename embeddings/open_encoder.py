"""Which encoder a model folder holds."""

import json
from pathlib import Path

from embeddings.encoder import Encoder
from embeddings.text_encoder import TextEncoder

_DASHCLIP = "dashclip"


def open_encoder(folder: Path | None) -> Encoder:
    """Return the encoder in ``folder``, or the packaged MiniLM if that is ``None``.

    A folder whose ``config.json`` says ``"model_type": "dashclip"`` holds what `train-dashclip`
    trained; any other is taken for a sentence encoder in transformers' form.

    Raises:
        BadInputError: the folder is missing or holds neither.
    """
    if folder is None:
        return TextEncoder.packaged()
    if _model_type(folder) == _DASHCLIP:
        from embeddings.dashclip_encoder import DashClipEncoder

        return DashClipEncoder(folder)
    return TextEncoder(folder)


def _model_type(folder: Path) -> object:
    """Return what ``config.json`` says; None where there is none to read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None
