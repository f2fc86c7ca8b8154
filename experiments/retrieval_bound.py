"""What bounds Graded Relevance@10 where few products of a query are judged.

A product that nobody judged counts as irrelevant, whatever it is. Where a query has some six judged
products, a list of ten is unjudged in part even if all of it is right. On the queries and the pool
of ``benchmark-retrieval --model``::

    python -m experiments.retrieval_bound --data data/home-depot --model runs/dashclip \
        --output runs/bound

measures for BM25, MiniLM, the model and an untuned hybrid of model and stemmed BM25:

- *Judged products only.* Graded Relevance@10 where each query ranks its judged products and no
  other. What it has more than the figure itself is lost to unjudged products that come before
  judged ones, with right or not; what it lacks to 1 is lost to the order of the judged ones.
- *Near-twins.* How many of the first ten are unjudged, and how many of those have a title like that
  of a product judged relevant for the same query; the figure if they had its grade. It is an upper
  reading: a like title is no judgement, and the best possible sum does not grow with the twins.
- *Longer lists.* The same at 20, 50 and 100.
- *Kinds of queries.* With a digit or without, short and long.

Graders differ too. A dataset that gives one grade a pair, such as their mean, does not tell how
much, and no figure here does.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from features.console import print_table, run_command, say
from features.errors import BadInputError

if TYPE_CHECKING:
    import numpy as np

    from experiments.retrieval_bound_scores import Figures, Judgements
    from experiments.retrieval_task import RetrievalTask

JSON = "retrieval_bound.json"

_PACKAGES = ("torch", "transformers", "numpy", "bm25s", "PyStemmer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Measure what bounds Graded Relevance@10 on a dataset of few judgements a query."""

    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Dataset folder, with relevance labels."""
    model: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """A trained model; it is asked those queries that it was not trained on."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder that receives retrieval_bound.json."""


def bound(data: Path, output: Path, *, model: Path, command: str = "") -> dict[str, Any]:
    """Measure, print the tables and write ``retrieval_bound.json``, whole or not at all.

    The same call gives the same figures.

    Args:
        data: the dataset folder.
        output: the folder to write to.
        model: folder of a trained model.
        command: the command line, for the document.

    Returns:
        The content of the file.

    Raises:
        BadInputError: an input is missing or broken, no query is left, or BM25 is not installed.
    """
    import json
    import platform

    from embeddings.open_encoder import open_encoder
    from embeddings.text_encoder import TextEncoder
    from experiments.retrieval_bound_scores import Judgements, measure, scores_of
    from experiments.retrieval_task import RetrievalTask
    from features.files import write_text
    from features.schema import DatasetSchema
    from ranking.versions import installed_versions

    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file; name a folder")
    schema = DatasetSchema.load(data)
    encoder = open_encoder(model)
    task = RetrievalTask.read(data, model=model)
    say(f"{len(task.queries):,} queries, {len(task.pool):,} products")
    judged = Judgements.of(task)
    methods, titles_nd = scores_of(task, encoder, TextEncoder.packaged())
    rows = {}
    for name, scores in methods.items():
        rows[name] = measure(task, judged, scores, titles_nd)
        say(f"{name}: measured")
    document = {
        **document_of(task, judged, rows),
        "label_noise": label_noise(data),
        "dataset": schema.name,
        "caveat": schema.caveat,
        "command": command,
        "versions": {"python": platform.python_version()} | installed_versions(_PACKAGES),
    }
    write_text(output / JSON, json.dumps(document, indent=2, allow_nan=False) + "\n")
    _show(document)
    say(f"Figures: {output / JSON}")
    return document


def document_of(
    task: "RetrievalTask", judged: "Judgements", rows: "dict[str, Figures]"
) -> dict[str, Any]:
    """Return the figures as ``retrieval_bound.json`` has them: means with 95 % intervals."""
    from experiments.retrieval_bound_scores import K, kinds_of

    kinds = kinds_of(task.queries)
    shuffled = judged.in_random_order()
    return {
        "k": K,
        "queries": len(task.queries),
        "products": len(task.pool),
        "judged_per_query": float(judged.per_query.mean()),
        "relevant_per_query": float(judged.relevant_per_query.mean()),
        "queries_with_more_judged_than_k": int((judged.per_query > K).sum()),
        "judged_only_in_random_order": _means({"it": shuffled})["it"],
        "kinds": {kind: int(those.sum()) for kind, those in kinds.items()},
        "rows": [{"name": name, **_row(figures, kinds)} for name, figures in rows.items()],
    }


def _row(figures: "Figures", kinds: "dict[str, np.ndarray]") -> dict[str, Any]:
    """Return what the document says of one method."""
    from experiments.retrieval_bound_scores import K

    graded, listed, unjudged = figures.graded[K], figures.listed, figures.unjudged.sum()
    means = _means(
        {
            "judged_only": figures.judged_only,
            "lost_to_unjudged": figures.judged_only - graded,
            "lost_to_order": 1 - figures.judged_only,
            "unjudged": figures.unjudged / listed,
        }
    )
    with_twins = _means({str(least): twins.graded for least, twins in figures.twins.items()})
    return {
        "graded_relevance": _means({str(k): values for k, values in figures.graded.items()}),
        **means,
        "twins": [
            {
                "cosine": least,
                "share_of_unjudged": float(twins.count.sum() / unjudged) if unjudged else 0.0,
                "graded_relevance": with_twins[str(least)],
            }
            for least, twins in figures.twins.items()
        ],
        "kinds": {
            kind: _means({kind: graded[those]})[kind] if those.any() else None
            for kind, those in kinds.items()
        },
    }


