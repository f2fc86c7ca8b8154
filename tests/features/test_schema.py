"""``dataset.toml``: counters of the purchase history, and leaving features out."""

import tomllib
from pathlib import Path

import pytest

from features.errors import BadInputError
from features.schema import DatasetSchema, Feature, parse_schema

FEATURES = (
    Feature(name="store", kind="sparse", level="request"),
    Feature(name="brand", kind="sparse", level="candidate"),
    Feature(name="baskets", kind="dense", level="request", from_history=True),
    Feature(name="price", kind="dense", level="candidate"),
    Feature(name="repeats", kind="dense", level="candidate", from_history=True),
)
SCHEMA = DatasetSchema(name="shop", features=FEATURES)


def write(folder: Path, features: str) -> Path:
    (folder / "dataset.toml").write_text(f'name = "shop"\n{features}')
    return folder


def test_the_toml_says_which_features_count_the_history(tmp_path: Path) -> None:
    text = SCHEMA.to_toml()
    assert '\n[features]\nfrom_history = ["baskets", "repeats"]\n\n[features.sparse]\n' in text
    (tmp_path / "dataset.toml").write_text(text)
    assert DatasetSchema.load(tmp_path) == SCHEMA
    assert parse_schema("bundle.json", tomllib.loads(text)) == SCHEMA


def test_without_counters_the_toml_does_not_speak_of_them() -> None:
    assert "from_history" not in SCHEMA.leaving_out(["baskets", "repeats"]).to_toml()


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            '["baskts"]',
            " from_history: unknown dense feature 'baskts'; did you mean 'baskets'?",
        ),
        (
            '["store"]',
            " from_history: unknown dense feature 'store'; known: baskets",
        ),
        ('"baskets"', ": 'from_history' must be a list of names, got 'baskets'"),
        ("[1]", ": 'from_history' must be a list of names, got [1]"),
    ],
)
def test_counters_are_declared_dense_features(tmp_path: Path, names: str, sentence: str) -> None:
    declared = '[features.sparse]\nrequest = ["store"]\n[features.dense]\nrequest = ["baskets"]\n'
    write(tmp_path, f"[features]\nfrom_history = {names}\n{declared}")
    with pytest.raises(BadInputError) as caught:
        DatasetSchema.load(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'dataset.toml'} [features]{sentence}"


def test_leaving_features_out() -> None:
    left = SCHEMA.leaving_out({"repeats", "store"})
    assert [feature.name for feature in left.features] == ["brand", "baskets", "price"]
    assert left.name == "shop"
    assert SCHEMA.leaving_out([]) == SCHEMA
    assert SCHEMA.features == FEATURES


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("repeat", "did you mean 'repeats'?"),
        ("zzz", "known: store, brand, baskets, price, repeats"),
    ],
)
def test_leaving_out_an_unknown_feature(name: str, hint: str) -> None:
    with pytest.raises(BadInputError) as caught:
        SCHEMA.leaving_out(["price", name])
    assert str(caught.value) == f"shop: unknown feature '{name}'; {hint}"
