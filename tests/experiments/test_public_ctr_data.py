"""Reading CTR files: the same table from every format, and a sentence for every mistake."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import public_ctr_files, public_ctr_libsvm
from experiments.public_ctr_config import PublicConfig
from experiments.public_ctr_data import EncodedData, load_or_encode
from features.errors import BadInputError

TRAIN = """label,user,item,price
1,u7,5,0.5
0,u3,5,
0,u7,,2
1,u7,1,-1
"""
OTHER = """label,item,price,user
0,9,1,u3
1,5,3,u9
"""


def write_folder(folder: Path, suffix: str = ".csv", **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for split, text in ({"train": TRAIN, "valid": OTHER, "test": OTHER} | texts).items():
        (folder / f"{split}{suffix}").write_text(text)
    return folder


def encode(folder: Path, **given: int | tuple[str, ...]) -> EncodedData:
    config = PublicConfig(**({"numeric": ("price",)} | given))  # type: ignore[arg-type]
    return load_or_encode(folder, folder.parent / "out", config)


def test_values_become_rows_of_one_table(tmp_path: Path) -> None:
    data = encode(write_folder(tmp_path / "data"))
    # user: 0 unknown, 1 u7 (3 times), 2 u3; item: 3 unknown, 4 "5" (twice), 5 "1".
    assert data.fields.categorical == ("user", "item")
    assert data.sizes == (3, 3)
    assert data.splits["train"].table_rows.tolist() == [[1, 4], [2, 4], [1, 3], [1, 5]]
    assert data.splits["train"].values.tolist() == [[0.5], [0], [2], [-1]]
    assert data.splits["train"].clicked.tolist() == [True, False, False, True]
    # The other columns' order does not matter; item 9 and user u9 were not seen in training.
    assert data.splits["test"].table_rows.tolist() == [[2, 3], [0, 4]]
    assert data.splits["test"].values.tolist() == [[1], [3]]


def test_rare_values_are_unknown(tmp_path: Path) -> None:
    data = encode(write_folder(tmp_path / "data"), min_count=2)
    assert data.sizes == (2, 2)
    assert data.splits["train"].table_rows.tolist() == [[1, 3], [0, 3], [1, 2], [1, 2]]


def test_counts_come_from_training_rows_only(tmp_path: Path) -> None:
    often = "label,user,item,price\n" + "1,new,5,1\n0,new,5,1\n" * 50
    data = encode(write_folder(tmp_path / "data", valid=often))
    assert data.splits["valid"].table_rows[:, 0].tolist() == [0] * 100


def test_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lines = [f"{n % 2},u{rng.zipf(1.6)},{rng.integers(30)},{n}" for n in range(2000)]
    folder = write_folder(tmp_path / "data", train="\n".join(["label,user,item,price", *lines]))
    whole = encode(folder).splits["train"].table_rows.tolist()
    monkeypatch.setattr(public_ctr_files, "_BLOCK_BYTES", 512)
    config = PublicConfig(numeric=("price",))
    again = load_or_encode(folder, tmp_path / "elsewhere", config)
    assert again.splits["train"].table_rows.tolist() == whole
    assert again.splits["train"].values[:, 0].tolist() == list(range(2000))


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    csv = write_folder(tmp_path / "csv")
    expected = encode(csv)
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        table = pcsv.read_csv(csv / f"{split}.csv")  # item becomes int64, price float64
        table = table.set_column(
            table.schema.get_field_index("label"), "label", table["label"].cast(pa.bool_())
        )
        pq.write_table(table, folder / f"{split}.parquet")
    found = encode(folder)
    for split, rows in expected.splits.items():
        assert found.splits[split].table_rows.tolist() == rows.table_rows.tolist()
        assert found.splits[split].values.tolist() == rows.values.tolist()
        assert found.splits[split].clicked.tolist() == rows.clicked.tolist()


def test_encoding_is_kept_until_something_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "data")

    def encoded_again(**given: int) -> bool:
        encode(folder, **given)
        return "train.csv" in capsys.readouterr().err

    assert encoded_again()
    assert not encoded_again()
    assert not encoded_again(batch_size=7)
    assert encoded_again(min_count=2)
    write_folder(folder, test=OTHER + "0,5,1,u7\n")
    assert encoded_again(min_count=2)


LIBSVM = """1 3:1 12:1 20:0.5
-1 4:1 12:1 20:0.25