def _means(values: "dict[str, np.ndarray]") -> dict[str, dict[str, Any]]:
    """Return the mean over queries and its 95 % bootstrap interval of each array [Q]."""
    import numpy as np

    from embeddings.retrieval import bootstrap_means
    from experiments.retrieval_table import SAMPLES, SEED

    draws = bootstrap_means(np.stack(list(values.values()), 1), samples=SAMPLES, seed=SEED)
    ends = np.percentile(draws, [2.5, 97.5], axis=0).T.tolist()
    return {
        name: {"mean": float(array.mean()), "interval": interval}
        for (name, array), interval in zip(values.items(), ends, strict=True)
    }


def label_noise(data: Path) -> dict[str, Any]:
    """Return what the labels of a dataset folder tell of how far those who gave them differ.

    Only pairs that one source labels several times tell anything.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from embeddings.catalog import RELEVANCE
    from features import columns
    from features.parquet import parquet_files

    keys = [columns.QUERY, columns.PRODUCT_ID, columns.SOURCE]
    files = [pq.read_table(file, columns=[*keys, columns.LABEL])
             for file in parquet_files(data / RELEVANCE)]  # fmt: skip
    label = columns.LABEL
    several = pa.concat_tables(files).group_by(keys).aggregate(
        [(label, "count"), (label, "min"), (label, "max")]
    )  # fmt: skip
    several = several.filter(pc.greater(several[f"{label}_count"], 1))
    differ = pc.sum(pc.not_equal(several[f"{label}_min"], several[f"{label}_max"])).as_py() or 0
    if not len(several):
        note = (
            "each pair has one label (a mean of several graders' at best): nothing is known of how "
            "far graders differ, nor of the figure that their differences allow"
        )
    else:
        note = (
            f"of {len(several):,} pairs that one source labels several times, the labels of "
            f"{differ / len(several):.1%} differ; of the other pairs nothing is known"
        )
    return {"labelled_several_times": len(several), "differing": differ, "note": note}


def _show(document: dict[str, Any]) -> None:
    """Print the tables, and what to know when reading them."""
    rows, k = document["rows"], document["k"]
    name = f"GR@{k}"
    print_table(
        f"{document['dataset']}, {document['queries']:,} queries, {document['products']:,} "
        "products: graded relevance (GR) by length of the list",
        ["method", *(f"GR@{depth}" for depth in rows[0]["graded_relevance"])],
        [[r["name"], *map(_cell, r["graded_relevance"].values())] for r in rows],
    )
    lost = ("judged_only", "lost_to_unjudged", "lost_to_order")
    print_table(
        f"What {name} lacks to 1",
        ["method", name, "judged products only", "lost to unjudged", "lost to order of judged"],
        [[r["name"], *map(_cell, [r["graded_relevance"][str(k)], *(r[x] for x in lost)])]
         for r in rows],
    )  # fmt: skip
    twins = [f"≥ {twin['cosine']}" for twin in rows[0]["twins"]]
    print_table(
        f"Unjudged products of the first {k}, and those whose title is like a relevant one's",
        ["method", "unjudged", *(f"of these twins {t}" for t in twins),
         *(f"{name}, twins {t} graded (upper reading)" for t in twins)],
        [[r["name"], _cell(r["unjudged"]), *(f"{t['share_of_unjudged']:.3f}" for t in r["twins"]),
          *(_cell(t["graded_relevance"]) for t in r["twins"])] for r in rows],
    )  # fmt: skip
    print_table(
        f"{name} by kind of query",
        ["method", *(f"{kind} ({count:,})" for kind, count in document["kinds"].items())],
        [[r["name"], *map(_cell, r["kinds"].values())] for r in rows],
    )
    for line in _notes(document):
        say(line)


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "none"
    low, high = figure["interval"]
    return f"{figure['mean']:.3f} [{low:.3f}, {high:.3f}]"


def _notes(document: dict[str, Any]) -> list[str]:
    """Return what to know when reading the tables, a sentence or two a line."""
    k, more = document["k"], document["queries_with_more_judged_than_k"]
    shuffled = document["judged_only_in_random_order"]["mean"]
    notes = [
        f"A query has {document['judged_per_query']:.1f} judged products, "
        f"{document['relevant_per_query']:.1f} of them relevant; {more:,} queries have more than "
        f"{k}. In random order the judged products alone reach {shuffled:.3f}: where few are "
        "judged, judged products only hardly tell methods apart.",
        "An unjudged product before judged ones may be relevant or not: how much of what is lost "
        "to them is the fault of missing judgements is not known.",
        "A twin's grade is guessed from its title, and the best possible sum does not grow with "
        "the twins: what they add is an upper reading, not a correction.",
        "The hybrid adds the z-scores of model and stemmed BM25, equal weights, nothing tuned.",
        f"Label noise: {document['label_noise']['note']}.",
    ]
    return notes + ([f"Caveat: {document['caveat']}"] if document["caveat"] else [])


def run(options: Options) -> None:
    """Do what the command line asks for."""
    from ranking.run import command_line

    bound(
        options.data,
        options.output,
        model=options.model,
        command=command_line("python -m experiments.retrieval_bound"),
    )


def main() -> int:
    """Run the command line."""
    return run_command(Options, run, prog="python -m experiments.retrieval_bound")


if __name__ == "__main__":
    sys.exit(main())
