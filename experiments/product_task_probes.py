"""Small classifiers on frozen embeddings: aisles and relevance grades (the paper's Section 5).

Every embedding meets the same splits and starts of the classifier, one of each a seed, so that
differences between embeddings are paired.

Legend: ``N`` rows, ``F`` features, ``K`` classes, ``S`` seeds.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from embeddings.relevance import IRRELEVANT

TEST_EVERY = 5  # 80-20, as in the paper
VALIDATION_EVERY = 10  # of the training rows, to stop by


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """A classifier: hidden layer with ReLU (or none), dropout, linear.

    The paper names the layers and nothing else; these values are the same for every embedding and
    were not searched.

    Attributes:
        hidden: width of the hidden layer; ``None`` for none.
        dropout: share of the inputs of the last layer that are dropped in training.
        learning_rate: of AdamW.
        batch_size: rows a step.
        epochs: the most passes over the training rows.
        patience: epochs without a lower validation loss before training stops.
    """

    hidden: int | None = None
    dropout: float = 0.1
    learning_rate: float = 1e-3
    batch_size: int = 256
    epochs: int = 200
    patience: int = 10


AISLE_PROBE = ProbeConfig(hidden=256)
RELEVANCE_PROBE = ProbeConfig()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Positions of rows: to learn from, to stop by, and to score. They share none."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Runs:
    """What one embedding reached with each seed.

    Attributes:
        macro_f1: [S] mean over the classes of the test part.
        recall: [S, K]; NaN for a class without a test row.
    """

    macro_f1: np.ndarray
    recall: np.ndarray

    def mean_recall(self, classes: np.ndarray) -> np.ndarray:
        """Return [S] the mean recall over ``classes``, a mask of shape [K]."""
        return np.nanmean(self.recall[:, classes], axis=1)


def aisle_split(classes: np.ndarray, seed: int) -> Split:
    """Split products 80-20 within each aisle; a tenth of the training part is for stopping.

    An aisle of n products has n / 5 test products, rounded up or down; 5 or more have one.

    Args:
        classes: [N] the aisle of each product.
        seed: another one, another split.
    """
    rng = np.random.default_rng(seed)
    training, test = _stratified(np.arange(len(classes)), classes, TEST_EVERY, rng)
    train, validation = _stratified(training, classes, VALIDATION_EVERY, rng)
    return Split(train=train, validation=validation, test=test)


def relevance_split(query: np.ndarray, label: np.ndarray, seed: int) -> Split:
    """Split pairs 80-20 so that no query is in two parts, and drop half of IR in training.

    Args:
        query: [N] the query of each pair.
        label: [N] 0 IR, 1 MR, 2 HR.
        seed: another one, another split.
    """
    from sklearn.model_selection import GroupShuffleSplit

    # NOTE[DIFF]: the paper splits pairs, so that its test queries may be seen in training, and
    # drops half of the IR pairs before that, in the test part too. Here queries are split, and the
    # test part keeps the labels as they come.
    def split(rows: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
        groups = GroupShuffleSplit(1, test_size=1 / every, random_state=seed)
        kept, taken = next(groups.split(rows, groups=query[rows]))
        return rows[kept], rows[taken]

    training, test = split(np.arange(len(query)), TEST_EVERY)
    irrelevant = np.flatnonzero(label[training] == IRRELEVANT)
    dropped = np.random.default_rng(seed).permutation(irrelevant)[: len(irrelevant) // 2]
    train, validation = split(np.delete(training, dropped), VALIDATION_EVERY)
    return Split(train=train, validation=validation, test=test)


def concatenated(query: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Return [N, 2 D]: the vectors of query and product side by side, as in the paper."""
    return np.concatenate([query, product], axis=1)


