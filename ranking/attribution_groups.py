"""What importance is told for: features, and groups of features that are moved together.

One embedding is one feature, whatever its dimension. A dense feature is its scaled value and its
bin's embedding together. The purchase history is everything that is computed from it: the mean
pool, the cosines with it and whatever else the ranker reads of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from features.errors import BadInputError
from features.schema import Level
from features.transforms import LevelTransforms
from ranking.ranker import Ranker

QUERY_EMBEDDING = "query embedding"
PRODUCT_EMBEDDING = "product embedding"
PURCHASE_HISTORY = "purchase history"
EMBEDDINGS = (QUERY_EMBEDDING, PRODUCT_EMBEDDING, PURCHASE_HISTORY)

_OWNERS = {"query": QUERY_EMBEDDING, "product": PRODUCT_EMBEDDING}


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureGroup:
    """Features that are permuted, ablated and attributed to together."""

    name: str
    members: tuple[str, ...]


def feature_levels(ranker: Ranker) -> dict[str, Level]:
    """Return every feature that the ranker reads, and whether a request or a candidate has it."""
    levels: dict[str, Level] = {}
    request, candidate = ranker.request_transforms, ranker.candidate_transforms
    levels |= dict.fromkeys((*request.sparse, *request.dense), "request")
    levels |= dict.fromkeys((*candidate.sparse, *candidate.dense), "candidate")
    if ranker.pretrained is not None:
        levels |= {QUERY_EMBEDDING: "request", PRODUCT_EMBEDDING: "candidate"}
        if ranker.config.purchase_history:
            levels[PURCHASE_HISTORY] = "request"
    return levels


def feature_groups(features: Sequence[str], wanted: Sequence[str] = ()) -> tuple[FeatureGroup, ...]:
    """Return the groups that together hold each feature once.

    Args:
        features: the ranker's.
        wanted: groups as ``name=feature,feature``; every other feature is a group of its own.

    Raises:
        BadInputError: a group is not written so, names an unknown feature, or shares one with
            another group, or its name is taken.
    """
    made = [_parse(text, features) for text in wanted]
    taken: dict[str, str] = {}
    for group in made:
        for member in group.members:
            if member in taken:
                raise BadInputError(
                    f"group '{group.name}': '{member}' is in group '{taken[member]}' already"
                )
            taken[member] = group.name
    single = [FeatureGroup(name=f, members=(f,)) for f in features if f not in taken]
    names = [group.name for group in (*made, *single)]
    for name in names:
        if names.count(name) > 1:
            raise BadInputError(f"group '{name}': there are two of that name; choose another name")
    return (*made, *single)


def _parse(text: str, features: Sequence[str]) -> FeatureGroup:
    name, equals, listed = (part.strip() for part in text.partition("="))
    members = tuple(member.strip() for member in listed.split(",") if member.strip())
    if not (name and equals and members):
        raise BadInputError(f"group '{text}': write it as NAME=FEATURE,FEATURE")
    for member in members:
        if member not in features:
            known = ", ".join(features)
            raise BadInputError(f"group '{name}': unknown feature '{member}'; known: {known}")
    return FeatureGroup(name=name, members=members)


def input_owners(ranker: Ranker, inputs: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return which feature each column of each input of `Ranker.dense` belongs to."""
    owners = {
        "request": _level_owners(ranker, ranker.request_transforms),
        "candidate": _level_owners(ranker, ranker.candidate_transforms),
    }
    for name, tensor in inputs.items():
        if name not in owners:
            owners[name] = [_OWNERS.get(name, PURCHASE_HISTORY)] * tensor.shape[1]
        assert len(owners[name]) == tensor.shape[1], name
    return owners


def _level_owners(ranker: Ranker, transforms: LevelTransforms) -> list[str]:
    """Return the owners of the columns: tables in their order, then the scaled dense values."""
    embedded = [*transforms.sparse, *transforms.dense][: len(transforms.tables)]
    dim = ranker.config.embedding_dim
    return [name for name in embedded for _ in range(dim)] + list(transforms.dense)
