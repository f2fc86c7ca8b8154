"""Raw ids to table rows: a hash map made of tensors, the same in training and in a served model.

Raw ids and rows are different things: an *id* is any int64 (strings become one by
`hash_strings`), a *row* is a position in a table. Row 0 belongs to every id that is not known.
"""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

MISSING_ID = -(1 << 63)
"""The id that stands for a null."""

_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_MULTIPLIERS = (-7046029254386353131, -4417276706812531889)  # the golden ratio's, xxHash64's
_MAX_ROUNDS = 500


def hash_strings(strings: pa.Array) -> np.ndarray:
    """Return the 64-bit FNV-1a hash of each UTF-8 string, as int64 of shape [N].

    Nulls become `MISSING_ID`. Vectorised over the strings: one step per byte position.
    """
    strings = strings.cast(pa.large_string())
    _, offsets_buffer, data_buffer = strings.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[strings.offset :][: len(strings) + 1]
    lengths = np.diff(offsets)
    data = np.frombuffer(data_buffer or b"", np.uint8)
    hashes = np.full(len(strings), _FNV_OFFSET)
    remaining = np.arange(len(strings))
    for position in range(int(lengths.max(initial=0))):
        remaining = remaining[lengths[remaining] > position]
        hashes[remaining] ^= data[offsets[remaining] + position]
        hashes[remaining] *= _FNV_PRIME
    ids = hashes.view(np.int64)
    if strings.null_count:
        ids[strings.is_null().to_numpy(zero_copy_only=False)] = MISSING_ID
    return ids


def hash_text(text: str) -> int:
    """Return what `hash_strings` gives for one string: faster for one, slower for many.

    Raises:
        UnicodeEncodeError: the text has half of a surrogate pair.
    """
    found = int(_FNV_OFFSET)
    prime = int(_FNV_PRIME)
    for byte in text.encode():
        found = ((found ^ byte) * prime) & 0xFFFFFFFFFFFFFFFF
    return found - (1 << 64) if found >> 63 else found


class IdMap(nn.Module):
    """Maps int64 ids to rows 1 … N in the order given, and every other id to row 0.

    A cuckoo hash table (Pagh and Rodler 2004) whose slots hold rows: an id lies in one of two
    slots, so that a lookup is two gathers without a branch, whatever the number of ids. It is
    built by numpy in rounds over all ids that are still without a slot.

    Memory: 8 bytes an id and 4 bytes a slot, with 2.2 to 4.4 slots an id.

    Raises:
        ValueError: an id is given twice.
    """

    ids: Tensor  # [N + 1] int64; entry 0 is a filler, never compared
    slots: Tensor  # [M] int32 rows, M a power of two; 0 where free

    def __init__(self, ids: np.ndarray) -> None:
        super().__init__()
        self.multipliers = _MULTIPLIERS
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        unique, counts = np.unique(ids, return_counts=True)
        if len(unique) != len(ids):
            raise ValueError(f"an id is given once, got {unique[counts.argmax()]} twice")
        bits = max(4, int(np.ceil(np.log2(2.2 * max(len(ids), 1)))))
        slots = None
        while slots is None:
            self.shift = 64 - bits
            slots = _place(ids, bits)
            bits += 1
        self.register_buffer("ids", torch.from_numpy(np.concatenate([[0], ids])))
        self.register_buffer("slots", torch.from_numpy(slots))

    def __len__(self) -> int:
        return self.ids.numel() - 1

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (int64, 0 … N) of ``ids`` (int64, any shape)."""
        flat = ids.reshape(-1)
        first = self._candidate(flat, self.multipliers[0])
        second = self._candidate(flat, self.multipliers[1])
        return torch.bitwise_or(first, second).long().reshape(ids.shape)

    def _candidate(self, ids: Tensor, multiplier: int) -> Tensor:
        """Return the rows in the slots of one multiplier where they are of these ids, else 0."""
        slots = ((ids * multiplier) >> self.shift).bitwise_and(self.slots.numel() - 1)
        rows = self.slots.index_select(0, slots)
        return torch.where(self.ids.index_select(0, rows) == ids, rows, 0)


def _slot_of(ids: np.ndarray, choice: np.ndarray, bits: int) -> np.ndarray:
    multipliers = np.array(_MULTIPLIERS).view(np.uint64)[choice]
    return ((ids.view(np.uint64) * multipliers) >> np.uint64(64 - bits)).astype(np.int64)


def _place(ids: np.ndarray, bits: int) -> np.ndarray | None:
    """Return the slots (int32 rows, [2 ** bits]) of a cuckoo table, or None where none was found.

    Each round every row without a slot claims its slot of choice; where several claim one, one of
    them gets it, and who held it before moves to its other choice.
    """
    slots = np.zeros(1 << bits, dtype=np.int32)
    choice = np.zeros(len(ids) + 1, dtype=np.int8)
    pending = np.arange(1, len(ids) + 1, dtype=np.int32)
    for _ in range(_MAX_ROUNDS):
        if not len(pending):
            return slots
        claimed = _slot_of(ids[pending - 1], choice[pending], bits)
        evicted = np.unique(slots[claimed])
        slots[claimed] = pending
        lost = pending[slots[claimed] != pending]
        pending = np.concatenate([evicted[evicted > 0], lost])
        choice[pending] ^= 1
    return None
