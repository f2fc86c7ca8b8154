import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embeddings.labeling.cli import main
from embeddings.labeling.grades import LABELS
from embeddings.labeling.judgements import read_judgements
from embeddings.labeling.make_prompt import make_prompt
from embeddings.labeling.options import MakePrompt
from embeddings.labeling.prompts import (
    Definitions,
    Example,
    Prompt,
    answer_schema,
    parse_answer,
    read_prompt,
)
from features.config_file import to_toml
from features.errors import BadInputError
from tests.tiny_labels import write_tiny_split

PROMPT = Prompt(
    name="short",
    role="You grade.",
    task="Grade.",
    rules=("Be fair.",),
    pair="Q: {query}\nP: {title}",
    definitions=Definitions(
        irrelevant="is not", moderately_relevant="is nearly", highly_relevant="is"
    ),
    examples=(Example(query="milk", title="Whole milk", label="highly relevant"),),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_tiny_split(tmp_path_factory.mktemp("labels"), raters=3, noise=0.1)


def options(split, output, **changed):
    return MakePrompt(split=split, output=output, **changed)


def test_the_chat_says_everything_in_order():
    messages = PROMPT.messages("tea {title}", "Green {query} tea")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    system = messages[0]["content"]
    said = ["You grade.", "Grade.", "irrelevant: is not", "highly relevant: is", "Be fair."]
    positions = [system.index(sentence) for sentence in said]
    assert positions == sorted(positions)
    assert system.endswith('"irrelevant", "moderately relevant", "highly relevant".')
    assert messages[1]["content"] == "Q: milk\nP: Whole milk"
    assert messages[2]["content"] == "highly relevant"
    # Braces in a query or title are its own.
    assert messages[3]["content"] == "Q: tea {title}\nP: Green {query} tea"


@pytest.mark.parametrize(
    "changed",
    [
        {"role": "You rate."},
        {"rules": ()},
        {"pair": "{query} {title}"},
        {"definitions": replace(PROMPT.definitions, irrelevant="no")},
        {"examples": ()},
        {"name": "other"},
    ],
)
def test_another_prompt_has_another_version(changed):
    assert replace(PROMPT, **changed).version != PROMPT.version
    assert replace(PROMPT).version == PROMPT.version
    assert PROMPT.version.startswith("short-")


def test_an_answer_is_a_label_or_the_object_of_the_schema():
    for position, label in enumerate(LABELS):
        assert parse_answer(label) == position
        assert parse_answer(f" {label.title()}\n") == position
        assert parse_answer(json.dumps({"label": label})) == position
    assert answer_schema()["properties"]["label"]["enum"] == list(LABELS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "relevant",
        "2",
        "The product is highly relevant.",
        "highly relevant.",
        "highly relevant or irrelevant",
        '"highly relevant"',
        '{"label": "relevant"}',
        '{"label": 2}',
        '{"label": null}',
        '{"label": ["irrelevant"]}',
        '{"label": "irrelevant", "why": "no"}',
        '{"Label": "irrelevant"}',
        '{"label": "irrel',
        '{"label": "irrelevant"} {"label": "irrelevant"}',
        '["irrelevant"]',
        "{",
        '{"label": "irrelevant", "label": "highly relevant"}',
        '{"label":' * 100_000,
    ],
)
def test_anything_else_is_no_answer(text):
    assert parse_answer(text) is None


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.sampled_from(LABELS))
def test_nothing_is_guessed_from_what_stands_around_a_label(text, label):
    for answer in (text + label, label + text, f"{text} {label}"):
        known = parse_answer(answer)
        bare = answer.strip().casefold()
        assert known == (LABELS.index(bare) if bare in LABELS else None)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TEXTS, st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from(LABELS)), max_size=2))
def test_a_prompt_is_read_as_it_was_written(tmp_path, rule, examples):
    shown = tuple(Example(query=q, title=t, label=label) for q, t, label in examples)
    prompt = replace(PROMPT, rules=(rule, '\x7f\x00\r\n"\\'), examples=shown)
    path = tmp_path / "prompt.toml"
    path.write_text(to_toml(prompt), encoding="utf-8", newline="")
    assert read_prompt(str(path)) == prompt
    assert read_prompt(path.name, folder=path.parent).version == prompt.version


