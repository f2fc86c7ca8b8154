"""A bundle: everything that turns raw requests into probabilities, in two files.

``bundle.json`` says what the model is (schema of its features, shape, versions, fingerprints);
``model.safetensors`` holds its tensors. Nothing in it is ever unpickled.
"""

import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from embeddings.tables import open_table
from features.checkpoint import copy_into, load_state, save_state
from features.config_file import from_dict
from features.errors import BadInputError
from features.files import atomic_folder
from features.id_map import hash_strings
from features.schema import DatasetSchema, parse_schema
from features.transforms import LevelTransforms
from ranking.config import RankerConfig
from ranking.pretrained_embeddings import PretrainedTable
from ranking.ranker import Ranker

_FORMAT = 1
_DESCRIPTION = "bundle.json"
_KEYS = ("schema", "config", "window_days", "history_cap", "table_fingerprint", "provenance")
_TENSORS = "model.safetensors"
TABLES = ("product", "query")


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedTables:
    """The product and query tables of one encoder.

    Attributes:
        content: tables by name; the query table's ids are `hash_strings` of the queries.
        fingerprint: of the encoder.
    """

    content: dict[str, PretrainedTable]
    fingerprint: str

    @classmethod
    def read(cls, folder: Path) -> "PretrainedTables":
        """Open ``product.parquet`` and ``query.parquet``: ids are read, embeddings when needed.

        Raises:
            BadInputError: a table is missing or broken, or they are not of one encoder.
        """
        read = {name: open_table(folder / f"{name}.parquet") for name in TABLES}
        for name, kind in (("product", pa.int64()), ("query", pa.string())):
            found = read[name].ids.type
            if found != kind:
                raise BadInputError(
                    f"{folder / name}.parquet: column 'id' is {found}, expected {kind}"
                )
        product, query = read["product"], read["query"]
        if product.fingerprint != query.fingerprint:
            raise BadInputError(
                f"{folder}: product.parquet is of encoder {product.fingerprint} and query.parquet "
                f"of {query.fingerprint}; both must be of one encoder"
            )
        dims = [table.embedding.shape[1] for table in (product, query)]
        if dims[0] != dims[1]:
            raise BadInputError(
                f"{folder}: product.parquet has dimension {dims[0]} and query.parquet "
                f"{dims[1]}; both must be the same"
            )
        ids = {"product": product.ids.to_numpy(), "query": hash_strings(query.ids)}
        return cls(
            content={n: PretrainedTable(ids=ids[n], weight=read[n].embedding) for n in TABLES},
            fingerprint=product.fingerprint,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A trained ranker and what is needed to feed it.

    Attributes:
        ranker: the model, ready to score.
        schema: the features that it reads.
        config: how it was made.
        window_days: length of the purchase-history window.
        history_cap: the most products in a history.
        table_fingerprint: of its tables' encoder; empty without tables.
        provenance: versions, data fingerprint and the like.
    """

    ranker: Ranker
    schema: DatasetSchema
    config: RankerConfig
    window_days: int
    history_cap: int
    table_fingerprint: str
    provenance: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write the bundle to ``folder``, whole or not at all."""
        description = {
            "format": _FORMAT,
            "schema": self.schema.to_toml(),
            "config": asdict(self.config),
            "window_days": self.window_days,
            "history_cap": self.history_cap,
            "table_fingerprint": self.table_fingerprint,
            "provenance": self.provenance,
        }
        with atomic_folder(folder) as scratch:
            save_state(scratch / _TENSORS, _tensors(self.ranker), {"format": _FORMAT})
            text = json.dumps(description, indent=2) + "\n"
            (scratch / _DESCRIPTION).write_text(text, encoding="utf-8")

    @classmethod
    def open(
        cls, folder: Path, *, tables: Path | None = None, allow_other_tables: bool = False
    ) -> "Bundle":
        """Load a bundle.

        Args:
            folder: what `save` wrote.
            tables: a folder of newer embedding tables to use in place of the bundle's own, for
                products and queries that came after training.
            allow_other_tables: accept tables of another encoder than the one trained with.

        Raises:
            BadInputError: the bundle is incomplete or damaged, or the tables do not fit it.
        """
        path = folder / _DESCRIPTION
        description = _read_description(path)
        tensors, _ = load_state(folder / _TENSORS)
        config = from_dict(str(path), description["config"], RankerConfig)
        schema = parse_schema(str(path), tomllib.loads(description["schema"]))
        ranker = _rebuild(config, schema, tensors, str(folder))
        fingerprint = description["table_fingerprint"]
        if tables is not None:
            other = PretrainedTables.read(tables)
            _replace_tables(ranker, other, fingerprint, allow_other_tables)
            fingerprint = other.fingerprint
        return cls(
            ranker=ranker.eval(),
            schema=schema,
            config=config,
            window_days=description["window_days"],
            history_cap=description["history_cap"],
            table_fingerprint=fingerprint,
            provenance=description["provenance"],
        )


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInputError(f"{path.parent}: no bundle there (no {path.name})")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path}: not valid JSON: {error}") from error
    found = description.get("format") if isinstance(description, dict) else None
    if found != _FORMAT:
        raise BadInputError(f"{path}: format {found!r}, this version reads {_FORMAT}")
    for key in _KEYS:
        if key not in description:
            raise BadInputError(f"{path}: lacks '{key}'")
    return description


