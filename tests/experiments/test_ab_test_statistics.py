import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, norm, ttest_ind
from scipy.stats import t as student

from experiments.ab_test_statistics import compare, ratio, sample_ratio, users_needed


def simulate(rng, users, *, rate=0.1, lift=0.0, runs=()):
    """Return impressions and clicks of users whose taste and whose number of searches differ.

    Users who search more click less; both are a user's own, so that rows are not independent.
    """
    shape = (*runs, users)
    activity = rng.gamma(1.5, 1.0, shape)
    impressions = 1.0 + rng.poisson(20 * activity)
    taste = rng.beta(2, 2 / rate - 2, shape) * (1 + lift) / (0.6 + 0.4 * activity)
    return impressions, rng.binomial(impressions.astype(int), np.minimum(taste, 1)).astype(float)


def test_a_ratio_checked_by_hand():
    # 3 users click 1, 0, 2 of 2, 2, 4 impressions: 3/8. Deviations: 1 - 6/8, 0 - 6/8, 2 - 12/8
    # = 1/4, -3/4, 1/2; squares sum to 14/16. Variance: 3/2 * 14/16 / 64 = 21/1024.
    found = ratio(np.array([1.0, 0, 2]), np.array([2.0, 2, 4]))
    assert found.value == 3 / 8
    assert found.variance == pytest.approx(21 / 1024)
    assert found.user_variance == pytest.approx(63 / 1024)


def test_a_lift_checked_by_hand():
    # 2 users a bucket, 2 impressions each. Control 1/4, deviations 1/2 and -1/2; treatment 3/4,
    # the same deviations. Both variances: 2 * 1/2 / 16 = 1/16; as they are equal, Welch's degrees
    # of freedom are 2, of which Student's quantile is 4.3027.
    control = ratio(np.array([1.0, 0]), np.array([2.0, 2]))
    treatment = ratio(np.array([2.0, 1]), np.array([2.0, 2]))
    lift = compare(control, treatment)
    assert lift.absolute == 1 / 2
    assert lift.relative == 2
    margin = 4.3027 * math.sqrt(1 / 8)
    assert lift.absolute_interval == pytest.approx((0.5 - margin, 0.5 + margin), abs=1e-4)
    # Relative: (1/16) / (1/16) = 1 from the treatment, (9/16) (1/16) / (1/256) = 9 from the
    # control; 10^2 / (1^2 + 9^2) degrees of freedom.
    margin = student.ppf(0.975, 100 / 82) * math.sqrt(10)
    assert lift.relative_interval == pytest.approx((2 - margin, 2 + margin))
    # Half of chance's 5 % beyond 1.95996, four fifths of the tests below 0.84162: of 1/4.
    assert lift.detectable == pytest.approx((1.95996 + 0.84162) * math.sqrt(1 / 8) * 4, rel=1e-5)


def test_per_user_means_give_welchs_t_test():
    rng = np.random.default_rng(3)
    control, treatment = rng.gamma(2, 1, 40), rng.gamma(2, 2, 60)
    lift = compare(ratio(control, np.ones(40)), ratio(treatment, np.ones(60)))
    oracle = ttest_ind(treatment, control, equal_var=False)
    assert lift.p_value == pytest.approx(oracle.pvalue)
    assert lift.absolute_interval == pytest.approx(tuple(oracle.confidence_interval()))


def test_intervals_are_those_of_a_bootstrap_over_users():
    rng = np.random.default_rng(4)
    control = simulate(rng, 800)
    treatment = simulate(rng, 600, lift=0.2)
    lift = compare(*(ratio(clicks, rows) for rows, clicks in (control, treatment)))
    drawn = [[], []]
    for _ in range(3000):
        values = []
        for rows, clicks in (control, treatment):
            users = rng.integers(0, len(rows), len(rows))
            values.append(clicks[users].sum() / rows[users].sum())
        drawn[0].append(values[1] - values[0])
        drawn[1].append(values[1] / values[0] - 1)
    for found, sample in zip((lift.absolute_interval, lift.relative_interval), drawn, strict=True):
        width = found[1] - found[0]
        assert width == pytest.approx(3.92 * np.std(sample), rel=0.05)
        assert np.quantile(sample, [0.025, 0.975]) == pytest.approx(found, abs=0.05 * width)


def naive_p_values(control, treatment):
    """Return p values of the test that takes every impression for an independent one."""
    (rows_c, clicks_c), (rows_t, clicks_t) = control, treatment
    n_c, n_t, k_c, k_t = (a.sum(axis=1) for a in (rows_c, rows_t, clicks_c, clicks_t))
    rate = (k_c + k_t) / (n_c + n_t)
    z = (k_t / n_t - k_c / n_c) / np.sqrt(rate * (1 - rate) * (1 / n_c + 1 / n_t))
    return 2 * norm.sf(np.abs(z))