def test_the_packaged_prompt_defines_every_label():
    prompt = read_prompt("relevance-1")
    assert prompt.name == "relevance-1"
    assert all(f"- {label}: " in prompt.system() for label in LABELS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('pair = "{query}"', "'role' is missing|'name' is missing"),
        (to_toml(replace(PROMPT)).replace("{title}", "title"), "'pair' must hold"),
        (
            to_toml(PROMPT).replace('Q: {query}\\nP: {title}"', '{title} {query}"'),
            "'pair' must hold",
        ),
        (to_toml(PROMPT).replace('"highly relevant"', '"relevant"'), "'label' must be one of"),
        (to_toml(PROMPT) + "why = 1\n", "unknown key 'why'"),
        ("role = ", "not valid TOML"),
    ],
)
def test_a_bad_prompt_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "prompt.toml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=message) as error:
        read_prompt(str(path))
    assert str(path) in str(error.value)


def test_a_prompt_that_is_not_there_is_told(tmp_path):
    with pytest.raises(BadInputError, match="there is none of that name; packaged: relevance-1"):
        read_prompt("relevance-0")
    with pytest.raises(BadInputError, match="no such configuration file"):
        read_prompt("none.toml", folder=tmp_path)


def test_examples_are_unanimous_and_share_no_text(split, tmp_path):
    prompt = make_prompt(options(split, tmp_path / "mine.toml", examples=3))
    assert (prompt.name, len(prompt.examples)) == ("mine", 9)
    assert read_prompt(str(tmp_path / "mine.toml")) == prompt
    for texts in ("query", "title"):
        assert len({getattr(example, texts) for example in prompt.examples}) == 9
    part = read_judgements(split, "fine_tuning")
    given = {}
    for number, label in zip(part.pair, part.given, strict=True):
        key = (part.pairs.queries[number], part.pairs.titles[number])
        given.setdefault(key, set()).add(LABELS[label])
    for example in prompt.examples:
        assert given[example.query, example.title] == {example.label}
    labels = [example.label for example in prompt.examples]
    assert all(labels.count(label) == 3 for label in LABELS)


def test_the_seed_chooses_and_the_same_call_finds_it_done(split, tmp_path):
    first = make_prompt(options(split, tmp_path / "a.toml"))
    assert make_prompt(options(split, tmp_path / "a.toml")) == first
    with pytest.raises(BadInputError, match="holds something else"):
        make_prompt(options(split, tmp_path / "a.toml", seed=1))
    other = make_prompt(options(split, tmp_path / "b.toml", seed=1))
    assert other.examples != first.examples


def test_pairs_of_middling_length_are_preferred(tmp_path):
    split = write_tiny_split(tmp_path)
    part = read_judgements(split, "fine_tuning")
    lengths = sorted(len(query) for query in part.pairs.queries)
    for seed in range(5):
        prompt = make_prompt(options(split, tmp_path / f"{seed}.toml", examples=1, seed=seed))
        for example in prompt.examples:
            assert lengths[len(lengths) // 4] <= len(example.query)
            assert len(example.query) <= lengths[-len(lengths) // 4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"examples": 100}, "pairs to show as 'irrelevant', fewer than the 100 examples"),
        ({"examples": -1}, "--examples must be 0 or more, got -1"),
        ({"template": "none"}, "there is none of that name"),
    ],
)
def test_what_cannot_be_made_is_told(split, tmp_path, changed, message):
    with pytest.raises(BadInputError, match=message):
        make_prompt(options(split, tmp_path / "mine.toml", **changed))
    with pytest.raises(BadInputError, match=r"a prompt's file ends in \.toml"):
        make_prompt(options(split, tmp_path / "mine"))
    assert not list(tmp_path.iterdir())


def test_the_command_shows_the_whole_chat(split, tmp_path, capsys):
    output = tmp_path / "mine.toml"
    arguments = ["prompt", "--split", str(split), "--output", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    prompt = read_prompt(str(output))
    shown = read_judgements(split, "validation").pairs
    for message in prompt.messages(shown.queries[0], shown.titles[0]):
        assert message["content"] in printed.out
    assert prompt.version in printed.err
    assert main([*arguments, "--examples", "50"]) == 2
    assert capsys.readouterr().err.startswith("label-relevance: the fine-tuning part has")