+1 3:1 13:1 20:1
"""


def test_libsvm_tells_numeric_fields_apart(tmp_path: Path) -> None:
    other = "0 4:1 99:1 20:2\n1 3:1 12:1 20:0\n"
    folder = write_folder(tmp_path / "data", ".txt", train=LIBSVM, valid=other, test=other)
    data = encode(folder)
    assert data.fields.categorical == ("field_1", "field_2")
    assert data.fields.numeric == ("field_3",)
    assert data.splits["train"].table_rows.tolist() == [[1, 4], [2, 4], [1, 5]]
    assert data.splits["train"].values[:, 0].tolist() == [0.5, 0.25, 1]
    assert data.splits["train"].clicked.tolist() == [True, False, True]
    assert data.splits["test"].table_rows.tolist() == [[2, 3], [1, 4]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 10**12), st.integers(0, 50)), min_size=1, max_size=9
    ),
    st.integers(1, 60),
)
def test_libsvm_gives_back_every_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[bool, int, int]], block: int
) -> None:
    path = tmp_path_factory.mktemp("libsvm") / "train.libsvm"
    path.write_text("".join(f"{label:d} {a}:1 {b}:1\n" for label, a, b in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public_ctr_libsvm, "_BLOCK_BYTES", block)
        fields = public_ctr_libsvm.read_libsvm_fields(path)
        found = list(public_ctr_libsvm.read_libsvm_rows(path, fields))
    assert fields.numeric == ()
    assert [bool(c) for part in found for c in part.clicked] == [row[0] for row in rows]
    for place, name in ((1, "field_1"), (2, "field_2")):
        values = [value for part in found for value in part.tokens[name].to_pylist()]
        assert values == [row[place] for row in rows]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 3:1 4:1\n0 3:1\n", "row 2 must be a label and 2 fields 'index:value', got '0 3:1'"),
        ("1 3:1 4:1\n0 3:1 x:1\n", "row 2 must be .* got '0 3:1 x:1'"),
        ("1 3:1 4:1\n0 3 1 4 1\n", "row 2 must be"),
        ("1 3:1 4:1\n0 3:1 4:\n", "row 2 must be"),
        ("1 3 4\n0 3 4\n", "row 1 must be"),
        ("1 3:1 4:1\n2 3:1 5:1\n", "row 2: 'label' must be 0 or 1, got 2"),
        ("1 3:1 4:1\n0 3:1 5:0.5\n", "row 2: 'field_2' is categorical, .* got 0.5"),
        ("1 3:1 4:1\n0 3:inf 5:1\n", "row 2: 'field_1' is infinite"),
        ("\n", "no rows"),
    ],
)
def test_libsvm_mistakes(tmp_path: Path, text: str, message: str) -> None:
    folder = write_folder(tmp_path / "data", ".libsvm", train=text)
    with pytest.raises(BadInputError, match=message):
        encode(folder)


HEADER = "label,user,item,price\n"


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("train", "user,item,price\nu,1,2\n", "train.csv: column 'label' is missing"),
        ("train", "label,user,item\n1,u,2\n", "column 'price' is missing"),
        ("train", "label,user,user,price\n1,u,2,3\n", "column 'user' is there twice"),
        ("train", HEADER + "1,u,2,3\n2,u,2,3\n", "row 2: 'label' must be 0 or 1, got '2'"),
        ("train", HEADER + "1,u,2,3\n,u,2,3\n", "row 2: 'label' must be 0 or 1, got nothing"),
        ("train", HEADER + "1,u,2,3\n0,u,2,dear\n", "row 2: 'price' must be a number, got 'dear'"),
        ("train", HEADER + "1,u,2,3\n0,u,2,inf\n", "row 2: 'price' is infinite"),
        ("train", HEADER + "1,u,2,3\n0,u,2\n", "Expected 4 columns, got 3"),
        ("train", HEADER, "train.csv: no rows"),
        ("train", "", "train.csv: not a csv file: Empty CSV file"),
        ("train", HEADER + "1,u,2,3\n", "of 1 rows all are clicked"),
        ("valid", HEADER + "0,u,2,3\n0,u,2,3\n", "valid.csv: of 2 rows none are clicked"),
        ("test", HEADER, "test.csv: no rows"),
        ("test", "label,user,price\n1,u,2\n", "test.csv: column 'item' is missing"),
        ("test", "label,user,item,price,x\n1,u,2,3,4\n", "test.csv: column 'x' is not in train"),
    ],
)
def test_csv_mistakes(tmp_path: Path, split: str, text: str, message: str) -> None:
    folder = write_folder(tmp_path / "data", **{split: text})
    with pytest.raises(BadInputError, match=message):
        encode(folder)
    assert not (tmp_path / "out" / "encoded").exists()


def test_parquet_lists_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        table = pa.table({"label": [0, 1], "history": [[1], [2, 3]]})
        pq.write_table(table, tmp_path / "data" / f"{split}.parquet")
    with pytest.raises(BadInputError, match="column 'history' must hold single values"):
        encode(tmp_path / "data", numeric=())


def test_split_files_are_found_or_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such folder"):
        encode(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "data")
    (folder / "valid.txt").write_text("0 1:1\n")
    with pytest.raises(BadInputError, match=r"valid split is there twice: valid.csv and valid.txt"):
        encode(folder)
    (folder / "valid.csv").unlink()
    with pytest.raises(BadInputError, match=r"valid.txt: must have the format of train.csv"):
        encode(folder)
    (folder / "valid.txt").unlink()
    with pytest.raises(BadInputError, match=r"the valid split is missing; looked for valid.csv"):
        encode(folder)
