"""Transforms, fitted and applied, by numbers worked out by hand."""

import math
import weakref

import numpy as np
import pytest
import torch

from features.transforms import fit

NAN = float("nan")
NO_DENSE = np.zeros((0, 0), np.float32)


def ids(*rows):
    return np.array(rows, dtype=np.int64)


def values(*rows):
    return np.array(rows, dtype=np.float32)


def sparse_only(*parts, min_count=1):
    numbered = [(part, np.zeros((0, part.shape[1]), np.float32)) for part in parts]
    return fit(["brand"], [], numbered, min_count=min_count, bins=0)


def dense_only(*parts, bins):
    numbered = [(np.zeros((0, part.shape[1]), np.int64), part) for part in parts]
    names = [f"value{i}" for i in range(len(parts[0]))]
    return fit([], names, numbered, min_count=5, bins=bins)


def apply(transforms, sparse, dense=None):
    dense = np.zeros((0, sparse.shape[1]), np.float32) if dense is None else dense
    return transforms(torch.from_numpy(sparse), torch.from_numpy(dense))


def apply_dense(transforms, dense):
    return apply(transforms, np.zeros((0, dense.shape[1]), np.int64), dense)


def test_rows_are_numbered_by_frequency_then_by_id():
    transforms = sparse_only(ids([7, 3, 3, 9, 9, 9, 5, 5]))
    rows, _ = apply(transforms, ids([9, 3, 5, 7]))
    assert rows.tolist() == [[1, 2, 3, 4]]  # 9 thrice; 3 and 5 twice; 7 once
    assert transforms.tables == {"brand_id": 5}


def test_values_seen_too_rarely_are_unknown():
    transforms = sparse_only(ids([7, 7, 7, 3, 3]), ids([3, 8, -1, -1]), min_count=3)
    rows, _ = apply(transforms, ids([3, 7, -1, 8, 1000]))
    assert rows.tolist() == [[1, 2, 0, 0, 0]]  # 3 and 7 thrice, one of them over two parts
    assert transforms.tables == {"brand_id": 3}


