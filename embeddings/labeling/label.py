"""``label-relevance label``: grade pairs that nobody graded.

::

    OUTPUT/
      part-00000.parquet ...   the labels (`embeddings.labeling.label_files`)
      labels.json              what they are; written last
      _ungraded.parquet        pairs whose answer could not be read, if there are any
      _pairs.parquet           the pairs that were chosen, in the order in which they are graded
      answers.sqlite           what the grader said, unless --cache names another file
      spending.sqlite          requests, tokens and money, of an endpoint
      run.json                 fingerprints of what the labels are made of
"""

import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from embeddings.catalog import IMPRESSIONS, RELEVANCE, Catalog, read_catalog
from embeddings.labeling.cache import AnswerCache
from embeddings.labeling.estimate import Estimate, estimate, is_endpoint
from embeddings.labeling.grades import LABELS, Grader
from embeddings.labeling.label_files import UNGRADED_PAIRS, summary, write_ungraded
from embeddings.labeling.label_run import LabelRun, check_record, locked, write_record
from embeddings.labeling.ledger import Ledger
from embeddings.labeling.open_grader import open_grader
from embeddings.labeling.options import Label
from embeddings.labeling.pair_files import (
    Selection,
    Titles,
    open_selection,
    select_given,
    select_unlabelled,
)
from features.console import print_table, progress_bar, say, stderr
from features.errors import BadInputError
from features.files import fingerprint, write_text

FIGURES = "labels.json"
ANSWERS = "answers.sqlite"
SPENDING = "spending.sqlite"

_LOST_SECONDS = 1.0  # of a local grader's work, at most, when a run is killed


def run(options: Label, command: str) -> None:
    """Label pairs and show what came of it.

    Raises:
        BadInputError: as `label` does, or its estimate is above a limit and nobody can be asked.
    """
    from rich.progress import TextColumn

    done, start = 0, time.monotonic()
    with _sigterm_as_ctrl_c(), progress_bar(TextColumn("{task.fields[rate]}")) as bar:
        task = bar.add_task("pairs", total=None, rate="")

        def on_labelled(pairs: int, total: int, ledger: Ledger) -> None:
            nonlocal done
            done += pairs
            rate = f"{done / (time.monotonic() - start):,.0f} pairs/s"
            cost = f", cost {ledger.cost:,.2f}" if ledger.cost else ""
            bar.update(task, completed=done, total=total, rate=rate + cost)

        def approve(expected: Estimate) -> None:
            bar.stop()
            _approve(expected, options)
            bar.start()

        figures = label(options, command, approve=approve, on_labelled=on_labelled)
    _show(options.output, figures)


def label(
    options: Label,
    command: str = "",
    *,
    approve: Callable[[Estimate], None] = lambda _: None,
    on_labelled: Callable[[int, int, Ledger], None] = lambda _pairs, _total, _ledger: None,
) -> dict[str, Any]:
    """Label pairs; returns the content of ``labels.json``.

    A run that was stopped goes on; pairs whose answer could not be read are tried again.

    Args:
        options: what to label, with what and where to.
        command: the command line, for the record.
        approve: called with what grading will take, before anything is graded but a sample; it
            raises where the run is not to go on.
        on_labelled: called with the number of pairs dealt with since its last call, that of all
            pairs, and what is spent.

    Raises:
        BadInputError: the dataset, the pairs or the grader cannot be used, the folder holds other
            labels or another run is at work there, a limit is reached, the grader cannot go on, or
            no answer could be read. What was graded until then is kept, and ``labels.json`` says
            that it is not complete.
    """
    if options.limit is not None and options.limit < 1:
        raise BadInputError(f"--limit must be 1 or more, got {options.limit}")
    start = time.perf_counter()
    with locked(options.output), closing(_ledger(options)) as ledger:
        grader = open_grader(options.grader, ledger)
        catalog = read_catalog(options.data)
        selection = _claim(options, grader, catalog)
        pairs = sum(selection.chunks(options.limit))
        with _cache(options, grader) as cache:
            working = LabelRun(
                output=options.output,
                grader=grader,
                selection=selection,
                titles=Titles(catalog),
                cache=cache,
                limit=options.limit,
                on_labelled=lambda count: on_labelled(count, pairs, ledger),
            )
            unknown = working.take_known()
            expected = estimate(working, unknown) if unknown else None
            if expected:
                approve(expected)
            stopped: BadInputError | None = None
            try:
                working.grade()
            except BadInputError as error:
                stopped = error
        if stopped is None and not working.tally.labelled and (before := _complete(options.output)):
            return before
        figures = {
            "complete": stopped is None,
            "pairs": pairs,
            **_of_labels(options.output, selection, complete=stopped is None),
            "left_out": selection.left_out,
            "run": _of_run(working, time.perf_counter() - start, expected, command),
            "spending": _spent(ledger) if is_endpoint(grader) else None,
            "grader": {
                "path": str(options.grader),
                "model": grader.model,
                "prompt_version": grader.prompt_version,
                "fingerprint": grader.fingerprint,
            },
            "data": str(options.data),
            "pairs_from": str(options.pairs or options.data / IMPRESSIONS),
        }
        write_text(options.output / FIGURES, json.dumps(figures, indent=2) + "\n")
    if stopped is not None:
        raise stopped
    if not figures["labelled"]:
        raise BadInputError(
            f"{options.grader}: none of its answers for {pairs:,} pairs could be read"
        )
    return figures


