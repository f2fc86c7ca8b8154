import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import log_loss, roc_auc_score

from experiments.paired_test import (
    Estimate,
    auc_estimate,
    compare,
    log_loss_estimate,
    mean_over_weeks,
    placement_values,
)

METRICS = (auc_estimate, log_loss_estimate)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def simulate(rng, *, users=80, rows=12, spread=1.0, noise=(0.8, 0.8), seeds=1, jitter=0.0):
    """Return clicks, users and the scores of two models, whose errors are a user's own.

    Each model knows the log odds but for its ``noise``, most of which is shared by all rows of a
    user, and for a part of scale ``jitter`` that a training seed brings, on one feature x.
    """
    user = np.repeat(np.arange(users), rng.integers(1, 2 * rows, users))
    x = rng.normal(size=len(user))
    odds = -1 + spread * rng.normal(size=users)[user] + x
    clicked = rng.random(len(user)) < sigmoid(odds)
    models = []
    for scale in noise:
        error = scale * (rng.normal(size=users)[user] + 0.3 * rng.normal(size=len(user)))
        bend = jitter * rng.normal(size=(seeds, 1))
        models.append(sigmoid(odds + error + bend * x))
    return clicked, user, models


def estimates(clicked, user, models, make=auc_estimate):
    count = int(user.max()) + 1
    return [make(clicked, m, user, count, tuple(range(len(m)))) for m in models]


def direct_delong(clicked, first, second):
    """Return the difference of the AUCs and its variance from all pairs (DeLong 1988)."""
    differences = []
    for score in (first, second):
        more = score[clicked][:, None] - score[~clicked]
        differences.append(np.where(more > 0, 1.0, np.where(more == 0, 0.5, 0.0)))
    pairs = differences[0] - differences[1]
    rows, columns = pairs.mean(axis=1), pairs.mean(axis=0)
    return pairs.mean(), rows.var(ddof=1) / len(rows) + columns.var(ddof=1) / len(columns)


def test_placement_values_checked_by_hand():
    clicked = np.array([True, False, True, False, False])
    score = np.array([0.9, 0.1, 0.4, 0.4, 0.6])
    # click .9 beats all three; click .4 beats .1, ties .4, loses to .6: 1.5 of 3
    # other .1 is under both; other .4 under .9, ties .4: 1.5 of 2; other .6 under .9: 1 of 2
    assert placement_values(clicked, score) == pytest.approx([1, 1, 0.5, 0.75, 0.5])


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2).filter(
        lambda rows: len({click for click, _ in rows}) == 2
    )
)
def test_both_means_of_the_placement_values_are_scikit_learns_auc(rows):
    clicked = np.array([click for click, _ in rows])
    score = np.array([score for _, score in rows], dtype=np.float32)
    placed = placement_values(clicked, score)
    assert placed[clicked].mean() == pytest.approx(roc_auc_score(clicked, score))
    assert placed[~clicked].mean() == pytest.approx(roc_auc_score(clicked, score))


def test_values_by_seed_are_scikit_learns():
    clicked, user, (scores, _) = simulate(np.random.default_rng(1), seeds=3, jitter=0.5)
    scores = np.round(scores.astype(np.float32), 2)  # ties, and some exactly 0 or 1
    auc, loss = (estimates(clicked, user, [scores], make)[0] for make in METRICS)
    rate = np.full(len(clicked), clicked.mean())
    for seed, score in enumerate(scores):
        assert auc.values[seed] == pytest.approx(roc_auc_score(clicked, score), abs=1e-12)
        assert loss.values[seed] == pytest.approx(
            log_loss(clicked, score.astype(np.float64)) / log_loss(clicked, rate), rel=1e-12
        )


