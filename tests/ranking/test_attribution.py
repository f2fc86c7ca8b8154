"""Importance of groups of features: against permutations by hand, and with known answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from tiny_ranker import tiny_batch, tiny_ranker

from features.batch import RequestBatch
from features.errors import BadInputError
from ranking.attribution_gradients import Explainer
from ranking.attribution_groups import (
    PRODUCT_EMBEDDING,
    PURCHASE_HISTORY,
    QUERY_EMBEDDING,
    feature_groups,
    feature_levels,
)
from ranking.attribution_inputs import SampleInputs
from ranking.attribution_metrics import metrics_by_user, with_interval
from ranking.attribution_permutation import permutation_importance
from ranking.metrics import base_rate_entropy
from ranking.ranker import Ranker

LENGTHS = [3, 1, 4, 2, 5, 3, 2, 6, 4, 3]
HISTORY = [4, 0, 2, 7, 1, 0, 3, 2, 5, 1]


def renamed(ranker: Ranker) -> Ranker:
    """Give the candidate features names of their own: in the tiny ranker both levels share them."""
    ranker.candidate_transforms.sparse = ("c", "d")
    ranker.candidate_transforms.dense = ("u", "v")
    return ranker


def sample_of(ranker: Ranker, batch: RequestBatch) -> SampleInputs:
    return SampleInputs(ranker, ranker.encode(batch))


def batch_of(seed: int = 0) -> RequestBatch:
    return tiny_batch(LENGTHS, HISTORY, seed=seed)


def users(batch: RequestBatch) -> np.ndarray:
    """Two requests a user."""
    return np.repeat(np.arange(len(LENGTHS)) // 2, batch.lengths.numpy())


def importances(ranker, batch, wanted=(), permutations=2, seed=0):
    sample = sample_of(ranker, batch)
    groups = feature_groups(list(sample.levels), wanted)
    found = permutation_importance(
        sample,
        groups,
        batch.clicked.numpy() > 0,
        users(batch),
        permutations=permutations,
        seed=seed,
    )
    return {group.name: value for group, value in zip(groups, found, strict=True)}


def explained(ranker, batch, wanted=()):
    """Return the names of the groups, Integrated Gradients and Feature Ablation of the sample."""
    sample = sample_of(ranker, batch)
    groups = feature_groups(list(sample.levels), wanted)
    explainer, rows = Explainer(sample, groups), torch.arange(sample.candidates)
    names = [group.name for group in groups]
    return names, explainer.integrated_gradients(sample, rows), explainer.ablation(sample, rows)


def silence(ranker: Ranker, *but: str) -> Ranker:
    """Make the trained tables and dense values of all features but some tell nothing."""
    levels = (
        (ranker.request_embeddings, ranker.request_transforms),
        (ranker.candidate_embeddings, ranker.candidate_transforms),
    )
    with torch.no_grad():
        for tables, transforms in levels:
            features = (*transforms.sparse, *transforms.dense)
            for name, weight in zip(features, tables.state_dict().values(), strict=True):
                if name not in but:
                    weight.zero_()
            for place, name in enumerate(transforms.dense):
                if name not in but:
                    transforms.std[place] = torch.inf
    return ranker


def metrics_of(ranker: Ranker, batch: RequestBatch) -> tuple[float, float]:
    clicked, probability = batch.clicked.numpy() > 0, ranker.score(batch).numpy()
    loss = log_loss(clicked, probability.astype(np.float64))
    return roc_auc_score(clicked, probability), loss / base_rate_entropy(clicked.mean())


def orders(seed: int, repetition: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the permutations of requests and of candidates, as documented by their seeds."""
    return tuple(
        torch.from_numpy(np.random.default_rng([seed, repetition, level]).permutation(number))
        for level, number in enumerate((len(LENGTHS), sum(LENGTHS)))
    )


def moved_history(batch: RequestBatch, order: torch.Tensor) -> RequestBatch:
    places = torch.cat([batch.history_lengths.new_zeros(1), batch.history_lengths.cumsum(0)])
    lists = [torch.arange(places[i], places[i + 1]) for i in order]
    return replace(
        batch,
        history=batch.history[torch.cat(lists)],
        history_age=batch.history_age[torch.cat(lists)],
        history_lengths=batch.history_lengths[order],
    )


