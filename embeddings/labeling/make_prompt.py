"""``label-relevance prompt``: a prompt with examples that people labelled.

Legend: ``P`` pairs.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from embeddings.labeling.grades import LABELS
from embeddings.labeling.judgements import Judgements, read_judgements
from embeddings.labeling.options import MakePrompt
from embeddings.labeling.prompts import Example, Prompt, read_prompt
from features.config_file import to_toml
from features.console import say, stdout
from features.errors import BadInputError
from features.files import write_text

_TYPICAL = (25, 75)  # per cent of the texts that are shorter


def run(options: MakePrompt, command: str) -> None:
    """Do the step and print how the prompt asks for one pair."""
    prompt = make_prompt(options)
    shown = read_judgements(options.split, "validation").pairs
    for message in prompt.messages(shown.queries[0], shown.titles[0]):
        stdout.print(f"--- {message['role']}", style="bold", highlight=False)
        stdout.print(message["content"], highlight=False, markup=False, soft_wrap=True)
    say(f"{options.output}: prompt {prompt.version}, {len(prompt.examples)} examples")


def make_prompt(options: MakePrompt) -> Prompt:
    """Write a template with examples of the fine-tuning part; the same call finds it done.

    Raises:
        BadInputError: the template or the split breaks a rule, there are too few pairs to choose
            from, or the output is another file already.
    """
    if options.output.suffix != ".toml":
        raise BadInputError(f"{options.output}: a prompt's file ends in .toml")
    if options.examples < 0:
        raise BadInputError(f"--examples must be 0 or more, got {options.examples}")
    template = read_prompt(options.template)
    part = read_judgements(options.split, "fine_tuning")
    chosen = choose_examples(part, options.examples, seed=options.seed)
    prompt = replace(template, name=options.output.stem, examples=chosen)
    text = to_toml(prompt)
    if options.output.exists() and _content(options.output) != text:
        raise BadInputError(
            f"{options.output}: holds something else; choose another --output or remove it"
        )
    write_text(options.output, text)
    return prompt


def choose_examples(part: Judgements, each: int, *, seed: int) -> tuple[Example, ...]:
    """Draw examples of every label, in a drawn order; no two share a query or a title.

    Taken are pairs of which all people said the same, of several people where pairs have several,
    and whose texts are neither short nor long, as far as there are such.

    Args:
        part: what to draw from.
        each: examples of each label.
        seed: another one draws others.

    Raises:
        BadInputError: there are too few.
    """
    rng = np.random.default_rng(seed)
    wanted = _preference(part)
    queries: set[str] = set()
    titles: set[str] = set()
    chosen: list[Example] = []
    for label, name in enumerate(LABELS):
        of_label = rng.permutation(np.flatnonzero((part.label == label) & (wanted >= 0)))
        found = 0
        for pair in of_label[np.argsort(-wanted[of_label], kind="stable")]:
            query, title = part.pairs.queries[pair], part.pairs.titles[pair]
            if found == each or query in queries or title in titles:
                continue
            chosen.append(Example(query=query, title=title, label=name))
            queries.add(query)
            titles.add(title)
            found += 1
        if found < each:
            raise BadInputError(
                f"the fine-tuning part has {found} pairs to show as {name!r}, fewer than the "
                f"{each} examples that --examples asks for"
            )
    return tuple(chosen[position] for position in rng.permutation(len(chosen)))


def _preference(part: Judgements) -> np.ndarray:
    """Return what speaks for each pair as an example ([P] int), -1 where people do not agree."""
    judgements = np.bincount(part.pair)
    low, high = (
        extreme.reduceat(part.given, _firsts(part)) for extreme in (np.minimum, np.maximum)
    )
    preference = 2 * (judgements > 1) + _typical(part.pairs.queries, part.pairs.titles)
    preference[low != high] = -1
    return preference


def _firsts(part: Judgements) -> np.ndarray:
    return np.flatnonzero(np.diff(part.pair, prepend=-1))


def _typical(*columns: Sequence[str]) -> np.ndarray:
    """Return whether each pair's texts ([P] in each column) all have a middling length, [P]."""
    lengths = np.array([[len(text) for text in texts] for texts in columns])
    low, high = np.percentile(lengths, _TYPICAL, axis=1, keepdims=True)
    return ((low <= lengths) & (lengths <= high)).all(0)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