def test_each_row_its_own_user_is_plain_delong():
    clicked, _, models = simulate(np.random.default_rng(2), users=30)
    models = [np.round(m, 1) for m in models]  # with ties
    found = compare(*estimates(clicked, np.arange(len(clicked)), models))
    difference, variance = direct_delong(clicked, models[0][0], models[1][0])
    assert found.lift == pytest.approx(difference)
    assert found.sampling_error == pytest.approx(variance**0.5)
    assert found.training_error is None
    z = abs(difference) / variance**0.5
    assert found.p_value == pytest.approx(2 * norm.sf(z), abs=0.01)


def test_clustered_variance_is_obuchowskis_formula():
    clicked, user, models = simulate(np.random.default_rng(3), users=20)
    found = compare(*estimates(clicked, user, models))
    # Obuchowski (1997), equation by equation, for the difference of the two curves.
    first, second = (placement_values(clicked, m[0]) for m in models)
    placed, click_sums, other_sums = first - second, [], []
    lift = placed[clicked].mean()
    for one in range(20):
        own = user == one
        click_sums.append((placed[own & clicked] - lift).sum())
        other_sums.append((placed[own & ~clicked] - lift).sum())
    clicks, others = clicked.sum(), (~clicked).sum()
    with_clicks, with_others = len({*user[clicked]}), len({*user[~clicked]})
    s10 = with_clicks / ((with_clicks - 1) * clicks) * np.square(click_sums).sum()
    s01 = with_others / ((with_others - 1) * others) * np.square(other_sums).sum()
    s11 = 20 / 19 * np.dot(click_sums, other_sums)
    variance = s10 / clicks + s01 / others + 2 * s11 / (clicks * others)
    assert found.sampling_error == pytest.approx(variance**0.5)


@pytest.mark.parametrize("make", METRICS)
def test_standard_error_is_that_of_a_bootstrap_over_users(make):
    rng = np.random.default_rng(4)
    clicked, user, models = simulate(rng, users=300, noise=(0.4, 1.0))
    found = compare(*estimates(clicked, user, models, make))
    rows = [np.flatnonzero(user == one) for one in range(300)]
    lifts = []
    for _ in range(400):
        drawn = np.concatenate([rows[one] for one in rng.integers(0, 300, 300)])
        resampled = [m[:, drawn] for m in models]
        variant, baseline = estimates(clicked[drawn], user[drawn], resampled, make)
        lifts.append(variant.values[0] - baseline.values[0])
    assert found.sampling_error == pytest.approx(np.std(lifts), rel=0.12)


def weekly(rng, make, *, weeks=2, jitter, noise):
    """Return the lift of a simulation whose users come back each week, with the same errors."""
    seeds = 4
    users, rows = 60, 8
    taste, bends = rng.normal(size=users), jitter * rng.normal(size=(2, seeds, 1))
    errors = [scale * rng.normal(size=users) for scale in noise]
    found = [[], []]
    for _ in range(weeks):
        user = np.repeat(np.arange(users), rows)
        x = rng.normal(size=len(user))
        odds = -1 + taste[user] + x
        clicked = rng.random(len(user)) < sigmoid(odds)
        models = [sigmoid(odds + e[user] + b * x) for e, b in zip(errors, bends, strict=True)]
        for side, estimate in zip(found, estimates(clicked, user, models, make), strict=True):
            side.append(estimate)
    return compare(*(mean_over_weeks(side) for side in found))


@pytest.mark.parametrize("make", METRICS)
@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_equal_models_are_told_apart_one_time_in_twenty(make, jitter):
    rng = np.random.default_rng(5)
    found = [weekly(rng, make, jitter=jitter, noise=(0.8, 0.8)) for _ in range(600)]
    false_alarms = np.mean([lift.p_value < 0.05 for lift in found])
    assert 0.025 < false_alarms < 0.075


