"""The figures of the product tasks, in the form in which ``product_tasks.json`` holds them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.product_task_data import (
    IMAGE,
    IMAGE_TEXT,
    TEXT,
    TRAINED,
    UNTRAINED,
    AisleTask,
    PairTask,
    Vectors,
)
from experiments.product_task_plots import GRADES, separation
from experiments.product_task_probes import (
    AISLE_PROBE,
    RELEVANCE_PROBE,
    Runs,
    aisle_split,
    concatenated,
    cosines,
    low_support,
    majority,
    probe,
    relevance_split,
    summary,
    with_product_and_cosine,
)
from features.console import say

CONCATENATED = "concatenated"
WITH_COSINE = "with product and cosine"


def aisle_results(task: AisleTask, vectors: Vectors, seeds: int) -> dict[str, Any]:
    """Return the figures of aisle prediction (Section 5.1).

    Args:
        task: N products.
        vectors: [N, D] each, by encoder and variant.
        seeds: number of splits and starts.
    """
    count = len(task.names)
    splits = [aisle_split(task.classes, seed) for seed in range(seeds)]
    runs: dict[tuple[str, str], Runs] = {}
    order = (IMAGE_TEXT, TEXT, IMAGE)  # what both encoders made of the same stands together
    for encoder, variant in sorted(vectors, key=lambda key: order.index(key[1])):
        say(f"aisle prediction: {variant}, {encoder}")
        runs[encoder, variant] = probe(
            vectors[encoder, variant], task.classes, splits, classes=count, config=AISLE_PROBE
        )
    products = np.bincount(task.classes, minlength=count)
    rare = low_support(products)

    def row(encoder: str, variant: str, run: Runs) -> dict[str, Any]:
        return {
            "embedding": variant,
            "encoder": encoder,
            "macro_f1": summary(run.macro_f1),
            "recall_low_support": summary(run.mean_recall(rare)) if rare.any() else None,
            "recall_other": summary(run.mean_recall(~rare)),
            "recall": dict(zip(task.names, run.recall.mean(axis=0).tolist(), strict=True)),
        }

    return {
        "products": len(task.rows),
        "test_products": len(splits[0].test),
        "classes": [
            {"name": name, "products": int(n), "low_support": bool(low)}
            for name, n, low in zip(task.names, products, rare, strict=True)
        ],
        "left_out": task.left_out,
        "majority_macro_f1": summary(majority(task.classes, splits, classes=count).macro_f1),
        "rows": [row(*key, run) for key, run in runs.items()],
        "differences": _differences(runs),
    }


def relevance_results(
    task: PairTask, sides: Mapping[str, tuple[np.ndarray, np.ndarray]], seeds: int
) -> dict[str, Any]:
    """Return the figures of relevance prediction (Section 5.2) and of the cosines (Figure 5).

    Args:
        task: P pairs.
        sides: vectors of query and product, [P, D] each, by encoder.
        seeds: number of splits and starts.
    """
    splits = [relevance_split(task.query, task.label, seed) for seed in range(seeds)]
    runs: dict[tuple[str, str], Runs] = {}
    for form, build in ((CONCATENATED, concatenated), (WITH_COSINE, with_product_and_cosine)):
        for encoder, (query, product) in sides.items():
            say(f"relevance prediction: {form}, {encoder}")
            features = build(query, product)
            runs[encoder, form] = probe(
                features, task.label, splits, classes=len(GRADES), config=RELEVANCE_PROBE
            )

    def row(encoder: str, form: str, run: Runs) -> dict[str, Any]:
        recall = {
            grade: summary(run.recall[:, position])
            for position, grade in enumerate(GRADES)
            if not np.isnan(run.recall[:, position]).any()
        }
        return {
            "features": form,
            "encoder": encoder,
            "macro_f1": summary(run.macro_f1),
            "recall": recall,
        }

    counts = np.bincount(task.label, minlength=len(GRADES)).tolist()
    return {
        "queries": len(task.queries),
        "pairs": dict(zip(GRADES, counts, strict=True)),
        "train_pairs": len(splits[0].train) + len(splits[0].validation),
        "test_pairs": len(splits[0].test),
        "majority_macro_f1": summary(majority(task.label, splits, classes=len(GRADES)).macro_f1),
        "rows": [row(*key, run) for key, run in runs.items()],
        "differences": _differences(runs),
        "cosines": {
            encoder: separation(cosines(query, product), task.label)
            for encoder, (query, product) in sides.items()
        },
    }


def _differences(runs: Mapping[tuple[str, str], Runs]) -> list[dict[str, Any]]:
    """Return the paired differences of macro F1: by training, and by what is encoded."""
    pairs = [
        (f"{form}: {TRAINED} − {UNTRAINED}", (TRAINED, form), (UNTRAINED, form))  # noqa: RUF001
        for encoder, form in runs
        if encoder == TRAINED
    ]
    pairs += [
        (f"{TRAINED}: {a} − {b}", (TRAINED, a), (TRAINED, b))  # noqa: RUF001
        for a, b in ((IMAGE_TEXT, TEXT), (IMAGE_TEXT, IMAGE), (WITH_COSINE, CONCATENATED))
    ]
    return [
        {"of": name, "macro_f1": summary(runs[a].macro_f1 - runs[b].macro_f1)}
        for name, a, b in pairs
        if a in runs and b in runs
    ]
