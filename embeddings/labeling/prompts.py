"""Prompts: what a language model is asked, and how its answer is read.

A prompt is a TOML file: role, task, rules, a definition of each label, the form of a pair and, as
``label-relevance prompt`` chooses them from human labels, examples. Its version is its name and a
hash of its content, so that no two prompts share one.
"""

import hashlib
import json
from dataclasses import astuple, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from embeddings.labeling.grades import LABELS
from features.config_file import from_toml
from features.errors import BadInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A pair with its human label.

    Attributes:
        query: the text.
        title: of the product.
        label: its name in `LABELS`.
    """

    query: str
    title: str
    label: str

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise BadInputError(f"'label' must be one of {', '.join(LABELS)}, got {self.label!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Definitions:
    """What each label means."""

    irrelevant: str
    moderately_relevant: str
    highly_relevant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One way to ask for a label.

    Attributes:
        name: of the template.
        role: who the model is to be.
        task: what it is to do.
        rules: what to mind, each a sentence.
        pair: the form of a question, with ``{query}`` and behind it ``{title}``.
        definitions: of the labels.
        examples: shown before the question.
    """

    name: str
    role: str
    task: str
    rules: tuple[str, ...] = ()
    pair: str
    definitions: Definitions
    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.pair.find("{query}") < self.pair.find("{title}"):
            raise BadInputError("'pair' must hold '{query}' and behind it '{title}'")

    @property
    def version(self) -> str:
        """The name and eight digits of a hash of everything that the prompt says."""
        content = json.dumps([self.system(), self.pair, self._shown()], ensure_ascii=False)
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def system(self) -> str:
        """Return what is said before any pair."""
        labels = zip(LABELS, astuple(self.definitions), strict=True)
        lines = [self.role, self.task.strip(), "", "The labels:"]
        lines += [f"- {label}: {definition}" for label, definition in labels]
        if self.rules:
            lines += ["", "Mind:", *(f"- {rule}" for rule in self.rules)]
        quoted = ", ".join(f'"{label}"' for label in LABELS)
        return "\n".join([*lines, "", f"Answer with one label and nothing else: {quoted}."])

    def question(self, query: str, title: str) -> str:
        """Return what is asked of one pair."""
        # Not `str.format`: queries and titles hold braces of their own.
        before, _, rest = self.pair.strip().partition("{query}")
        between, _, after = rest.partition("{title}")
        return f"{before}{query}{between}{title}{after}"

    def messages(self, query: str, title: str) -> list[dict[str, str]]:
        """Return the chat that asks for one pair's label: system, examples, the question."""
        chat = [{"role": "system", "content": self.system()}]
        for asked, answer in (*self._shown(), (self.question(query, title), None)):
            chat.append({"role": "user", "content": asked})
            if answer is not None:
                chat.append({"role": "assistant", "content": answer})
        return chat

    def _shown(self) -> list[tuple[str, str | None]]:
        return [(self.question(e.query, e.title), e.label) for e in self.examples]


def answer_schema() -> dict[str, Any]:
    """Return the JSON schema of an answer: an object whose ``label`` is one of `LABELS`."""
    return {
        "type": "object",
        "properties": {"label": {"type": "string", "enum": list(LABELS)}},
        "required": ["label"],
        "additionalProperties": False,
    }


def parse_answer(text: str) -> int | None:
    """Return the label that an answer states, ``None`` where it does not state exactly one.

    Read are a label's name, alone, and the JSON object of `answer_schema`; space around either
    and the case of the name do not count. Anything else is no answer: a name within a sentence,
    a number, an object with more in it.
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            content = json.loads(text, object_pairs_hook=tuple)
        except (ValueError, RecursionError):
            return None
        # One key, also where a key stands twice.
        if not (isinstance(content, tuple) and [key for key, _ in content] == ["label"]):
            return None
        text = content[0][1]
        if not isinstance(text, str):
            return None
    name = text.casefold()
    return LABELS.index(name) if name in LABELS else None


def read_prompt(name: str, *, folder: Path | None = None) -> Prompt:
    """Read a packaged prompt by its name, or one from a TOML file.

    Args:
        name: of a packaged prompt, or a path that ends in ``.toml``.
        folder: what a relative path begins at; the current folder if not given.

    Raises:
        BadInputError: there is no such prompt, a key is missing, unknown or of a wrong type, or
            the pair's form lacks a place.
    """
    if name.endswith(".toml"):
        return from_toml(folder / name if folder else Path(name), Prompt)
    packaged = files("embeddings.labeling") / "prompts"
    path = Path(str(packaged)) / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.toml")))
        raise BadInputError(f"prompt '{name}': there is none of that name; packaged: {known}")
    return from_toml(path, Prompt)
