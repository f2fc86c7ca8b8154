"""Vectors by the content that they say, so that nothing is encoded twice.

While tables are built, new vectors are saved every few seconds as a *part*: an embedding table of
its own, by row number. A run that was stopped leaves its parts, and the next one reads them.

Legend: ``N`` contents, ``D`` embedding dimension.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from embeddings.encoder import Encoder
from embeddings.tables import CONTENT_TYPE, EmbeddingTable, read_table, write_table
from features.errors import BadInputError

_SECONDS_A_PART = 20.0


def content_key(kind: str, text: str, image: bytes | None = None) -> bytes:
    """Return the 16-byte BLAKE2b hash of a content: what an encoder makes one vector of.

    Args:
        kind: ``product`` or ``query``; an encoder may say different things of the same text.
        text: the title or the query.
        image: the content of an image file, ``None`` where there is none.
    """
    words = text.encode()
    digest = hashlib.blake2b(digest_size=CONTENT_TYPE.byte_width, person=kind.encode())
    digest.update(len(words).to_bytes(8, "little"))
    digest.update(words)
    if image is not None:
        digest.update(b"image")
        digest.update(image)
    return digest.digest()


class VectorStore:
    """The float16 vectors of one encoder by content key.

    Args:
        parts: the folder that parts are saved in; it appears with the first of them.
        encoder: whose vectors these are.

    Attributes:
        added: vectors that were added, not read.
    """

    def __init__(self, parts: Path, encoder: Encoder) -> None:
        self.parts = parts
        self.added = 0
        self._encoder = encoder
        self._rows: dict[bytes, int] = {}
        self._settled = 0
        self._blocks = [np.empty((0, encoder.dim), np.float16)]
        self._unsaved = 0  # blocks, the last ones
        self._saved_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def settle(self) -> None:
        """Take what is here for what finished tables hold, which does not change in a build."""
        self._settled = len(self)

    def is_settled(self, key: bytes) -> bool:
        """Return whether ``key`` was here when `settle` was called."""
        return self._rows.get(key, self._settled) < self._settled

    def read(self, path: Path) -> None:
        """Take the vectors of an embedding table or part.

        None are taken of one that is missing, damaged, of another encoder or type, or that does
        not say what its vectors were made of.
        """
        try:
            table = read_table(path)
        except BadInputError:
            return
        kind, own = (table.fingerprint, table.dim), (self._encoder.fingerprint, self._encoder.dim)
        if table.content is None or kind != own or table.embedding.dtype != np.float16:
            return
        rows = {key: row for row, key in enumerate(table.content.to_pylist())}
        new = [(key, row) for key, row in rows.items() if key not in self]
        self._append([key for key, _ in new], table.embedding[[row for _, row in new]])

    def add(self, keys: Sequence[bytes], vectors: np.ndarray, names: Sequence[str]) -> None:
        """Take new vectors, and save those not yet saved as a part if it is time to.

        Parts are made of whole calls, so that a run that goes on after one makes the calls that
        the first would have made.

        Args:
            keys: [N], none of which is here.
            vectors: [N, D].
            names: [N], for the message.

        Raises:
            BadInputError: a value is not finite as float16.
        """
        assert vectors.shape == (len(keys), self._encoder.dim), vectors.shape
        with np.errstate(over="ignore"):
            vectors = vectors.astype(np.float16)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise BadInputError(
                f"encoder {self._encoder.fingerprint}: its vector of "
                f"{names[int(np.argmin(finite))]!r} holds a value that is not finite in float16"
            )
        self._append(keys, vectors)
        self.added += len(keys)
        self._unsaved += 1
        if time.monotonic() - self._saved_at >= _SECONDS_A_PART:
            self.save()

    def save(self) -> None:
        """Save what was added and is not saved yet as a part."""
        if not self._unsaved:
            return
        embedding = np.concatenate(self._blocks[-self._unsaved :])
        keys = list(self._rows)[-len(embedding) :]
        part = EmbeddingTable(
            ids=pa.array(np.arange(len(keys))),
            embedding=embedding,
            fingerprint=self._encoder.fingerprint,
            normalized=self._encoder.normalized,
            content=pa.array(keys, CONTENT_TYPE),
        )
        write_table(self.parts / f"{keys[0].hex()}.parquet", part)
        self._unsaved = 0
        self._saved_at = time.monotonic()

    def take(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the [N, D] float16 vectors of ``keys``, all of which are here."""
        rows = np.fromiter((self._rows[key] for key in keys), np.int64, len(keys))
        return np.concatenate(self._blocks)[rows]

    def _append(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        start = len(self._rows)
        self._rows.update((key, start + row) for row, key in enumerate(keys))
        assert len(self._rows) == start + len(keys), "a content was encoded twice"
        self._blocks.append(vectors)