@pytest.mark.parametrize("make", METRICS)
def test_intervals_hold_the_true_lift_95_times_in_100(make):
    rng = np.random.default_rng(6)
    noise, jitter = (0.5, 1.0), 0.4
    found = [weekly(rng, make, jitter=jitter, noise=noise) for _ in range(600)]
    truth = np.mean([lift.lift for lift in found])  # its own error is a fifth of a percent
    assert (truth > 0) == (make is auc_estimate)
    covered = np.mean([lift.interval[0] <= truth <= lift.interval[1] for lift in found])
    assert 0.92 < covered < 0.98
    # Neither source of chance would do alone.
    for error in ("sampling_error", "training_error"):
        narrow = [abs(lift.lift - truth) <= 1.96 * getattr(lift, error) for lift in found]
        assert np.mean(narrow) < 0.93


def test_ignoring_users_would_find_differences_where_there_are_none():
    rng = np.random.default_rng(7)
    naive = []
    for _ in range(150):
        clicked, user, models = simulate(rng, users=40, rows=40)
        naive.append(compare(*estimates(clicked, np.arange(len(user)), models)).p_value < 0.05)
    assert np.mean(naive) > 0.15


def single(values, seeds=None, parts=None) -> Estimate:
    parts = np.zeros((1, 3)) if parts is None else np.array(parts, dtype=np.float64)
    return Estimate(
        seeds=tuple(seeds or range(len(values))),
        values=np.array(values),
        parts=parts,
        members=np.ones(parts.shape, dtype=bool),
    )


def test_training_error_pairs_equal_seeds():
    # Differences .1 .1 .4: mean .2, variance .03, of the mean .01.
    found = compare(single([0.5, 0.6, 0.9]), single([0.4, 0.5, 0.5]))
    assert found.lift == pytest.approx(0.2)
    assert found.sampling_error == 0
    assert found.training_error == pytest.approx(0.1)
    # Two degrees of freedom: t is 4.3027.
    assert found.interval == pytest.approx((0.2 - 0.43027, 0.2 + 0.43027), abs=1e-4)
    assert found.p_value == pytest.approx(0.18350, abs=1e-4)  # t = 2: 1 - 2 / sqrt(6)


def test_training_errors_of_other_seeds_add_up():
    # Variances of the two means: .01 / 2 and .03 / 3.
    variant, baseline = single([0.5, 0.5 + 0.02**0.5]), single([0.1, 0.1, 0.4], seeds=(7, 8, 9))
    assert compare(variant, baseline).training_error == pytest.approx(0.015**0.5)
    alone = compare(single([0.5]), baseline)
    assert alone.training_error == pytest.approx(0.1)


def test_sampling_error_checked_by_hand():
    # Parts of the difference .1 -.2 .1 over three users: 3 / 2 * .06.
    variant = single([0.6], parts=[[0.1, -0.1, 0.0]])
    baseline = single([0.5], parts=[[0.0, 0.1, -0.1]])
    assert compare(variant, baseline).sampling_error == pytest.approx(0.09**0.5)
    # The mean of two weeks, of which the other has no chance in it, has half the parts.
    weeks = [mean_over_weeks([one, single([0.5])]) for one in (variant, baseline)]
    assert compare(*weeks).sampling_error == pytest.approx(0.09**0.5 / 2)
    assert compare(*weeks).lift == pytest.approx(0.05)


def test_a_variant_against_itself_is_no_lift():
    clicked, user, (scores, _) = simulate(np.random.default_rng(8), seeds=3, jitter=0.2)
    for make in METRICS:
        (one,) = estimates(clicked, user, [scores], make)
        found = compare(one, one)
        assert (found.lift, found.interval, found.p_value) == (0, (0, 0), 1)


def test_clicks_of_one_user_alone_give_no_interval():
    clicked, user = np.array([True, True, False, False]), np.array([0, 0, 0, 1])
    first, second = estimates(
        clicked, user, [np.array([[0.9, 0.4, 0.3, 0.2]]), np.array([[0.9, 0.1, 0.3, 0.2]])]
    )
    found = compare(first, second)
    assert found.lift == pytest.approx(0.5)
    assert found.interval is None
    assert found.p_value is None
    assert found.sampling_error is None
    assert found.training_error is None
