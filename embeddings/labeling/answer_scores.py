"""How likely a causal language model answers questions with given answers.

All questions begin with the same tokens, the prefix. It is read once: its keys and values are kept
over batches, or, where gradients are wanted, it is read once a batch. The questions of a batch and
their answers stand one behind the other in one sequence, each token seeing only what it would see
in a chat of its own::

    tokens      prefix    question 1  answer a  answer b   question 2  answer a  answer b
    sees        prefix    prefix      prefix    prefix     prefix      prefix    prefix
                                      question 1           ....
    positions   0 .. P-1  P ..        both go on behind    P ..
                                      question 1

Nothing is padded, and a question is read once for all its answers. `score_apart` gives the same
numbers the plain way, a sequence for each answer.

Legend: ``P`` tokens of the prefix, ``S`` of the sequence, ``A`` answers to all questions together,
``K`` tokens whose successor is of interest, ``V`` vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Tokens = Sequence[int]

_APART_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Packed:
    """Questions and answers in one sequence behind the prefix.

    Attributes:
        ids: [P + S] tokens.
        position: [P + S] of each token in its chat.
        pair: [P + S] number of the question that a token is of, -1 in the prefix.
        branch: [P + S] number of the answer that a token is of, -1 outside answers.
        source: [n] where in the sequence the model tells of an answer's token.
        target: [n] the token.
        owner: [n] number of its answer, from 0 to A - 1.
    """

    ids: list[int]
    position: list[int]
    pair: list[int]
    branch: list[int]
    source: list[int]
    target: list[int]
    owner: list[int]


def can_pack(model: Any, longest: int) -> bool:
    """Return whether a model's tokens see exactly what a mask lets them see.

    That is so where all layers are attention over all tokens, with positions that can be given:
    not with recurrent layers, positions within the attention (ALiBi), or a window that is shorter
    than a chat.

    Args:
        model: of transformers.
        longest: tokens of the longest chat.
    """
    parameters = inspect.signature(model.forward).parameters
    if not {"position_ids", "logits_to_keep", "past_key_values"} <= parameters.keys():
        return False
    if getattr(model.config, "alibi", False):
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest)
        for layer in layers
    )


def read_prefix(model: Any, prefix: Tokens) -> Cache:
    """Return the keys and values of the prefix, for `score_packed`; for no gradient."""
    ids = torch.tensor([prefix], device=model.device)
    # Made without the model's configuration, so that it keeps all tokens.
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def score_packed(
    model: Any,
    prefix: Tokens,
    questions: Sequence[Tokens],
    answers: Sequence[Sequence[Tokens]],
    cache: Cache | None = None,
) -> Tensor:
    """Return the log probability of each answer to its question, [A] float32.

    Args:
        model: one that `can_pack`.
        prefix: what comes before every question.
        questions: not empty, each at least a token.
        answers: to each question, any number, each at least a token; with the end of the turn.
        cache: of `read_prefix`; the same again afterwards.
    """
    packed = _pack(prefix, questions, answers)
    first = len(prefix) if cache is not None else 0
    device = model.device
    keep, row = np.unique(packed.source, return_inverse=True)
    logits_kv = model(
        input_ids=torch.tensor([packed.ids[first:]], device=device),
        position_ids=torch.tensor([packed.position[first:]], device=device),
        attention_mask=_mask(packed, first, model),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=torch.from_numpy(keep - first).to(device),
    ).logits[0]
    if cache is not None:
        cache.crop(first - len(packed.ids))
    row_n, target_n, owner_n = (
        torch.as_tensor(values, device=device) for values in (row, packed.target, packed.owner)
    )
    logits_kv = logits_kv.float()
    said_n = logits_kv[row_n, target_n] - logits_kv.logsumexp(1)[row_n]
    count = sum(map(len, answers))
    return torch.zeros(count, device=device).index_add(0, owner_n, said_n)


def score_apart(
    model: Any,
    prefix: Tokens,
    questions: Sequence[Tokens],
    answers: Sequence[Sequence[Tokens]],
) -> Tensor:
    """Return the same as `score_packed` for any causal model: [A] float32.

    Each answer has a sequence of its own; those of the same length make a batch, so that nothing
    is padded.
    """
    chats, wanted = [], []
    for question, choices in zip(questions, answers, strict=True):
        for answer in choices:
            chats.append([*prefix, *question, *answer[:-1]])
            wanted.append(answer)
    told = {}  # where a model can be told so, it computes no logits but those of interest
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        told["logits_to_keep"] = max(map(len, wanted))
    scores: list[Tensor | None] = [None] * len(chats)
    for rows in _of_one_length([len(chat) for chat in chats]):
        ids = torch.tensor([chats[row] for row in rows], device=model.device)
        logits_ntv = model(input_ids=ids, use_cache=False, **told).logits
        said_ntv = logits_ntv.float().log_softmax(2)
        for number, row in enumerate(rows):
            target = torch.tensor(wanted[row], device=model.device)
            last_tv = said_ntv[number, -len(target) :]
            scores[row] = last_tv.gather(1, target[:, None]).sum()
    return torch.stack([score for score in scores if score is not None])


def parts(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Yield slices of consecutive texts with at most ``budget`` tokens, or one text."""
    first, total = 0, 0
    for number, length in enumerate(lengths):
        if number > first and total + length > budget:
            yield slice(first, number)
            first, total = number, 0
        total += length
    if first < len(lengths):
        yield slice(first, len(lengths))


def _pack(
    prefix: Tokens, questions: Sequence[Tokens], answers: Sequence[Sequence[Tokens]]
) -> _Packed:
    packed = _Packed(
        ids=list(prefix),
        position=list(range(len(prefix))),
        pair=[-1] * len(prefix),
        branch=[-1] * len(prefix),
        source=[],
        target=[],
        owner=[],
    )

    def put(tokens: Tokens, position: int, pair: int, branch: int) -> None:
        packed.ids.extend(tokens)
        packed.position.extend(range(position, position + len(tokens)))
        packed.pair.extend([pair] * len(tokens))
        packed.branch.extend([branch] * len(tokens))

    answer = 0
    for pair, (question, choices) in enumerate(zip(questions, answers, strict=True)):
        put(question, len(prefix), pair, -1)
        last = len(packed.ids) - 1
        for tokens in choices:
            packed.source.extend([last, *range(len(packed.ids), len(packed.ids) + len(tokens) - 1)])
            packed.target.extend(tokens)
            packed.owner.extend([answer] * len(tokens))
            # Its last token is told of, and tells of nothing.
            put(tokens[:-1], len(prefix) + len(question), pair, answer)
            answer += 1
    return packed


def _mask(packed: _Packed, first: int, model: Any) -> Tensor:
    """Return what is added to the attention of tokens from ``first`` on: [1, 1, S, P + S]."""
    device = model.device
    pair, branch = (torch.tensor(v, device=device) for v in (packed.pair, packed.branch))
    order = torch.arange(len(pair), device=device)
    seen = (pair == -1) | (pair == pair[first:, None])
    seen &= (branch == -1) | (branch == branch[first:, None])
    seen &= order <= order[first:, None]
    dtype = model.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, lowest)
    return mask[None, None]


def _of_one_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the rows of each batch: texts of one length, and not too many."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(length, []).append(row)
    for length, rows in by_length.items():
        size = max(1, _APART_TOKENS // length)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
