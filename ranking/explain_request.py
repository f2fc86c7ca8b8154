"""Why the candidates of one request stand where they stand.

Contributions are those of Integrated Gradients, less their mean over the request's candidates: they
sum to a candidate's log odds less the request's mean ones. What all candidates share thereby counts
only as far as it suits one candidate better than another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from features import columns
from features.batch import RequestBatch
from features.schema import DatasetSchema
from ranking.attribution_gradients import Explainer
from ranking.attribution_groups import FeatureGroup
from ranking.attribution_inputs import SampleInputs
from ranking.bundle import Bundle

_CATALOG = "catalog.parquet"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExplainedRequest:
    """One request's candidates, the likeliest click first.

    Attributes:
        request: what was asked, by whom and when.
        products: [C] product ids.
        titles: [C] of the catalog; empty where it has none.
        probability: [C] of a click.
        clicked: [C] bool.
        contributions: [C, G] log odds, over the request's mean.
        values: [C] the candidate's own features as they were given, by name.
        incompleteness: by how much contributions miss the change of log odds, as a share of it.
    """

    request: dict[str, Any]
    products: list[int]
    titles: list[str]
    probability: npt.NDArray[np.float32]
    clicked: npt.NDArray[np.bool_]
    contributions: npt.NDArray[np.float32]
    values: list[dict[str, Any]]
    incompleteness: float

    def document(self, groups: Sequence[FeatureGroup]) -> dict[str, Any]:
        """Return what ``importance.json`` has of it."""
        candidates = [
            {
                "rank": place + 1,
                "product_id": product,
                "title": self.titles[place],
                "clicked": bool(self.clicked[place]),
                "probability": float(self.probability[place]),
                "contributions": {
                    group.name: float(value)
                    for group, value in zip(groups, self.contributions[place], strict=True)
                },
                "values": self.values[place],
            }
            for place, product in enumerate(self.products)
        ]
        return {
            **self.request,
            "contributions_are": "log odds over the mean of the request's candidates",
            "incompleteness": self.incompleteness,
            "candidates": candidates,
        }


def explain_request(
    bundle: Bundle, record: pa.Table, explainer: Explainer, data: Path
) -> ExplainedRequest:
    """Explain the ranking of a request's candidates.

    Args:
        bundle: of the ranker.
        record: of the request, one row.
        explainer: of the same ranker.
        data: dataset folder, for the titles of the products.
    """
    batch = bundle.ranker.encode(RequestBatch.from_records(record, bundle.schema))
    inputs = SampleInputs(bundle.ranker, batch)
    found = explainer.integrated_gradients(inputs, torch.arange(inputs.candidates))
    order = np.argsort(-found.log_odds, kind="stable")
    row = record.to_pylist()[0]
    products = [row[columns.PRODUCT_ID][place] for place in order]
    over_mean = found.of_group - found.of_group.mean(axis=0)
    return ExplainedRequest(
        request=_request(row, bundle.schema),
        products=products,
        titles=_titles(data, products),
        probability=torch.sigmoid(torch.from_numpy(found.log_odds[order])).numpy(),
        clicked=np.array(row[columns.CLICKED])[order],
        contributions=over_mean[order],
        values=[_values(row, bundle.schema, int(place)) for place in order],
        incompleteness=found.incompleteness(),
    )


def _request(row: dict[str, Any], schema: DatasetSchema) -> dict[str, Any]:
    features = [f.name for f in schema.features if f.level == "request"]
    return {
        "request_id": row[columns.REQUEST_ID],
        "user_id": row[columns.USER_ID],
        "requested_at": row[columns.REQUESTED_AT].isoformat(sep=" "),
        "query": row[columns.QUERY],
        "purchases_in_history": len(row[columns.PURCHASE_HISTORY] or ()),
        "values": {name: _plain(row[name]) for name in features},
    }


def _values(row: dict[str, Any], schema: DatasetSchema, place: int) -> dict[str, Any]:
    features = [f.name for f in schema.features if f.level == "candidate"]
    return {name: _plain(row[name][place]) for name in features}


def _plain(value: Any) -> Any:
    """Return a value fit for JSON: what is missing as None."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _titles(data: Path, products: Sequence[int]) -> list[str]:
    """Return the catalog's titles; empty where there is no catalog, product or title."""
    path = data / _CATALOG
    if not path.is_file():
        return [""] * len(products)
    wanted = [columns.PRODUCT_ID, columns.TITLE]
    catalog = pq.read_table(
        path, columns=wanted, filters=pc.field(columns.PRODUCT_ID).isin(list(products))
    )
    titles = dict(zip(*(catalog[name].to_pylist() for name in wanted), strict=True))
    return [titles.get(product) or "" for product in products]