def _tensors(ranker: Ranker) -> dict[str, Tensor]:
    tensors = {f"trained/{name}": value for name, value in ranker.trained_state().items()}
    for level, transforms in _levels(ranker):
        for name, vocabulary in zip(transforms.sparse, transforms.vocabularies, strict=True):
            tensors[f"{level}/vocabulary/{name}"] = vocabulary.get_buffer("ids")[1:]
        for part in ("boundaries", "mean", "std"):
            tensors[f"{level}/{part}"] = getattr(transforms, part)
    if ranker.pretrained is not None:
        for name in TABLES:
            tensors[f"table/{name}/ids"] = ranker.pretrained.id_maps[name].get_buffer("ids")[1:]
            if ranker.config.tables == "frozen":
                weight = ranker.pretrained.embedding_bags[name].get_buffer("weight")
                tensors[f"table/{name}/weight"] = weight[1:]
    return tensors


def _levels(ranker: Ranker) -> list[tuple[str, LevelTransforms]]:
    return [("request", ranker.request_transforms), ("candidate", ranker.candidate_transforms)]


def _rebuild(
    config: RankerConfig, schema: DatasetSchema, tensors: dict[str, Tensor], where: str
) -> Ranker:
    try:
        levels = [_transforms(level, schema, tensors) for level in ("request", "candidate")]
        tables = None
        if config.model.embedding_tower:
            tables = {name: _table(name, config, tensors) for name in TABLES}
    except KeyError as error:
        raise BadInputError(f"{where}: the bundle lacks tensor {error}") from error
    ranker = Ranker(config.model, levels[0], levels[1], tables)
    prefix = "trained/"
    trained = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    copy_into(ranker.trained_state(), trained, where)
    return ranker


def _transforms(level: str, schema: DatasetSchema, tensors: dict[str, Tensor]) -> LevelTransforms:
    sparse = schema.names("sparse", level)  # type: ignore[arg-type]
    return LevelTransforms(
        sparse,
        schema.names("dense", level),  # type: ignore[arg-type]
        [tensors[f"{level}/vocabulary/{name}"].numpy() for name in sparse],
        *(tensors[f"{level}/{part}"].numpy() for part in ("boundaries", "mean", "std")),
    )


def _table(name: str, config: RankerConfig, tensors: dict[str, Tensor]) -> PretrainedTable:
    ids = tensors[f"table/{name}/ids"].numpy()
    if config.model.tables == "frozen":
        return PretrainedTable(ids=ids, weight=tensors[f"table/{name}/weight"].numpy())
    trained = tensors[f"trained/pretrained._fused.{name}.embedding_bags.{name}.weight"]
    return PretrainedTable(ids=ids, weight=trained[1:].numpy())


def _replace_tables(
    ranker: Ranker, tables: PretrainedTables, fingerprint: str, allow_other: bool
) -> None:
    if ranker.pretrained is None or ranker.config.tables != "frozen":
        raise BadInputError("this bundle's model does not read frozen tables: leave tables out")
    if tables.fingerprint != fingerprint and not allow_other:
        raise BadInputError(
            f"the tables are of encoder {tables.fingerprint}, the bundle was trained with "
            f"{fingerprint}; build them with that encoder, or allow other tables"
        )
    for name in TABLES:
        expected = ranker.pretrained.embedding_bags[name].weight.shape[1]
        found = tables.content[name].weight.shape[1]
        if found != expected:
            raise BadInputError(
                f"the {name} table has dimension {found}, the bundle was trained with {expected}"
            )
    ranker.replace_tables(tables.content)