def test_one_test_in_twenty_finds_a_lift_that_is_not_there():
    rng = np.random.default_rng(5)
    runs = 2000
    control, treatment = (simulate(rng, 300, runs=(runs,)) for _ in range(2))
    p = [
        compare(ratio(kc, nc), ratio(kt, nt)).p_value
        for nc, kc, nt, kt in zip(*control, *treatment, strict=True)
    ]
    false = np.mean(np.array(p) < 0.05)
    assert false == pytest.approx(0.05, abs=3.5 * math.sqrt(0.05 * 0.95 / runs))
    assert chisquare(np.histogram(p, bins=10, range=(0, 1))[0]).pvalue > 0.001
    assert np.mean(naive_p_values(control, treatment) < 0.05) > 0.2  # why users are clusters


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_intervals_hold_the_true_lift_95_times_in_100(share):
    rng = np.random.default_rng(6)
    runs, users = 1500, 1000
    # The truth: the rates of a million users.
    truth = [simulate(np.random.default_rng(7), 1_000_000, lift=lift) for lift in (0, 0.15)]
    c, t = (clicks.sum() / rows.sum() for rows, clicks in truth)
    held = np.zeros(2)
    control = simulate(rng, int(users * (1 - share)), runs=(runs,))
    treatment = simulate(rng, int(users * share), lift=0.15, runs=(runs,))
    for nc, kc, nt, kt in zip(*control, *treatment, strict=True):
        lift = compare(ratio(kc, nc), ratio(kt, nt))
        for place, (interval, true) in enumerate(
            ((lift.absolute_interval, t - c), (lift.relative_interval, t / c - 1))
        ):
            held[place] += interval[0] <= true <= interval[1]
    assert held / runs == pytest.approx(0.95, abs=0.017)  # 3 standard errors


def test_the_planned_number_of_users_shows_the_lift_4_times_in_5():
    rng = np.random.default_rng(8)
    rows, clicks = simulate(rng, 100_000)
    share, planned = 0.3, 0.25
    users = users_needed(ratio(clicks, rows), planned, share)
    treated = round(users * share)
    runs = 1000
    control = simulate(rng, users - treated, runs=(runs,))
    treatment = simulate(rng, treated, lift=planned, runs=(runs,))
    lifts = [
        compare(ratio(kc, nc), ratio(kt, nt))
        for nc, kc, nt, kt in zip(*control, *treatment, strict=True)
    ]
    seen = np.mean([lift.p_value < 0.05 for lift in lifts])
    assert 0.76 < seen < 0.86  # chance within a user does not grow as much as the plan thinks
    assert np.median([lift.detectable for lift in lifts]) == pytest.approx(planned, rel=0.1)


def test_users_needed_checked_by_hand():
    # One click a user on average, variance 1 between users: 2.80159^2 * (2 * 1.1^2 + 2) / .1^2
    control = ratio(np.array([0.0, 2, 0, 2, 1]), np.ones(5))
    assert control.user_variance == pytest.approx(1.0)
    assert users_needed(control, 0.1, 0.5) == 3470
    # 2.80159^2 * (.5^2 / .2 + 1 / .8) / .5^2
    assert users_needed(control, -0.5, 0.2) == 79


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.01, 0.99))
def test_the_sample_ratio_is_scipys_chi_square(control, treatment, share):
    users = control + treatment
    if users == 0:
        return
    oracle = chisquare([control, treatment], [users * (1 - share), users * share])
    found = sample_ratio(control, treatment, share)
    assert found.p_value == pytest.approx(oracle.pvalue, rel=1e-6, abs=1e-12)
    assert found.mismatch == (found.p_value < 0.001)


def test_a_mismatch_is_what_chance_does_once_in_a_thousand():
    # 10,000 users, half planned: 3.29 standard deviations of 50 are 164.5
    assert not sample_ratio(5164, 4836, 0.5).mismatch
    assert sample_ratio(5165, 4835, 0.5).mismatch


def test_nothing_is_claimed_of_what_cannot_be_known():
    assert ratio(np.zeros(3), np.zeros(3)) is None
    one = ratio(np.array([1.0]), np.array([4.0]))
    two = ratio(np.array([1.0, 0]), np.array([4.0, 1]))
    lift = compare(two, one)
    assert lift.absolute == pytest.approx(0.05)
    assert lift.relative == pytest.approx(0.25)
    assert (lift.absolute_interval, lift.relative_interval, lift.p_value) == (None, None, None)
    assert users_needed(one, 0.1, 0.5) is None
    nothing = ratio(np.zeros(3), np.ones(3))
    lift = compare(nothing, two)
    assert lift.relative is None
    assert lift.relative_interval is None
    assert lift.absolute_interval is not None
    assert users_needed(nothing, 0.1, 0.5) is None


def test_users_that_do_not_differ_leave_no_doubt():
    same, more = (ratio(np.full(3, clicks), np.full(3, 4.0)) for clicks in (1.0, 2.0))
    assert compare(same, same).p_value == 1
    assert compare(same, more).p_value == 0
    assert compare(same, more).absolute_interval == (0.25, 0.25)
