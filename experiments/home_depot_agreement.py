"""How far the people agree who graded Home Depot's products, and what one of them scores.

The competition publishes the mean of three people's grades of a pair, 1 to 3 (of more than three
here and there), not the grades::

    python -m experiments.home_depot_agreement --source data/source/home-depot \
        --output runs/home-depot-agreement

works out what the means leave open. The mean 2.67 can only be 2, 3 and 3, but 2.33 is either 2, 2
and 3 or 1, 3 and 3; 1.67 (1, 2, 2 or 1, 1, 3) and 2 (2, 2, 2 or 1, 2, 3) are open likewise. Every
figure therefore has

- *bounds*: the least and the most that it can be, over all shares of the two readings of these
  three means. They need no assumption but that a mean in thirds is one of three grades.
- *estimates* of two models that are fitted to how often each mean occurs: `threshold`, where a pair
  has a relevance, normal over the pairs, and each person sees it with a normal error and cuts it
  into three grades, and `dirichlet`, where each pair has chances of its own of the three grades.
  How well they fit is told beside them; that they differ is what the means do not tell.

Agreement is that of two of a pair's people. One person is scored, as a grader is, on labels that
are cut from a mean: that of all three, which holds their own grade and so flatters them; that of
the other two, which is noisier than the labels that graders are scored on; and, which only the
models tell, that of three others. A grader's figures are to be read beside the last.
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

JSON = "home_depot_agreement.json"
OWN = "the mean of all three"
REST = "the mean of the other two"
OTHERS = "the mean of three others"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Tell how far the people agree who graded Home Depot's products, from their means alone."""

    source: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder with the competition's train.csv, or relevance.parquet, as prepare-data reads it."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder that receives home_depot_agreement.json."""


def agreement(source: Path, output: Path, *, command: str = "") -> dict[str, Any]:
    """Work it out, print the tables and write ``home_depot_agreement.json``.

    Args:
        source: folder of the competition's grades.
        output: the folder to write to.
        command: the command line, for the document.

    Returns:
        The content of the file.

    Raises:
        BadInputError: the source is missing or broken, or no mean is one of three grades.
    """
    import json

    from experiments.datasets.home_depot import SCHEMA, read_grades
    from features.files import write_text

    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file; name a folder")
    grades = read_grades(source)["grade"].to_numpy()
    document = {
        "dataset": SCHEMA.name,
        "caveat": SCHEMA.caveat,
        "command": command,
        **document_of(grades, source),
    }
    write_text(output / JSON, json.dumps(document, indent=2, allow_nan=False) + "\n")
    _show(document)
    say(f"Figures: {output / JSON}")
    return document


def document_of(grades: "np.ndarray", source: Path) -> dict[str, Any]:
    """Return all figures of the means ``grades`` [P].

    Raises:
        BadInputError: none is a mean of three grades.
    """
    from experiments.datasets.home_depot import CUTS
    from experiments.datasets.published import NEAREST
    from experiments.home_depot_grades import Bounds, means, sums_of_three
    from experiments.home_depot_models import describe, fit

    sums = sums_of_three(grades)
    if not sums.any():
        raise BadInputError(f"{source}: no relevance is the mean of three grades from 1 to 3")
    models = fit(sums)
    bounds = Bounds(sums, models)
    rounded = (1 + NEAREST[0], 1 + NEAREST[1])
    return {
        "pairs": len(grades),
        "pairs_of_three": int(sums.sum()),
        "means": means(grades),
        "agreement": bounds.agreement(),
        "one_person": {
            name: {OWN: bounds.own(cuts), REST: bounds.rest(cuts), OTHERS: bounds.others(cuts)}
            for name, cuts in (("dataset", CUTS), ("rounded", rounded))
        },
        "cuts": {"dataset": list(CUTS), "rounded": list(rounded)},
        "models": {name: describe(model, sums) for name, model in models.items()},
    }


def _show(document: dict[str, Any]) -> None:
    rows = [
        [f"{row['mean']:g}", f"{row['pairs']:,}", f"{row['fewest']}", _readings(row["readings"])]
        for row in document["means"]
    ]
    print_table("Means", ["mean", "pairs", "people, at least 3", "grades"], rows)
    header = ["least", "most", *document["models"]]
    rows = [
        [name.replace("_", " "), *_cells(found, header)]
        for name, found in document["agreement"].items()
    ]
    print_table("Agreement of two people", ["figure", *header], rows)
    for name, cuts in document["cuts"].items():
        rows = [
            [f"{against}: {figure.replace('_', ' ')}", *_cells(values, header)]
            for against, found in document["one_person"][name].items()
            for figure, values in found.items()
        ]
        title = f"One person on labels of a mean, cut at {cuts[0]:g} and {cuts[1]:g} ({name})"
        print_table(title, ["labels of", *header], rows)
    for name, fitted in document["models"].items():
        say(f"{name}: expects {100 * fitted['misplaced']:.1f} % of the pairs at another mean")
    left_out = document["pairs"] - document["pairs_of_three"]
    say(
        f"Left out: {left_out:,} of {document['pairs']:,} pairs, whose mean is none of three grades"
    )


def _cells(found: dict[str, float | None], names: list[str]) -> list[str]:
    values = (found.get(name) for name in names)
    return ["-" if value is None else f"{value:.3f}" for value in values]


def _readings(readings: list[list[int]]) -> str:
    return " or ".join("".join(map(str, grades)) for grades in readings)


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment and return its exit status."""
    command = " ".join(["python -m experiments.home_depot_agreement", *sys.argv[1:]])

    def run(options: Options) -> None:
        agreement(options.source, options.output, command=command)

    return run_command(Options, run, prog="home_depot_agreement", arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
