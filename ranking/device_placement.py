"""Which tables lie in a GPU's memory, and which beyond it: a decision by size alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from features.errors import BadInputError

Where = Literal["device", "cached", "host"]

# Bytes a row that stay on the GPU wherever the row lies: what row-wise Adagrad keeps of a trained
# one, the inverse norm of a frozen one.
_KEPT = 4
_OWNER = 4  # bytes a row of a cached table: which table it is of
_SLOT = 16  # bytes a row in the cache, beside its values: whose it is, and when it was read


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSize:
    """What of a table's size matters for its place.

    Attributes:
        name: of the table.
        rows: N.
        row_bytes: of one row's values.
        trained: whether its rows are updated.
    """

    name: str
    rows: int
    row_bytes: int
    trained: bool

    @property
    def on_device(self) -> int:
        """Bytes of the GPU's memory that the whole table takes."""
        return self.rows * (self.row_bytes + _KEPT)

    @property
    def elsewhere(self) -> int:
        """Bytes of the GPU's memory that it takes where its rows lie in the machine's."""
        return self.rows * (_KEPT + _OWNER if self.trained else _KEPT)

    @property
    def in_cache(self) -> int:
        """Bytes of the GPU's memory that a cache of all its rows would take."""
        return self.rows * (self.row_bytes + _SLOT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a table lies.

    Attributes:
        where: ``device``, the GPU's memory; ``cached``, the machine's memory, with a cache of the
            rows last read in the GPU's; ``host``, the machine's memory, which the GPU reads.
        cache_rows: how many rows the cache holds.
    """

    where: Where
    cache_rows: int = 0


def plan_tables(tables: Sequence[TableSize], budget: int) -> dict[str, Place]:
    """Place tables so that what they take of a GPU's memory is within ``budget`` bytes.

    The smallest tables come to lie there first. Of those that do not fit, the frozen ones are read
    where they are, and the trained ones share what is left as a cache, each in the same proportion
    to its size.

    Raises:
        BadInputError: not even what has to lie on the GPU fits.
    """
    left = budget - sum(table.elsewhere for table in tables)
    if left < 0:
        raise BadInputError(
            f"tables of {sum(table.rows for table in tables):,} rows need "
            f"{(budget - left) / 1e9:.1f} GB of the GPU's memory beside their rows, and "
            f"{budget / 1e9:.1f} GB are free: train on 'device' cpu, or on several GPUs"
        )
    places: dict[str, Place] = {}
    beyond = []
    for table in sorted(tables, key=lambda table: table.on_device):
        more = table.on_device - table.elsewhere
        if more <= left:
            places[table.name] = Place(where="device")
            left -= more
        elif table.trained:
            beyond.append(table)
        else:
            places[table.name] = Place(where="host")
    share = min(1.0, left / max(sum(table.in_cache for table in beyond), 1))
    for table in beyond:
        places[table.name] = Place(where="cached", cache_rows=int(table.rows * share))
    return places
