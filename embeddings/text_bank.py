"""Every text of a training run, by number, as the first trainable layer takes it.

What frozen layers say of a text never changes, so that it is computed once and kept
(in float16) as long as it fits into memory; otherwise it is computed each time.

Legend: ``N`` texts asked for, ``T`` tokens of the longest, ``H`` hidden size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from embeddings.batching import for_each, length_buckets, token_batches
from embeddings.dashclip import DashClip
from features.console import progress_bar

_BATCH_TOKENS = 2048


class TextBank:
    """Distinct texts of one encoder.

    Args:
        tokens: token ids of each text, special tokens included.
        model: the encoders, in evaluation mode as far as they are frozen.
        depth: layers that are frozen.
        query: whether they are queries.
        room: bytes that the kept states may take.
        bfloat16: whether frozen layers compute in bfloat16.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        model: DashClip,
        *,
        depth: int,
        query: bool,
        room: float,
        bfloat16: bool,
    ) -> None:
        self._model = model
        self._query = query
        self._bfloat16 = bfloat16
        self.depth = depth
        self.lengths = torch.tensor([len(row) for row in tokens])
        self._starts = self.lengths.cumsum(0) - self.lengths
        flat = np.fromiter((i for row in tokens for i in row), np.int64, int(self.lengths.sum()))
        self._ids = torch.from_numpy(flat)
        hidden = model.config.text_config.hidden_size
        self._states: Tensor | None = None
        self.bytes = len(flat) * hidden * 2
        if depth and self.bytes <= room:
            self._states = self._compute(hidden)
        else:
            self.bytes = 0

    def pooled(self, rows: Tensor, model: DashClip | None = None) -> Tensor:
        """Return ``[N, H]``: the texts through all layers and pooled, like lengths together.

        Args:
            rows: ``[N]`` numbers of texts.
            model: runs what is not frozen; the bank's own where None.
        """
        above = model or self._model
        return self.by_length(rows, lambda part: self._pooled(rows[part], above))

    def by_length(self, rows: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``[N, H]`` of texts encoded in parts of like length, in the order of ``rows``.

        Args:
            rows: ``[N]`` numbers of texts.
            encode: given positions in ``rows``, returns their vectors.
        """
        parts = [torch.from_numpy(p) for p in length_buckets(self.lengths[rows].numpy())]
        if len(parts) == 1:
            return encode(torch.arange(len(rows)))
        encoded = torch.cat([encode(part) for part in parts])
        return encoded[torch.cat(parts).argsort().to(encoded.device)]

    def ids(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return token ids ``[N, T]`` and mask ``[N, T]`` of some texts."""
        places, mask = self._places(rows)
        device = self._model.device
        return self._ids[places].masked_fill(~mask, 0).to(device), mask.to(device)

    def states(self, rows: Tensor, model: DashClip | None = None) -> tuple[Tensor, Tensor]:
        """Return ``[N, T, H]`` after the frozen layers, and the mask ``[N, T]``.

        Args:
            rows: ``[N]`` numbers of texts.
            model: whose embeddings to take where nothing is frozen; the bank's own where None.
        """
        if self._states is not None:
            places, mask = self._places(rows)
            device = self._states.device
            return self._states[places.to(device)].float(), mask.to(device)
        ids, mask = self.ids(rows)
        if not self.depth:
            return (model or self._model).embed_text(ids, query=self._query), mask
        with torch.no_grad():
            states = self._model.embed_text(ids, query=self._query)
            states = self._model.run_text(states, mask, last=self.depth, query=self._query)
        return states.float(), mask

    def _pooled(self, rows: Tensor, model: DashClip) -> Tensor:
        states, mask = self.states(rows, model)
        states = model.run_text(states, mask, first=self.depth, query=self._query)
        return model.pool(states, mask)

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        lengths = self.lengths[rows]
        column = torch.arange(int(lengths.max()))
        mask = column < lengths[:, None]
        return self._starts[rows][:, None] + column.minimum(lengths[:, None] - 1), mask

    def _compute(self, hidden: int) -> Tensor:
        device = self._model.device
        states = torch.empty(len(self._ids), hidden, dtype=torch.float16, device=device)
        batches = list(token_batches(self.lengths.numpy(), _BATCH_TOKENS))
        what = "frozen layers: queries" if self._query else "frozen layers: titles"
        with progress_bar() as bar:
            task = bar.add_task(what, total=len(self.lengths))

            def work(batch: np.ndarray) -> None:
                rows = torch.from_numpy(batch)
                places, mask = self._places(rows)
                ids = self._ids[places].to(device)
                fast = torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16)
                with torch.inference_mode(), fast:
                    found = self._model.embed_text(ids, query=self._query)
                    found = self._model.run_text(
                        found, mask.to(device), last=self.depth, query=self._query
                    )
                    states[places[mask].to(device)] = found[mask.to(device)].half()
                bar.update(task, advance=len(batch))

            if device.type == "cpu":
                for_each(work, batches)
            else:
                for batch in batches:
                    work(batch)
        return states