@pytest.mark.parametrize("history_counts", [False, True])
def test_permutation_is_what_a_permutation_by_hand_gives(history_counts):
    ranker, batch = renamed(tiny_ranker(history_counts=history_counts)), batch_of()
    found = importances(ranker, batch, permutations=2, seed=7)

    def by_hand(request, candidate) -> dict[str, RequestBatch]:
        sparse, dense = batch.request_sparse.clone(), batch.request_dense.clone()
        sparse[1], dense[0] = sparse[1, request], dense[0, request]
        own, values = batch.candidate_sparse.clone(), batch.candidate_dense.clone()
        own[0], values[1] = own[0, candidate], values[1, candidate]
        return {
            "b": replace(batch, request_sparse=sparse),
            "x": replace(batch, request_dense=dense),
            "c": replace(batch, candidate_sparse=own),
            "v": replace(batch, candidate_dense=values),
            QUERY_EMBEDDING: replace(batch, query=batch.query[request]),
            PRODUCT_EMBEDDING: replace(batch, product=batch.product[candidate]),
            PURCHASE_HISTORY: moved_history(batch, request),
        }

    auc, loss = metrics_of(ranker, batch)
    draws = [by_hand(*orders(7, repetition)) for repetition in range(2)]
    for name in draws[0]:
        moved = [metrics_of(ranker, draw[name]) for draw in draws]
        assert found[name].auc_loss == pytest.approx(auc - np.mean([m[0] for m in moved]), abs=1e-6)
        rise = np.mean([m[1] for m in moved]) - loss
        assert found[name].log_loss_rise == pytest.approx(rise, abs=1e-5)


def test_the_members_of_a_group_move_together():
    ranker, batch = renamed(tiny_ranker()), batch_of()
    found = importances(ranker, batch, [f"all=a,{QUERY_EMBEDDING},d"], seed=3)
    auc, _ = metrics_of(ranker, batch)
    moved = []
    for repetition in range(2):
        request, candidate = orders(3, repetition)
        sparse, own = batch.request_sparse.clone(), batch.candidate_sparse.clone()
        sparse[0], own[1] = sparse[0, request], own[1, candidate]
        query = batch.query[request]
        draw = replace(batch, request_sparse=sparse, query=query, candidate_sparse=own)
        moved.append(metrics_of(ranker, draw)[0])
    assert found["all"].auc_loss == pytest.approx(auc - np.mean(moved), abs=1e-6)
    assert set(found) == {"all", "b", "x", "y", "c", "u", "v", PRODUCT_EMBEDDING, PURCHASE_HISTORY}


def test_an_ignored_feature_counts_for_nothing():
    ranker, batch = renamed(tiny_ranker()), batch_of()
    everything = list(feature_levels(ranker))
    silence(ranker, *(name for name in everything if name not in ("a", "u")))
    found = importances(ranker, batch)
    names, gradients, ablated = explained(ranker, batch)
    for name in ("a", "u"):
        assert found[name].auc_loss == 0
        assert found[name].log_loss_rise == 0
        assert found[name].auc_loss_interval == (0, 0)
        assert gradients.importance()[names.index(name)] == 0
        assert ablated.importance()[names.index(name)] == 0
    assert found["b"].log_loss_rise != 0


@pytest.mark.parametrize("only", ["b", "x", "c", "v"])
def test_the_only_feature_that_is_read_comes_first_by_every_method(only):
    ranker, batch = silence(renamed(tiny_ranker(embedding_tower=False)), only), batch_of()
    # The labels are what the ranker thinks, so that every permutation costs.
    batch = replace(batch, clicked=(ranker.score(batch) > ranker.score(batch).mean()).float())
    found = importances(ranker, batch)
    names, gradients, ablated = explained(ranker, batch)
    place = names.index(only)
    assert max(found, key=lambda name: found[name].auc_loss) == only
    assert max(found, key=lambda name: found[name].log_loss_rise) == only
    for contributions in (gradients, ablated):
        assert contributions.importance().argmax() == place
        assert np.delete(contributions.importance(), place) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("history_counts", [False, True])
def test_candidates_of_a_request_share_the_history_that_it_is_given(history_counts):
    ranker, batch = renamed(tiny_ranker(history_counts=history_counts)), batch_of()
    sample = sample_of(ranker, batch)
    order = torch.tensor([1, 0, *range(2, len(LENGTHS))])
    moved, before = sample.logits({PURCHASE_HISTORY: order}), sample.logits()
    changed = (moved != before).numpy()
    assert changed[:4].all()  # the three candidates of request 0 and the one of request 1
    assert not changed[4:].any()
    expected = ranker(ranker.encode(moved_history(batch, order))).detach()
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"history_counts": True},
        {"purchase_history": False},
        {"embedding_tower": False},
        {"tables": "random"},
        {"cross_rank": 0},
    ],
)
def test_integrated_gradients_are_complete_up_to_the_steps_of_the_integral(model, monkeypatch):
    ranker, batch = renamed(tiny_ranker(**model)), batch_of()
    # Only what has an embedding: the cosine with a vector of zeros is a jump that no path shows.
    known = {"query": 500, "product": 100, "history": 100}
    batch = replace(
        batch,
        history_lengths=batch.history_lengths.clamp(min=1),
        **{name: first + (getattr(batch, name) - first) % 20 for name, first in known.items()},
    )
    more = int(batch.history_lengths.sum()) - len(batch.history)
    batch = replace(
        batch,
        history=torch.cat([batch.history, torch.full((more,), 105)]),
        history_age=torch.cat([batch.history_age, batch.history_age[:more]]),
    )
    missed = []
    for steps in (32, 512):
        monkeypatch.setattr("ranking.attribution_gradients._STEPS", steps)
        _, gradients, _ = explained(ranker, batch)
        expected = ranker(ranker.encode(batch)).detach().numpy()
        np.testing.assert_allclose(gradients.log_odds, expected, atol=1e-5)
        change = expected - gradients.baseline
        share = np.abs(gradients.of_group.sum(axis=1) - change).mean() / np.abs(change).mean()
        assert gradients.incompleteness() == pytest.approx(share, rel=1e-3, abs=1e-6)
        missed.append(share)
    assert missed[0] < 0.05
    assert missed[1] < 0.005


