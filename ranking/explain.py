"""Feature importance of a trained run, without training it again (the paper's Section 4.2.3).

::

    RUN/importance/
      importance.json   every figure          report.html   the same, for people
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, rankdata, spearmanr

from features.console import print_table, progress_bar, say
from features.errors import BadInputError
from features.files import write_text
from features.schema import DatasetSchema
from ranking.attribution_gradients import Contributions, Explainer
from ranking.attribution_groups import EMBEDDINGS, FeatureGroup, feature_groups, feature_levels
from ranking.attribution_inputs import SampleInputs
from ranking.attribution_metrics import metrics_by_user
from ranking.attribution_permutation import PermutationImportance, permutation_importance
from ranking.explain_page import render_page
from ranking.explain_request import explain_request
from ranking.explain_sample import SampledRequests, Week, draw_sample, find_request, telling_request
from ranking.explain_tables import METHODS, all_tables
from ranking.run import versions
from ranking.training import one_thread

DOCUMENT = "importance.json"
PAGE = "report.html"

_ATTRIBUTED = 4096  # candidates that Integrated Gradients and Feature Ablation explain
_INCOMPLETE = 0.05  # beyond which Integrated Gradients are not to be trusted
_PAPER = dict(zip(EMBEDDINGS, (1, 2, 3), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainConfig:
    """What is explained, and how thoroughly.

    Attributes:
        week: of the requests; the run's evaluation week where None.
        part: name of the slice.
        sample: most requests of it.
        permutations: of each group, 2 or more.
        seed: of sample and permutations.
        groups: features to take together, as ``name=feature,feature``.
        request: the one that is explained by itself; one with a click where None.
    """

    week: int | None = None
    part: str = "all"
    sample: int = 2000
    permutations: int = 10
    seed: int = 0
    groups: tuple[str, ...] = ()
    request: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("sample", 2), ("permutations", 2), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise BadInputError(f"'{name}' must be {least} or more, got {value}")


def explain_ranker(
    run: Path, data: Path, output: Path, config: ExplainConfig, *, command: str = ""
) -> dict[str, Any]:
    """Explain a run; returns the content of ``importance.json``.

    Args:
        run: folder of the run.
        data: folder of the dataset that it was trained on.
        output: folder of the report.
        config: what to explain.
        command: the command line, for the report.

    Raises:
        BadInputError: the run is not finished, the data are other data, or what is asked for is
            not there.
    """
    week = Week.open(run, data, config.week)
    ranker = week.bundle.ranker
    groups = feature_groups(list(feature_levels(ranker)), config.groups)
    records = week.records()
    chosen = None
    if config.request is not None:
        chosen = find_request(week, records, config.request)
    sample = draw_sample(week, records, config.part, config.sample, config.seed)
    if chosen is None:
        chosen = telling_request(sample)
    say(
        f"explaining {run} on {len(sample.records):,} requests of week {week.number}, "
        f"slice {config.part}: {len(groups)} groups, {config.permutations} permutations"
    )
    with one_thread():  # the sums of one thread do not depend on the machine's cores
        inputs = SampleInputs(ranker, ranker.encode(sample.batch))
        explainer = Explainer(inputs, groups)
        permuted, gradients, ablated = _importances(sample, inputs, groups, explainer, config)
        local = explain_request(week.bundle, chosen, explainer, data)
        facts = _facts(week, sample, inputs, config, command)
    results = _results(groups, permuted, gradients, ablated)
    document = facts | results | {"request": local.document(groups)}
    _write(document, output)
    return document


def _importances(
    sample: SampledRequests,
    inputs: SampleInputs,
    groups: Sequence[FeatureGroup],
    explainer: Explainer,
    config: ExplainConfig,
) -> tuple[list[PermutationImportance], Contributions, Contributions]:
    """Return what each method finds, in the order of `METHODS`."""
    drawn = np.random.default_rng([config.seed, 1]).permutation(inputs.candidates)[:_ATTRIBUTED]
    rows = torch.from_numpy(np.sort(drawn))
    with progress_bar() as bar:
        passes = bar.add_task("permutations", total=config.permutations * (len(groups) + 1))
        integrated = bar.add_task("integrated gradients", total=len(rows))
        permuted = permutation_importance(
            inputs,
            groups,
            sample.clicked,
            sample.user_c,
            permutations=config.permutations,
            seed=config.seed,
            on_step=lambda: bar.advance(passes),
        )
        gradients = explainer.integrated_gradients(
            inputs, rows, lambda number: bar.advance(integrated, number)
        )
        ablated = explainer.ablation(inputs, rows)
    return permuted, gradients, ablated


def _facts(
    week: Week,
    sample: SampledRequests,
    inputs: SampleInputs,
    config: ExplainConfig,
    command: str,
) -> dict[str, Any]:
    """Return what was explained, and on what."""
    bundle = week.bundle
    metrics = metrics_by_user(
        inputs.logits(), sample.clicked, sample.user_c, 1 + max(sample.user_c)
    )
    schema: DatasetSchema = bundle.schema
    return {
        "dataset": schema.name,
        "caveat": schema.caveat,
        "model": "two-tower" if bundle.config.model.embedding_tower else "dcn",
        "week": week.number,
        "week_was_trained_on": week.number in week.training_weeks(),
        "slice": config.part,
        "slice_requests": sample.slice_requests,
        "requests": inputs.requests,
        "rows": inputs.candidates,
        "positives": int(sample.clicked.sum()),
        "users": int(max(sample.user_c)) + 1,
        "permutations": config.permutations,
        "seed": config.seed,
        "auc": float(metrics[0, 0]),
        "normalized_log_loss": float(metrics[1, 0]),
        "command": command,
        "versions": versions(),
        "data_fingerprint": week.manifest.fingerprint,
        "table_fingerprint": bundle.table_fingerprint,
    }


def _results(
    groups: Sequence[FeatureGroup],
    permuted: Sequence[PermutationImportance],
    gradients: Contributions,
    ablated: Contributions,
) -> dict[str, Any]:
    """Return importances, the most important first, agreement and the paper's ranks."""
    values = dict(
        zip(
            METHODS,
            (
                np.array([found.auc_loss for found in permuted]),
                np.array([found.log_loss_rise for found in permuted]),
                gradients.importance(),
                ablated.importance(),
            ),
            strict=True,
        )
    )
    ranks = {method: rankdata(-value, method="min") for method, value in values.items()}
    rows: list[dict[str, Any]] = [
        {
            "group": group.name,
            "members": list(group.members),
            **{method: float(value[place]) for method, value in values.items()},
            "auc_loss_interval": list(permuted[place].auc_loss_interval),
            "log_loss_rise_interval": list(permuted[place].log_loss_rise_interval),
            "ranks": {method: int(rank[place]) for method, rank in ranks.items()},
        }
        for place, group in enumerate(groups)
    ]
    rows.sort(key=lambda row: (row["ranks"]["auc_loss"], row["ranks"]["log_loss_rise"]))
    if gradients.incompleteness() > _INCOMPLETE:
        say(
            "warning: the contributions of Integrated Gradients miss "
            f"{gradients.incompleteness():.1%} of the change of log odds: do not rely on them"
        )
    return {
        "intervals": "95 %, over users (infinitesimal jackknife) and permutations",
        "groups": rows,
        "agreement": _agreement(values),
        "paper_ranks": {
            name: {"paper": rank, "group": row["group"], "ranks": row["ranks"]}
            for name, rank in _PAPER.items()
            for row in rows
            if name in row["members"]
        },
        "attributed_rows": len(gradients.log_odds),
        "incompleteness": gradients.incompleteness(),
    }


def _agreement(values: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return Spearman's and Kendall's coefficients of each two methods; None where undefined."""
    found = []
    for first, second in combinations(values, 2):
        defined = all(len(np.unique(values[method])) > 1 for method in (first, second))
        pair = values[first], values[second]
        found.append(
            {
                "methods": [first, second],
                "spearman": float(spearmanr(*pair).statistic) if defined else None,
                "kendall": float(kendalltau(*pair).statistic) if defined else None,
                "groups": len(values[first]),
            }
        )
    return found


def _write(document: dict[str, Any], output: Path) -> None:
    """Show the document and write it; JSON last, so that where it stands the page does."""
    for table in all_tables(document):
        print_table(table.title, table.header, table.rows)
        if table.note:
            say(table.note)
    if document["caveat"]:
        say(f"Caveat: {document['caveat']}")
    write_text(output / PAGE, render_page(document))
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(output / DOCUMENT, text)
    say(f"Report: {output / PAGE}")
