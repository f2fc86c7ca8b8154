"""A transformer that reads a query and a title together and says how likely each label is.

Legend: ``P`` pairs, ``T`` tokens of the longest pair of a batch, ``D`` width, ``3`` labels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embeddings.batching import quiet_transformers
from embeddings.labeling.grades import LABELS
from embeddings.starts import reading
from features.checkpoint import copy_into, load_state, save_state
from features.errors import BadInputError
from features.files import atomic_folder

HEAD = "head.safetensors"
_TEMPERATURE = "temperature"


class PairClassifier(nn.Module):
    """A BERT-like encoder over ``[CLS] query [SEP] title [SEP]``, and one output for each label.

    The labels are read off the mean ``q`` of the query's token vectors and the mean ``t`` of the
    title's, as ``[q, t, |q - t|, q * t]`` (Conneau and others 2017, InferSent). Sentence encoders
    such as the packaged MiniLM were trained so that the sum of ``q * t`` tells of meaning shared,
    which BERT's first token does not: fine-tuning begins with something to go by.

    Args:
        encoder: of transformers.
        tokenizer: that fits it.
        max_tokens: longer pairs are cut.
    """

    def __init__(self, encoder: Any, tokenizer: Any, *, max_tokens: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(4 * encoder.config.hidden_size, len(LABELS))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.temperature = 1.0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def train(self, mode: bool = True) -> "PairClassifier":
        """Stay without dropout: over a few epochs of short texts it brought nothing but time."""
        super().train(False)
        return self

    def freeze(self, share: float) -> None:
        """Keep the word vectors and a share of the layers, counted from the input, as they are."""
        self.encoder.embeddings.requires_grad_(False)
        layers = next(m for m in self.encoder.modules() if isinstance(m, nn.ModuleList))
        for layer in layers[: round(share * len(layers))]:
            layer.requires_grad_(False)

    def tokenize(
        self, queries: Sequence[str], titles: Sequence[str]
    ) -> tuple[list[list[int]], np.ndarray]:
        """Return the token ids of each pair, and where its title begins among them ([P] int64).

        A pair that is too long is cut at the end of its longer text.
        """
        encoded = self.tokenizer(
            list(queries),
            list(titles),
            truncation="longest_first",
            max_length=self.max_tokens,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        tokens = encoded["input_ids"]
        title = np.fromiter(
            (_first_of_title(encoded.sequence_ids(pair)) for pair in range(len(tokens))),
            np.int64,
            len(tokens),
        )
        return tokens, title

    def forward(self, ids_pt: Tensor, title_p: Tensor, mask_pt: Tensor) -> Tensor:
        """Return logits [P, 3] float32.

        Args:
            ids_pt: [P, T] int64 token ids.
            title_p: [P] int64, where the title begins.
            mask_pt: [P, T] bool, what is a token.
        """
        of_title_pt = torch.arange(ids_pt.shape[1], device=ids_pt.device) >= title_p[:, None]
        given = {"input_ids": ids_pt, "attention_mask": mask_pt.long()}
        if getattr(self.encoder.config, "type_vocab_size", 0) > 1:
            given["token_type_ids"] = (of_title_pt & mask_pt).long()
        hidden_ptd = self.encoder(**given).last_hidden_state.float()
        q_pd = _direction(hidden_ptd, mask_pt & ~of_title_pt)
        t_pd = _direction(hidden_ptd, mask_pt & of_title_pt)
        features = torch.cat([q_pd, t_pd, (q_pd - t_pd).abs(), q_pd * t_pd], dim=1)
        with torch.autocast(self.device.type, enabled=False):
            logits: Tensor = self.head(features)
        return logits

    def save(self, folder: Path) -> None:
        """Write the encoder in transformers' form, and the head, whole or not at all."""
        with quiet_transformers(), atomic_folder(folder) as scratch:
            self.encoder.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            header = {"labels": list(LABELS), _TEMPERATURE: self.temperature}
            save_state(scratch / HEAD, self.head.state_dict(), header)


def _direction(hidden_ptd: Tensor, counts_pt: Tensor) -> Tensor:
    """Return the mean [P, D] of the vectors that count, scaled so that its elements are near 1."""
    counts_pt1 = counts_pt[:, :, None]
    mean_pd = (hidden_ptd * counts_pt1).sum(1)
    return nn.functional.normalize(mean_pd, dim=1) * math.sqrt(hidden_ptd.shape[2])


def _first_of_title(texts: list[int | None]) -> int:
    """Return where the second text begins, given which text each token is of, if of any."""
    return texts.index(1) if 1 in texts else len(texts) - 1


def load_pair_classifier(name: str, *, max_tokens: int) -> PairClassifier:
    """Return the classifier of a folder, or one with a new head over an encoder.

    Args:
        name: folder or hub name of a BERT-like encoder; a folder that `PairClassifier.save` wrote
            has a head.
        max_tokens: longer pairs are cut.

    Raises:
        BadInputError: the encoder or its tokenizer cannot be had, or it cannot read that many
            tokens.
    """
    from transformers import AutoModel, AutoTokenizer

    with quiet_transformers():
        tokenizer = reading(name, lambda: AutoTokenizer.from_pretrained(name))
        # On texts this short, the backward pass of torch's fused attention takes a processor ten
        # times as long as its forward pass; the plain one makes training 1.4 times as fast.
        encoder, report = reading(
            name,
            lambda: AutoModel.from_pretrained(
                name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            ),
        )
        # A pooler's output is not used.
        lacking = sorted(k for k in report["missing_keys"] if not k.startswith("pooler."))
        if lacking:
            raise BadInputError(f"{name}: the weights lack '{lacking[0]}'")
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        longest = getattr(encoder.config, "max_position_embeddings", max_tokens)
        if max_tokens > longest:
            raise BadInputError(
                f"{name}: reads {longest} tokens at most, and 'max_tokens' is {max_tokens}"
            )
        model = PairClassifier(encoder, tokenizer, max_tokens=max_tokens)
    if has_head(name):
        tensors, header = load_state(Path(name) / HEAD)
        copy_into(model.head.state_dict(), tensors, str(Path(name) / HEAD))
        model.temperature = float(header[_TEMPERATURE])
    return model.eval()


def has_head(name: str) -> bool:
    """Return whether a folder's classifier was fine-tuned."""
    return (Path(name) / HEAD).is_file()
