"""The rows of the ranking benchmark: which there are, and what each of them changes."""

import pytest

from experiments.ranking_variants import (
    BASELINE,
    COMPARISONS,
    VARIANTS,
    Variant,
    choose,
    comparisons,
    counting_features,
)
from features.errors import BadInputError
from features.schema import DatasetSchema, Feature
from ranking.config import RankerConfig, TrainingConfig, TransformConfig

COUNTER = Feature(name="repeats", kind="dense", level="candidate", from_history=True)
PRICE = Feature(name="price", kind="dense", level="candidate")
WITH_COUNTERS = DatasetSchema(name="made-up", features=(PRICE, COUNTER))
PLAIN = DatasetSchema(name="made-up", features=(PRICE,))
BY_NAME = {variant.name: variant for variant in VARIANTS}


def names(variants: list[Variant]) -> list[str]:
    return [variant.name for variant in variants]


def test_the_rows_of_the_paper_stand_in_its_order() -> None:
    order = names(list(VARIANTS))
    paper = ["dcn", "product-query", "history", "random"]
    assert [name for name in order if name in paper] == paper
    assert len(set(order)) == len(order)
    assert len({variant.title for variant in VARIANTS}) == len(order)


def test_every_lift_and_comparison_is_against_a_row_that_there_is() -> None:
    for variant in VARIANTS:
        assert variant.baseline is None or variant.baseline in BY_NAME
        assert variant.baseline != variant.name
    assert [v.name for v in VARIANTS if v.baseline is None] == [BASELINE]
    for pair in COMPARISONS:
        assert set(pair) <= set(BY_NAME)
        assert pair[1] != BY_NAME[pair[0]].baseline, "that is tested already"
    assert len(set(COMPARISONS)) == len(COMPARISONS)


def test_rows_with_counters_are_compared_with_rows_with_counters() -> None:
    for variant in VARIANTS:
        assert variant.counters == ("counters" in variant.name)
        if variant.counters and variant.name != "dcn-counters":
            assert variant.baseline == "dcn-counters"
        assert not (variant.counters and "counters" not in variant.title)
    for one, other in COMPARISONS:
        assert BY_NAME[one].counters == BY_NAME[other].counters


@pytest.mark.parametrize("name", [n for n, v in BY_NAME.items() if v.learner == "ranker"])
def test_every_ranker_can_be_configured(name: str) -> None:
    config = BY_NAME[name].configure(RankerConfig(), WITH_COUNTERS, week=45, seed=3)
    assert (config.training.evaluate_week, config.training.seed) == (45, 3)
    assert config.model.embedding_tower == (not name.startswith("dcn"))
    assert config.model.counts_history == name.startswith("similar")
    assert config.model.tables == (name if name in {"random", "fine-tuned"} else "frozen")
    reads_history = config.model.embedding_tower and config.model.purchase_history
    assert reads_history == (name not in {"dcn", "dcn-counters", "product-query"})


def test_the_base_configuration_decides_the_rest() -> None:
    base = RankerConfig(
        training=TrainingConfig(epochs=7, keep_unclicked=0.25, table_learning_rate=0.9),
        transforms=TransformConfig(bins=3, leave_out=("price",)),
    )
    config = BY_NAME["history"].configure(base, WITH_COUNTERS, week=45, seed=0)
    assert (config.training.epochs, config.training.keep_unclicked) == (7, 0.25)
    assert config.training.table_learning_rate == 0.9
    assert config.transforms == TransformConfig(bins=3, leave_out=("price", "repeats"))
    assert config.history == base.history


def test_counters_are_left_out_but_where_the_name_says_so() -> None:
    for variant in VARIANTS:
        config = variant.configure(RankerConfig(), WITH_COUNTERS, week=1, seed=0)
        assert config.transforms.leave_out == (() if variant.counters else ("repeats",))
        nothing = variant.configure(RankerConfig(), PLAIN, week=1, seed=0)
        assert nothing.transforms.leave_out == ()
    base = RankerConfig(transforms=TransformConfig(leave_out=("repeats",)))
    config = BY_NAME["dcn"].configure(base, WITH_COUNTERS, week=1, seed=0)
    assert config.transforms.leave_out == ("repeats",), "named once"
    assert counting_features(WITH_COUNTERS) == [COUNTER]


def test_all_that_the_dataset_allows() -> None:
    everything = choose([], WITH_COUNTERS, tables=True)
    assert everything == list(VARIANTS)
    assert names(choose([], PLAIN, tables=True)) == [v.name for v in VARIANTS if not v.counters]
    assert names(choose([], PLAIN, tables=False)) == ["logistic", "lightgbm", "dcn"]
    assert names(choose([], WITH_COUNTERS, tables=False)) == [
        *("logistic", "lightgbm", "dcn", "lightgbm-counters", "dcn-counters")
    ]


def test_those_named_come_in_the_order_of_the_table() -> None:
    chosen = choose(["similar-history", "dcn", "history"], WITH_COUNTERS, tables=True)
    assert names(chosen) == ["dcn", "history", "similar-history"]
    assert names(choose(["dcn"], PLAIN, tables=False)) == ["dcn"]


@pytest.mark.parametrize(
    ("asked", "schema", "tables", "sentence"),
    [
        (["dcn", "dnc"], PLAIN, True, r"unknown variant 'dnc'; known: logistic, lightgbm, dcn,"),
        (["dcn", "history", "dcn"], PLAIN, True, r"variant 'dcn' is named twice"),
        (["history"], PLAIN, True, r"lift of the variants named is against dcn: name it too"),
        (
            ["history", "similar-history-counters"],
            WITH_COUNTERS,
            True,
            r"is against dcn, dcn-counters: name it too",
        ),
        (["dcn", "dcn-counters"], PLAIN, True, r"'dcn-counters' needs .* dataset lacks them"),
        (["dcn", "history"], PLAIN, False, r"variant 'history' needs embedding tables"),
    ],
)
def test_what_is_refused(
    asked: list[str], schema: DatasetSchema, tables: bool, sentence: str
) -> None:
    with pytest.raises(BadInputError, match=sentence):
        choose(asked, schema, tables=tables)


def test_comparisons_of_the_rows_that_are_there() -> None:
    assert comparisons(list(VARIANTS)) == list(COMPARISONS)
    assert comparisons([BY_NAME[n] for n in ("dcn", "history", "product-query")]) == [
        ("history", "product-query")
    ]
    assert comparisons([BY_NAME["dcn"]]) == []
