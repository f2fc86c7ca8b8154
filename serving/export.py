"""Export of a trained ranker for serving, behind a gate of parity."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features.batch import RequestBatch
from features.console import print_table, say
from features.errors import BadInputError
from features.files import atomic_folder
from ranking.bundle import Bundle
from ranking.explain_sample import Week
from ranking.ranker import Ranker
from ranking.run import versions
from serving.compiled import compile_ahead, load_compiled
from serving.embedding_table import TABLE_DTYPES, EmbeddingTable, TableDtype
from serving.exported import ExportedRanker, table_place
from serving.golden import golden_requests
from serving.inputs import InputSpec
from serving.manifest import PT2, TORCHSCRIPT, Manifest, describe_file, save_golden
from serving.online_ranker import IdMaps, OnlineRanker
from serving.parity import BOUNDS, SAME, Sample, Score, Scores, compare, require_parity
from serving.raw_requests import tensors_of, to_batch
from serving.scripted import large_tables, scripted

_EXAMPLE = 16  # requests that the tracers see
_CATALOG = "catalog.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """How a ranker is exported.

    Attributes:
        table_dtype: of the tables in the TorchScript file.
        pt2: whether the float model is compiled ahead of time too, which needs a C++ compiler.
        requests: the most evaluation requests to compare on, evenly over the week.
    """

    table_dtype: TableDtype = "int8"
    pt2: bool = True
    requests: int = 20_000

    def __post_init__(self) -> None:
        if self.table_dtype not in TABLE_DTYPES:
            raise BadInputError(
                f"'table_dtype' must be one of {', '.join(TABLE_DTYPES)}, got {self.table_dtype!r}"
            )
        if self.requests < 1:
            raise BadInputError(f"'requests' must be 1 or more, got {self.requests}")


def export_ranker(run: Path, data: Path, output: Path, config: ExportConfig) -> Manifest:
    """Export a finished run; nothing is written where the gate does not hold.

    Args:
        run: folder that train-ranker wrote.
        data: folder of the dataset that it was trained on; its evaluation week is the gate's.
        output: folder of the exported ranker; an earlier one is replaced.
        config: how.

    Returns:
        What ``manifest.json`` says.

    Raises:
        BadInputError: the run or its data are not there, or a form of the model is out of bounds.
    """
    week = Week.open(run, data)
    records = _evenly(week.records(), config.requests)
    say(f"exporting {run}: {len(records):,} requests of week {week.number} must come out the same")
    with atomic_folder(output) as folder:
        manifest = _Export(week.bundle, records, config, folder).write(data / _CATALOG)
    _show(manifest, output)
    return manifest


class _Export:
    """One export into a scratch folder."""

    def __init__(
        self, bundle: Bundle, records: pa.Table, config: ExportConfig, folder: Path
    ) -> None:
        self._bundle = bundle
        self._records = records
        self._config = config
        self._folder = folder
        self._inputs = InputSpec.of(bundle.schema, records.schema)
        self._example = RequestBatch.from_records(records.slice(0, _EXAMPLE), bundle.schema)
        self._online = OnlineRanker(bundle.ranker, config.table_dtype)

    def write(self, catalog: Path) -> Manifest:
        """Write and check everything; returns the manifest."""
        module = scripted(self._online, self._example, self._inputs)
        module.save(str(self._folder / TORCHSCRIPT))
        if self._config.pt2:
            say(f"compiling {PT2}")
            online = OnlineRanker(self._bundle.ranker, "float32")
            compile_ahead(online, self._example, self._folder / PT2)

        def score(batch: RequestBatch) -> Tensor:
            return module.score(*tensors_of(batch))

        def score_raw(raw: dict[str, Any]) -> list[float]:
            with torch.inference_mode():
                return score(to_batch([raw], self._inputs)).tolist()

        golden = golden_requests(self._records, self._inputs, score_raw, catalog)
        save_golden(self._folder, golden)
        draft = self._manifest().save(self._folder)
        loaded = ExportedRanker.open(self._folder)  # the very code that serving loads it with
        loaded.check_golden()
        parity = {"requests": len(self._records), "forms": self._gate(score, loaded)}
        return dataclasses.replace(draft, parity=parity).save(self._folder)

    def _gate(self, score: Score, loaded: ExportedRanker) -> list[dict[str, Any]]:
        """Compare all forms; raises where one is out of bounds."""
        sample = Sample.of(self._records, self._bundle.schema)
        dtype = self._config.table_dtype

        def online(batch: RequestBatch) -> Tensor:
            return self._online(*tensors_of(batch))

        eager = Scores.of("eager", self._bundle.ranker.score, sample)
        quantised = Scores.of("quantised", online, sample)
        forms = [
            compare("quantised", quantised, "eager", eager, sample.clicked, BOUNDS[dtype]),
            compare(
                "scripted",
                Scores.of("scripted", score, sample),
                "quantised",
                quantised,
                sample.clicked,
                SAME,
            ),
            compare(
                "loaded",
                Scores.of("loaded", lambda b: torch.from_numpy(loaded.score(b)), sample),
                "quantised",
                quantised,
                sample.clicked,
                SAME,
            ),
        ]
        if self._config.pt2:
            compiled = load_compiled(self._folder / PT2)
            forms.append(
                compare(
                    "pt2",
                    Scores.of("pt2", compiled, sample),
                    "eager",
                    eager,
                    sample.clicked,
                    BOUNDS["float32"],
                )
            )
        require_parity(forms)
        return forms

    def _manifest(self) -> Manifest:
        """Return the manifest before the gate."""
        bundle, online, path = self._bundle, self._online, self._folder / TORCHSCRIPT
        tables = large_tables(online)
        return Manifest(
            dataset=bundle.schema.name,
            model="two-tower" if bundle.config.model.embedding_tower else "dcn",
            table_dtype=self._config.table_dtype,
            window_days=bundle.window_days,
            history_cap=bundle.history_cap,
            one_request_a_batch=bundle.config.model.counts_history,
            inputs=self._inputs,
            versions=versions(),
            provenance=bundle.provenance,
            table_fingerprint=bundle.table_fingerprint,
            sizes=_sizes(online, bundle.ranker),
            parity={},
            shared_tables={name: table_place(path, table) for name, table in tables.items()},
            files={f.name: describe_file(f) for f in sorted(self._folder.iterdir())},
        )


def _sizes(online: OnlineRanker, ranker: Ranker) -> dict[str, int]:
    """Return the bytes of each part of the served model, and of float32 tables beside them."""
    sizes = {"tables": 0, "tables_float32": 0, "id_maps": 0, "dense": 0}
    for module in online.modules():
        if isinstance(module, EmbeddingTable):
            sizes["tables"] += module.weight.nbytes
            sizes["tables_float32"] += module.number_of_rows() * module.dim * 4
        elif isinstance(module, IdMaps):
            sizes["id_maps"] += module.slots.nbytes + module.ids.nbytes
    sizes["dense"] = sum(p.nbytes for p in ranker.dense_parameters())
    return sizes


def _evenly(records: pa.Table, most: int) -> pa.Table:
    """Return at most ``most`` rows, evenly over the table."""
    if len(records) <= most:
        return records
    return records.take(pa.array(np.linspace(0, len(records) - 1, most).astype(np.int64)))


def _show(manifest: Manifest, output: Path) -> None:
    print_table(
        f"Parity on {manifest.parity['requests']:,} evaluation requests and edge cases",
        ["form", "against", "largest difference", "AUC", "AUC change"],
        [
            [
                form["form"],
                form["against"],
                f"{form['largest_difference']:.2e} (at most {form['bounds']['probability']:g})",
                f"{form['auc']:.6f}",
                f"{form['auc_change']:+.1e} (at most {form['bounds']['auc']:g})",
            ]
            for form in manifest.parity["forms"]
        ],
    )
    share = manifest.sizes["tables"] / max(manifest.sizes["tables_float32"], 1)
    print_table(
        f"Sizes (tables {manifest.table_dtype}: {share:.3f} of float32)",
        ["part", "MB"],
        [[name.replace("_", " "), f"{size / 1e6:.1f}"] for name, size in manifest.sizes.items()],
    )
    say(f"written to {output}, fingerprint {manifest.fingerprint[:12]}")