def _ledger(options: Label) -> Ledger:
    limits = {"max_requests": options.max_requests, "max_cost": options.max_cost}
    return Ledger(options.output / SPENDING, **limits)  # type: ignore[arg-type]


def _cache(options: Label, grader: Grader) -> AnswerCache:
    """Open the cache; an answer that cost money is kept for good at once."""
    wait = 0.0 if is_endpoint(grader) else _LOST_SECONDS
    return AnswerCache(options.cache or options.output / ANSWERS, commit_seconds=wait)


def _claim(options: Label, grader: Grader, catalog: Catalog) -> Selection:
    """Make the folder this run's, or find that it is already; return the pairs to label.

    Raises:
        BadInputError: it is another run's, or no pair is to be labelled.
    """
    data, output = options.data, options.output
    if options.pairs is not None and not options.pairs.exists():
        raise BadInputError(f"{options.pairs}: no such file; it holds the pairs to label")
    sources = (data / IMPRESSIONS, data / RELEVANCE) if options.pairs is None else (options.pairs,)
    digest = hashlib.sha256(catalog.product_ids.to_numpy().tobytes())
    digest.update("\0".join(catalog.titles.fill_null("").to_pylist()).encode())
    made_of = {
        "grader": grader.fingerprint,
        "catalog": digest.hexdigest(),
        "choice of pairs": fingerprint(*(path for path in sources if path.exists())),
    }
    check_record(output, made_of)
    selection = open_selection(output)
    if selection is None:
        say(f"choosing the pairs to label from {sources[0]}")
        if options.pairs is None:
            selection = select_unlabelled(data, catalog, output)
        else:
            selection = select_given(options.pairs, catalog, output)
    write_record(output, made_of)
    return selection


def _complete(output: Path) -> dict[str, Any] | None:
    """Return what an earlier run left, if it left nothing to do."""
    path = output / FIGURES
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if found.get("complete") else None


def _of_labels(output: Path, selection: Selection, *, complete: bool) -> dict[str, Any]:
    """Return what the labels are, and list what was asked in vain.

    The pairs without a label of a run that is not complete were for the most part not asked yet.
    """
    ungraded = write_ungraded(output, selection) if complete else None
    return {**summary(output), "ungraded": ungraded}


def _of_run(
    working: LabelRun, seconds: float, expected: Estimate | None, command: str
) -> dict[str, Any]:
    tally = working.tally
    return {
        **asdict(tally),
        "seconds": seconds,
        "pairs_per_second": tally.labelled / seconds,
        "asked_per_second": tally.asked / tally.grading_seconds if tally.asked else None,
        "estimate": asdict(expected) if expected else None,
        "command": command,
    }


def _spent(ledger: Ledger) -> dict[str, float]:
    return {
        "requests": ledger.requests,
        "input_tokens": ledger.input_tokens,
        "output_tokens": ledger.output_tokens,
        "unreadable": ledger.unreadable,
        "cost": ledger.cost,
    }


def _approve(expected: Estimate, options: Label) -> None:
    """Say what grading will take; above a limit ask, or refuse where nobody can be asked."""
    say(expected.sentence())
    if options.yes:
        return
    above = [
        f"{name} {limit:g}"
        for name, limit, value in (
            ("--ask-above-cost", options.ask_above_cost, expected.cost),
            ("--ask-above-hours", options.ask_above_hours, expected.hours),
        )
        if value > limit
    ]
    if not above:
        return
    if sys.stdin.isatty() and stderr.is_terminal:
        reply = stderr.input(f"above {' and '.join(above)}: go on? [y/N] ", markup=False)
        if reply.strip().lower() in ("y", "yes"):
            return
        raise BadInputError("not started")
    raise BadInputError(
        f"{expected.sentence()}: above {' and '.join(above)}; give --yes to start it"
    )


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Have SIGTERM end what is in the block as Ctrl-C does, keeping what was graded."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(output: Path, figures: dict[str, Any]) -> None:
    total, did = figures["labelled"], figures["run"]
    rows = [
        (name, f"{count:,}", f"{count / total:.1%}")
        for name, count in zip(LABELS, figures["labels"].values(), strict=True)
    ]
    rows.append(("pairs labelled", f"{total:,}", ""))
    rows += [(f"left out: {why}", f"{count:,}", "") for why, count in figures["left_out"].items()]
    rows.append(("answers known before", f"{did['from_cache']:,}", ""))
    rows.append(("asked of the grader", f"{did['asked']:,}", ""))
    rows.append(("pairs/s", f"{did['pairs_per_second']:,.0f}", ""))
    if figures["spending"]:
        rows.append(("requests", f"{figures['spending']['requests']:,}", ""))
        rows.append(("cost", f"{figures['spending']['cost']:,.2f}", ""))
    print_table(f"labels of {figures['grader']['model']} in {output}", ["", "", "share"], rows)
    if figures["ungraded"]:
        say(
            f"{figures['ungraded']:,} pairs have no label, since no answer for them could be read: "
            f"{output / UNGRADED_PAIRS} lists them, and the same command tries them again"
        )