def with_product_and_cosine(query: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Return [N, 3 D + 1]: `concatenated`, the elementwise product and the cosine.

    Beyond the paper: a linear layer on the concatenation is a sum of what it makes of the query
    and of the product, and cannot see how close the two are.
    """
    cosine = cosines(query, product)[:, None]
    return np.concatenate([query, product, query * product, cosine], axis=1)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return [N] float32 cosines of the rows of two [N, D] arrays; 0 where a row is zero."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("nd,nd->n", a, b)
    return (dots / np.where(norms > 0, norms, 1)).astype(np.float32)


def probe(
    features: np.ndarray,
    labels: np.ndarray,
    splits: Sequence[Split],
    *,
    classes: int,
    config: ProbeConfig,
) -> Runs:
    """Train and score a classifier on each split; the position of the split is its seed.

    Args:
        features: [N, F].
        labels: [N] int64 in ``[0, classes)``.
        splits: [S].
        classes: ``K``.
        config: of the classifier.
    """
    f1 = np.empty(len(splits))
    recall = np.empty((len(splits), classes))
    for seed, split in enumerate(splits):
        predicted = fit_predict(features, labels, split, classes=classes, config=config, seed=seed)
        f1[seed], recall[seed] = scores(labels[split.test], predicted, classes)
    return Runs(macro_f1=f1, recall=recall)


def majority(labels: np.ndarray, splits: Sequence[Split], *, classes: int) -> Runs:
    """Score the answer that is always the most frequent class of the training part."""
    runs = []
    for split in splits:
        most = np.bincount(labels[split.train]).argmax()
        runs.append(scores(labels[split.test], np.full(len(split.test), most), classes))
    return Runs(macro_f1=np.array([f1 for f1, _ in runs]), recall=np.stack([r for _, r in runs]))


def scores(labels: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[float, np.ndarray]:
    """Return the macro F1 over the classes among ``labels``, and the [K] recalls.

    F1 of a class is 2 TP / (2 TP + FP + FN); its recall TP / (TP + FN), NaN without a row of it.
    """
    from sklearn.metrics import f1_score, recall_score

    found = np.unique(labels)
    recall = np.full(classes, np.nan)
    recall[found] = recall_score(labels, predicted, labels=found, average=None, zero_division=0)
    f1 = f1_score(labels, predicted, labels=found, average="macro", zero_division=0)
    return float(f1), recall


def fit_predict(
    features: np.ndarray,
    labels: np.ndarray,
    split: Split,
    *,
    classes: int,
    config: ProbeConfig,
    seed: int,
) -> np.ndarray:
    """Train on ``split.train``, stop by ``split.validation``, return the classes of the test rows.

    Features are standardised by the training rows, so that embeddings of any scale meet the same
    learning rate. The state of torch's random generator is left as it was.

    Returns:
        int64, one for each of ``split.test``.
    """
    fit = features[split.train]
    spread = fit.std(axis=0)
    scaled = (features - fit.mean(axis=0)) / np.where(spread > 1e-6, spread, 1)
    x, y = torch.from_numpy(scaled.astype(np.float32)), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _classifier(x.shape[1], classes, config)
        _train(model, x, y, split, config)
    with torch.inference_mode():
        return model.eval()(x[split.test]).argmax(1).numpy()


def low_support(counts: np.ndarray) -> np.ndarray:
    """Return a [K] mask: the classes with fewer rows than the median class has."""
    return counts < np.median(counts)


def summary(values: np.ndarray) -> dict[str, Any]:
    """Return mean, standard deviation (``None`` of one value) and the values by seed."""
    deviation = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "std": deviation, "values": values.tolist()}


def _stratified(
    rows: np.ndarray, classes: np.ndarray, every: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``rows`` but one in ``every``, and those, taken evenly from the shuffled classes.

    scikit-learn's splits refuse fewer taken rows than there are classes.
    """
    rows = rng.permutation(rows)
    rows = rows[np.argsort(classes[rows], kind="stable")]
    taken = np.arange(len(rows)) % every == rng.integers(every)
    return rows[~taken], rows[taken]


def _classifier(features: int, classes: int, config: ProbeConfig) -> nn.Sequential:
    if config.hidden is None:
        return nn.Sequential(nn.Dropout(config.dropout), nn.Linear(features, classes))
    return nn.Sequential(
        nn.Linear(features, config.hidden),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden, classes),
    )


def _train(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, split: Split, config: ProbeConfig
) -> None:
    """Train ``model`` and leave it at its lowest validation loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    train, validation = torch.from_numpy(split.train), torch.from_numpy(split.validation)
    best, best_state, since = math.inf, copy.deepcopy(model.state_dict()), 0
    for _ in range(config.epochs):
        model.train()
        for rows in train[torch.randperm(len(train))].split(config.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.inference_mode():
            loss = nn.functional.cross_entropy(model.eval()(x[validation]), y[validation]).item()
        since += 1
        if loss < best:
            best, best_state, since = loss, copy.deepcopy(model.state_dict()), 0
        if since == config.patience:
            break
    model.load_state_dict(best_state)
