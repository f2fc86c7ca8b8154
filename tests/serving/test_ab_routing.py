import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, pearsonr

from features.errors import BadInputError
from serving.ab_routing import CONTROL, TREATMENT, Routing

SHARES = st.floats(0, 1)
USERS = st.integers(-(2**63), 2**63 - 1)


def places(salt, users):
    routing = Routing(salt=salt, treatment_share=0.5)
    return np.array([routing.place(user) for user in users])


def test_places_never_change():
    # A release that changed one of these would move users of running tests.
    assert places("spring", [0, 1, 1371]).tolist() == [
        0.6810295132137468,
        0.21051215062791906,
        0.6049583426419679,
    ]


@given(user=USERS, shares=st.tuples(SHARES, SHARES), salt=st.text(min_size=1))
def test_raising_the_share_moves_users_to_treatment_only(user, shares, salt):
    low, high = sorted(shares)
    if Routing(salt=salt, treatment_share=low).bucket(user) == TREATMENT:
        assert Routing(salt=salt, treatment_share=high).bucket(user) == TREATMENT


@given(user=USERS, salt=st.text(min_size=1))
def test_nobody_is_treated_at_share_0_and_everybody_at_1(user, salt):
    assert Routing(salt=salt, treatment_share=0).bucket(user) == CONTROL
    assert Routing(salt=salt, treatment_share=1).bucket(user) == TREATMENT
    assert 0 <= Routing(salt=salt, treatment_share=0).place(user) < 1


def test_numpy_ids_are_the_users_that_python_ids_are():
    routing = Routing(salt="spring", treatment_share=0.5)
    assert routing.place(np.int64(1371)) == routing.place(1371)


def test_users_are_spread_evenly():
    counts = np.histogram(places("spring", range(50_000)), bins=50, range=(0, 1))[0]
    assert chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_is_kept(share):
    treated = (places("spring", range(50_000)) < share).mean()
    assert treated == pytest.approx(share, abs=4 * (share * (1 - share) / 50_000) ** 0.5)


def test_another_salt_deals_the_users_anew():
    users = range(20_000)
    first, second = places("spring", users), places("spring2", users)
    assert abs(pearsonr(first, second).statistic) < 4 / 20_000**0.5
    # A salt that ends in digits is not the salt before them with another user.
    assert places("a1", [1])[0] != places("a", [11])[0]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_must_be_a_share(share):
    with pytest.raises(BadInputError, match=r"share must be in \[0, 1\]"):
        Routing(salt="spring", treatment_share=share)


def test_a_salt_is_needed():
    with pytest.raises(BadInputError, match="salt must not be empty"):
        Routing(salt="", treatment_share=0.5)