def test_contributions_of_a_linear_ranker_are_its_terms():
    ranker, batch = silence(renamed(tiny_ranker(embedding_tower=False)), "u", "v"), batch_of()
    values = sample_of(ranker, batch).inputs["candidate"][:, -2:]

    class Linear(torch.nn.Module):
        def dense(self, inputs, _request_c):
            nothing = sum(0 * tensor.sum() for tensor in inputs.values())
            return inputs["candidate"][:, -2:] @ torch.tensor([2.0, -3.0]) + 1 + nothing

    sample = sample_of(ranker, batch)
    sample.ranker = Linear()  # type: ignore[assignment]
    groups = feature_groups(list(sample.levels))
    explainer, rows = Explainer(sample, groups), torch.tensor([4, 0, 9])
    names = [group.name for group in groups]
    terms = ((values - values.mean(0)) * torch.tensor([2.0, -3.0]))[rows].numpy()
    for found in (explainer.integrated_gradients(sample, rows), explainer.ablation(sample, rows)):
        places = [names.index("u"), names.index("v")]
        np.testing.assert_allclose(found.of_group[:, places], terms, atol=1e-5)
        assert np.delete(found.of_group, places, axis=1) == pytest.approx(0)


def test_the_seed_decides_the_permutations():
    ranker, batch = renamed(tiny_ranker()), batch_of()
    torch.manual_seed(1)
    first = importances(ranker, batch, seed=5)
    torch.manual_seed(2)
    assert importances(ranker, batch, seed=5) == first
    assert importances(ranker, batch, seed=6) != first


def test_metrics_and_influences():
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=400).round(1).astype(np.float32))  # with ties
    clicked = random.random(400) < torch.sigmoid(2 * logits - 1).numpy()
    probability = torch.sigmoid(logits.double()).numpy()
    found = metrics_by_user(logits, clicked, np.arange(400), 400)
    loss = log_loss(clicked, probability) / base_rate_entropy(clicked.mean())
    np.testing.assert_allclose(found[:, 0], [roc_auc_score(clicked, probability), loss])
    np.testing.assert_allclose(found[:, 1:].sum(axis=1), 0, atol=1e-12)
    # DeLong's variance of the AUC, up to its divisors P - 1 and N - 1.
    positives, negatives = clicked.sum(), (~clicked).sum()
    influence = found[0, 1:]
    delong = (influence[clicked] ** 2).sum() * positives / (positives - 1)
    delong += (influence[~clicked] ** 2).sum() * negatives / (negatives - 1)
    assert (influence**2).sum() == pytest.approx(delong, rel=0.02)
    # Dropping a user changes the metric by about the influence with the sign turned.
    user = random.integers(0, 40, 400)
    by_user = metrics_by_user(logits, clicked, user, 40)[:, 1:]
    for gone in (0, 7):
        rest = user != gone
        without = metrics_by_user(logits[torch.from_numpy(rest)], clicked[rest], user[rest], 40)
        np.testing.assert_allclose(without[:, 0] - found[:, 0], -by_user[:, gone], atol=4e-4)


def test_the_interval_has_the_spread_of_users_and_of_permutations():
    # Two permutations that lose 1 and 3: variance 2, of the mean 1. Two users with mean
    # influences 2 and -2: variance (4 + 4) * 2 / 1 = 16.
    value, (low, high) = with_interval(np.array([[1.0, 2.0, -2.0], [3.0, 2.0, -2.0]]))
    assert value == 2
    assert high - value == pytest.approx(1.959964 * 17**0.5)
    assert value - low == pytest.approx(high - value)


def test_groups_that_cannot_be():
    features = ["a", "b", "c"]
    for wanted, message in (
        (["both=a,d"], "group 'both': unknown feature 'd'; known: a, b, c"),
        (["one=a,b", "two=b,c"], "group 'two': 'b' is in group 'one' already"),
        (["c=a,b"], "group 'c': there are two of that name"),
        (["a,b"], "write it as NAME=FEATURE,FEATURE"),
        (["=a"], "write it as NAME=FEATURE,FEATURE"),
    ):
        with pytest.raises(BadInputError, match=message):
            feature_groups(features, wanted)
    found = feature_groups(features, ["both = c , a"])
    assert [(group.name, group.members) for group in found] == [
        ("both", ("c", "a")),
        ("b", ("b",)),
    ]