def test_fitting_reads_the_given_parts_alone():
    known = ids([4, 4, 6])
    transforms = sparse_only(known)
    rows, _ = apply(transforms, ids([5, 4, 6]))
    assert rows.tolist() == [[0, 1, 2]]
    scale = dense_only(values([0.0, 1.0]), bins=2)
    before = (scale.mean.clone(), scale.std.clone(), scale.boundaries.clone())
    apply_dense(scale, values([1e9, -1e9]))
    for old, new in zip(before, (scale.mean, scale.std, scale.boundaries), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_bins_with_boundaries_worked_out_by_hand():
    # Quartiles of 0 … 8: 2, 4, 6.
    transforms = dense_only(values(range(9)), bins=4)
    assert transforms.boundaries.tolist() == [[2, 4, 6]]
    assert transforms.tables == {"value0_bin": 5}
    rows, _ = apply_dense(transforms, values([-5, 2, 2.5, 4, 4.5, 6, 6.5, 99, NAN, math.inf]))
    assert rows.tolist() == [[1, 1, 2, 2, 3, 3, 4, 4, 0, 4]]


def test_quantiles_of_many_parts_are_of_a_thinned_sample(monkeypatch):
    monkeypatch.setattr("features.transforms._MOST_SAMPLED", 8)
    # Of 0 … 31 in four parts every fourth is left: 0, 4, … 28.
    transforms = dense_only(*values(range(32)).reshape(4, 1, 8), bins=2)
    assert transforms.boundaries.tolist() == [[14]]
    assert transforms.mean.item() == pytest.approx(np.log1p(range(32)).mean())


def test_parts_are_let_go_of_once_they_are_read():
    seen = []

    def parts():
        for _ in range(3):
            assert [part() for part in seen[:-1]] == [None] * len(seen[:-1])
            part = np.zeros((1, 100), np.float32)
            seen.append(weakref.ref(part))
            yield np.zeros((0, 100), np.int64), part

    fit([], ["value0"], parts(), min_count=5, bins=4)
    assert len(seen) == 3


def test_boundaries_that_fall_together_are_one():
    # Quartiles of nine values, seven of them 1: 1, 1, 1.
    transforms = dense_only(values([1, 1, 1, 1, 1, 1, 1, 5, 6]), bins=4)
    assert transforms.boundaries.tolist() == [[1, math.inf, math.inf]]
    rows, _ = apply_dense(transforms, values([0, 1, 1.5, 6]))
    assert rows.tolist() == [[1, 1, 2, 2]]


def test_without_bins_there_is_no_table_and_no_row():
    for bins in (0, 1):
        transforms = dense_only(values([1, 2, 3]), bins=bins)
        rows, scaled = apply_dense(transforms, values([1, 2]))
        assert transforms.tables == {}
        assert rows.shape == (0, 2)
        assert scaled.shape == (2, 1)


def test_scaling_by_hand():
    # log1p of 0 and e - 1 are 0 and 1, with the sign of the value: mean 0, variance 2 / 3.
    part = values([math.e - 1, 0, 1 - math.e])
    transforms = dense_only(part, bins=0)
    _, scaled = apply_dense(transforms, part)
    root = math.sqrt(3 / 2)
    torch.testing.assert_close(scaled, torch.tensor([[root], [0.0], [-root]]))


def test_mean_and_deviation_are_of_all_parts_and_of_what_is_present():
    parts = [values([math.e - 1, NAN, NAN]), values([math.e**3 - 1])]  # log1p: 1 and 3
    transforms = dense_only(*parts, bins=0)
    torch.testing.assert_close(transforms.mean, torch.tensor([2.0]))
    torch.testing.assert_close(transforms.std, torch.tensor([1.0]))


def test_missing_values_take_row_0_and_value_0():
    transforms = dense_only(values([1, 2, 3, 4], [5, 6, 7, 8]), bins=2)
    rows, scaled = apply_dense(transforms, values([NAN, 3], [8, NAN]))
    assert rows.tolist() == [[0, 2], [2, 0]]
    assert scaled[0, 0] == 0
    assert scaled[1, 1] == 0
    assert scaled[0, 1] != 0
    assert scaled.isfinite().all()


def test_a_constant_column_becomes_zero():
    transforms = dense_only(values([7.3] * 100), bins=4)
    rows, scaled = apply_dense(transforms, values([7.3, 7.3, 8, NAN]))
    torch.testing.assert_close(scaled[:2], torch.zeros(2, 1), atol=1e-6, rtol=0)
    assert scaled.isfinite().all()
    assert rows.tolist() == [[1, 1, 2, 0]]


def test_a_column_without_any_value():
    transforms = dense_only(values([NAN, NAN]), bins=4)
    rows, scaled = apply_dense(transforms, values([NAN, 3]))
    assert rows.tolist() == [[0, 1]]
    torch.testing.assert_close(scaled, torch.tensor([[0.0], [math.log1p(3)]]))


def test_the_order_of_rows_is_the_order_of_tables():
    part = (ids([1, 1, 2], [5, 6, 6]), values([1, 2, 3]))
    transforms = fit(["a", "b"], ["x"], [part], min_count=1, bins=2)
    assert transforms.tables == {"a_id": 3, "b_id": 3, "x_bin": 3}
    rows, scaled = apply(transforms, ids([2, 9], [6, 5]), values([3, 1]))
    assert rows.tolist() == [[2, 0], [1, 2], [2, 1]]
    assert scaled.shape == (2, 1)


@pytest.mark.parametrize("number", [0, 3])
def test_no_features_and_no_records(number):
    nothing = fit([], [], [(ids(), NO_DENSE)], min_count=5, bins=40)
    rows, scaled = nothing(torch.zeros(0, number, dtype=torch.int64), torch.zeros(0, number))
    assert rows.shape == (0, number)
    assert scaled.shape == (number, 0)


def test_quantiles_come_from_a_sample_of_a_long_part():
    part = values(range(100_000))
    boundary = dense_only(part, bins=2).boundaries.item()
    assert boundary == pytest.approx(50_000, rel=1e-3)
