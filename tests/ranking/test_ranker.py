"""The request-level ranker against a plain one that computes every candidate alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ranker import changed, pretrained_tables, take_requests, tiny_batch, tiny_ranker

LENGTHS = [3, 1, 0, 5, 1, 2]
HISTORIES = [2, 0, 1, 7, 3, 0]
SHAPES = {
    "two-tower": {},
    "full rank": {"cross_rank": 0, "cross_layers": 3},
    "one layer": {"cross_layers": 1, "deep": (5,), "tower_deep": (3,), "head": ()},
    "no history": {"purchase_history": False},
    "history counts": {"history_counts": True},
    "fine-tuned": {"tables": "fine-tuned"},
    "random": {"tables": "random"},
    "dcn": {"embedding_tower": False},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
close = {"rtol": 1e-5, "atol": 1e-5}


# The plain reference: weights by name, one row a candidate, formulas as in the papers.


def cross_tower(x, weights, prefix):
    """DCN-V2, equations 1 and 2, beside a deep network; both outputs concatenated."""
    cross = {n: w for n, w in weights.items() if n.startswith(f"{prefix}cross.")}
    deep = [w for n, w in weights.items() if n.startswith(prefix) and n not in cross]
    left = [w for n, w in cross.items() if "W_kernels" in n or ".kernels" in n]
    right = [w for n, w in cross.items() if "V_kernels" in n] or [torch.eye(x.shape[1])] * len(left)
    bias = [w.reshape(-1) for n, w in cross.items() if "bias" in n]
    crossed = x
    for w, v, b in zip(left, right, bias, strict=True):
        crossed = x * (crossed @ v.T @ w.T + b) + crossed
    hidden = x
    for w, b in zip(deep[::2], deep[1::2], strict=True):
        hidden = torch.relu(hidden @ w.T + b)
    return torch.cat([crossed, hidden], dim=1)


def level_features(transforms, sparse, dense, weights, prefix):
    rows, scaled = transforms(sparse, dense)
    embedded = [
        weights[f"{prefix}.embedding_bags.{name}.weight"][rows[i]]
        for i, name in enumerate(transforms.tables)
    ]
    return [*embedded, scaled]


def lookup(table, known, asked):
    """Return one vector an id, zero where it is unknown."""
    rows = {raw: row for row, raw in enumerate(known.tolist())}
    zero = torch.zeros(table.shape[1])
    vectors = [table[rows[raw]] if raw in rows else zero for raw in asked]
    return torch.stack(vectors) if vectors else torch.zeros(0, table.shape[1])


def cosine(a, b):
    norms = a.norm(dim=1) * b.norm(dim=1)
    safe = torch.where(norms > 0, norms, 1)
    return torch.where(norms > 0, (a * b).sum(dim=1) / safe, 0)


def history_counts(config, batch, tables):
    """Count each candidate's like in the history of its request, one pair after the other."""
    known = pretrained_tables()["product"].ids
    shown = lookup(tables["product"], known, batch.product.tolist())
    bought = lookup(tables["product"], known, batch.history.tolist())
    counts = []
    request_c = torch.repeat_interleave(batch.lengths).tolist()
    of_request = torch.repeat_interleave(batch.history_lengths)
    for vector, product, request in zip(shown, batch.product, request_c, strict=True):
        own = (of_request == request) & torch.isin(batch.history, torch.from_numpy(known))
        like = cosine(vector.expand_as(bought[own]), bought[own])
        age = batch.history_age[own]
        for beta in config.count_sharpness:
            for days in config.count_windows:
                total = torch.exp(beta * (like[age < days] - 1)).sum() * (int(product) in known)
                counts.append(total.log1p())
    width = len(config.count_sharpness) * len(config.count_windows)
    return torch.stack(counts).detach().view(-1, width) if counts else torch.zeros(0, width)


def embedding_tower(ranker, batch, weights, tables, request_c):
    known = pretrained_tables()
    product = lookup(tables["product"], known["product"].ids, batch.product.tolist())
    query = lookup(tables["query"], known["query"].ids, batch.query[request_c].tolist())
    projected = {
        name.split(".")[2]: weight
        for name, weight in weights.items()
        if name.startswith("embedding_tower.project.")
    }
    context = {"query": query}
    if ranker.config.purchase_history:
        means = []
        bags = batch.history.split(batch.history_lengths.tolist())
        for request in request_c.tolist():  # its own copy of the history for each candidate
            bag = bags[request].tolist()
            found = lookup(tables["product"], known["product"].ids, bag)
            means.append(found.sum(dim=0) / len(bag) if bag else torch.zeros(product.shape[1]))
        context["history"] = torch.stack(means)
    inputs = [product @ projected["product"].T]
    inputs += [cosine(product, vectors)[:, None] for vectors in context.values()]
    inputs += [vectors @ projected[name].T for name, vectors in context.items()]
    return cross_tower(torch.cat(inputs, dim=1), weights, "embedding_tower.tower.")


def reference_logits(ranker, batch, weights, tables):
    request_c = torch.repeat_interleave(batch.lengths)
    x = [
        *level_features(
            ranker.candidate_transforms,
            batch.candidate_sparse,
            batch.candidate_dense,
            weights,
            "candidate_embeddings",
        ),
        *([history_counts(ranker.config, batch, tables)] if ranker.config.counts_history else []),
        *level_features(
            ranker.request_transforms,
            batch.request_sparse[:, request_c],
            batch.request_dense[:, request_c],
            weights,
            "request_embeddings",
        ),
    ]
    towers = [cross_tower(torch.cat(x, dim=1), weights, "dcn_tower.")]
    if ranker.config.embedding_tower:
        towers.append(embedding_tower(ranker, batch, weights, tables, request_c))
    hidden = torch.cat(towers, dim=1)
    head = [w for n, w in weights.items() if n.startswith(("joint.", "head."))]
    *inner, (last, last_bias) = zip(head[::2], head[1::2], strict=True)
    for w, b in inner:
        hidden = torch.relu(hidden @ w.T + b)
    return (hidden @ last.T + last_bias)[:, 0]


def copies(ranker):
    """Return weights and pretrained tables of a ranker as leaves of their own."""
    weights = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in ranker.trained_state().items()
        if not name.startswith("pretrained")
    }
    tables = {}
    if ranker.config.embedding_tower:
        tables = {
            name: ranker.pretrained.embedding_bags[name]
            .weight[1:]
            .detach()
            .clone()
            .requires_grad_()
            for name in ("product", "query")
        }
    return weights, tables


def log_loss(logits, clicked):
    p = torch.sigmoid(logits)
    return -(clicked * p.log() + (1 - clicked) * (1 - p).log()).mean()


def adagrad_step(rows, gradient, rate):
    """Row-wise Adagrad's first step: every row read moves by ``rate`` along g / rms(g)."""
    size = gradient.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(size > 0, rows - rate * gradient / (size + 1e-8), rows)


@every_shape
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_and_gradients_equal_those_of_the_plain_reference(shape, seed):
    ranker = tiny_ranker(seed=seed, **shape)
    batch = tiny_batch(LENGTHS, HISTORIES, seed=seed)
    weights, tables = copies(ranker)
    expected = reference_logits(ranker, batch, weights, tables)
    logits = ranker(ranker.encode(batch))
    assert logits.shape == (sum(LENGTHS),)
    torch.testing.assert_close(logits, expected, **close)
    torch.testing.assert_close(ranker.score(batch), torch.sigmoid(expected.detach()), **close)

    log_loss(expected, batch.clicked).backward()
    F.binary_cross_entropy_with_logits(logits, batch.clicked).backward()
    gradients = {id(p): p.grad for p in ranker.dense_parameters()}
    named = [(n, p) for n, p in ranker.named_parameters() if id(p) in gradients]
    assert len(named) == len(gradients)
    for name, parameter in named:
        torch.testing.assert_close(parameter.grad, weights[name].grad, **close, msg=name)


@every_shape
def test_one_step_moves_sparse_rows_as_row_wise_adagrad_does(shape):
    ranker = tiny_ranker(**shape)
    batch = tiny_batch(LENGTHS, HISTORIES)
    weights, tables = copies(ranker)
    log_loss(reference_logits(ranker, batch, weights, tables), batch.clicked).backward()
    F.binary_cross_entropy_with_logits(ranker(ranker.encode(batch)), batch.clicked).backward()
    after = ranker.trained_state()
    sparse = [name for name in weights if "_embeddings." in name]
    assert len(sparse) == 8
    for name in sparse:
        expected = adagrad_step(weights[name].detach(), weights[name].grad, rate=0.1)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=2e-5, msg=name)
    if ranker.config.embedding_tower and ranker.config.tables != "frozen":
        row = ranker.pretrained.embedding_bags["query"].weight
        expected = adagrad_step(tables["query"].detach(), tables["query"].grad, rate=0.01)
        torch.testing.assert_close(row[1:], expected, rtol=1e-4, atol=2e-5)
        assert row[0].count_nonzero() == 0


@every_shape
def test_rows_that_are_not_read_stay_bit_for_bit(shape):
    ranker = tiny_ranker(**shape)
    batch = tiny_batch(LENGTHS, HISTORIES)
    encoded = ranker.encode(batch)
    before = {name: tensor.clone() for name, tensor in ranker.trained_state().items()}
    F.binary_cross_entropy_with_logits(ranker(encoded), batch.clicked).backward()
    after = ranker.trained_state()
    read = {}
    for level, rows in (("request", encoded.request_rows), ("candidate", encoded.candidate_rows)):
        transforms = getattr(ranker, f"{level}_transforms")
        for name, of_table in zip(transforms.tables, rows, strict=True):
            read[f"{level}_embeddings.embedding_bags.{name}.weight"] = set(of_table.tolist())
    for name in before:
        if "product" in name and name.startswith("pretrained"):
            read[name] = set(encoded.product.tolist()) | set(encoded.history.tolist())
        if "query" in name and name.startswith("pretrained"):
            read[name] = set(encoded.query.tolist())
    some_unread = 0
    for name, rows in read.items():
        unread = [row for row in range(len(before[name])) if row not in rows]
        some_unread += len(unread)
        assert after[name][unread].equal(before[name][unread]), name
        changed = (after[name] != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) <= rows, name
        assert changed, name
    assert some_unread


def test_empty_histories_give_numbers_and_finite_gradients():
    ranker = tiny_ranker()
    batch = tiny_batch([4, 2], [0, 0])
    weights, tables = copies(ranker)
    logits = ranker(ranker.encode(batch))
    torch.testing.assert_close(logits, reference_logits(ranker, batch, weights, tables), **close)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in ranker.dense_parameters())


@pytest.mark.parametrize("counts", [True, False])
def test_a_history_of_unknown_products_is_as_an_empty_one(counts):
    ranker = tiny_ranker(history_counts=counts)
    batch = tiny_batch([4, 2], [0, 0])
    unknown = changed(
        batch,
        history=torch.tensor([-1, 99_999]),
        history_age=torch.tensor([0, 3], dtype=torch.int16),
        history_lengths=torch.tensor([2, 0]),
    )
    torch.testing.assert_close(ranker.score(unknown), ranker.score(batch), rtol=0, atol=0)


@pytest.mark.parametrize("counts", [True, False])
def test_a_history_is_read_for_its_own_request_alone(counts):
    ranker = tiny_ranker(history_counts=counts)
    batch = tiny_batch([4, 2], [1, 1])
    other = changed(batch, history=torch.tensor([int(batch.history[0]), 105]))
    before, after = ranker.score(batch), ranker.score(other)
    torch.testing.assert_close(before[:4], after[:4], rtol=0, atol=1e-7)
    assert (before[4:] != after[4:]).all()


@every_shape
def test_requests_in_another_order_get_the_same_scores(shape):
    ranker = tiny_ranker(**shape)
    batch = tiny_batch(LENGTHS, HISTORIES)
    order = [3, 2, 0, 5, 4, 1]
    of_requests = ranker.score(batch).split(LENGTHS)
    expected = torch.cat([of_requests[place] for place in order])
    found = ranker.score(take_requests(batch, order))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_ages_are_read_only_where_the_history_is_counted():
    batch = tiny_batch(LENGTHS, HISTORIES)
    older = changed(batch, history_age=batch.history_age + 85)
    plain, counting = tiny_ranker(), tiny_ranker(history_counts=True)
    assert plain.score(older).equal(plain.score(batch))
    assert not counting.score(older).equal(counting.score(batch))


def test_weights_change_no_score():
    batch = tiny_batch(LENGTHS, HISTORIES)
    other = changed(batch, weight=batch.weight * 7)
    ranker = tiny_ranker()
    assert ranker.score(other).equal(ranker.score(batch))


def check_against_reference(shape, lengths, histories):
    ranker = tiny_ranker(**shape)
    batch = tiny_batch(lengths, histories)
    weights, tables = copies(ranker)
    expected = reference_logits(ranker, batch, weights, tables)
    torch.testing.assert_close(ranker(ranker.encode(batch)), expected, **close)


@every_shape
@pytest.mark.parametrize(
    ("lengths", "histories"),
    [([1], [0]), ([1], [3]), ([0, 2], [2, 0]), ([1, 0, 0, 3], [0, 2, 1, 1])],
)
def test_requests_of_one_candidate_and_of_none(shape, lengths, histories):
    check_against_reference(shape, lengths, histories)


@every_shape
def test_no_requests_at_all(shape):
    ranker = tiny_ranker(**shape)
    batch = tiny_batch([], [])
    assert ranker.score(batch).shape == (0,)
    assert ranker(ranker.encode(batch)).shape == (0,)
    assert list(ranker.encode(batch).split(8)) == []


@pytest.mark.parametrize("mode", ["frozen", "random"])
@pytest.mark.parametrize("lengths", [[0, 1], [0, 0, 2, 0]])
def test_more_requests_than_candidates(mode, lengths):
    check_against_reference({"tables": mode}, lengths, [1] * len(lengths))


@pytest.mark.parametrize("mode", ["frozen", "random"])
def test_no_candidates_at_all(mode):
    assert tiny_ranker(tables=mode).score(tiny_batch([0, 0], [2, 0])).shape == (0,)


def test_the_baseline_has_no_tables_and_reads_no_query_and_no_history():
    ranker = tiny_ranker(embedding_tower=False)
    assert ranker.pretrained is None
    parts = {name.partition(".")[0] for name in ranker.state_dict()}
    assert not parts & {"pretrained", "embedding_tower"}
    batch = tiny_batch(LENGTHS, HISTORIES)
    other = changed(
        batch, query=batch.query + 1, product=batch.product + 1, history=batch.history + 1
    )
    torch.testing.assert_close(ranker.score(batch), ranker.score(other), rtol=0, atol=0)


def test_without_history_the_history_is_not_read():
    ranker = tiny_ranker(purchase_history=False)
    batch = tiny_batch(LENGTHS, HISTORIES)
    other = changed(batch, history=batch.history + 1)
    torch.testing.assert_close(ranker.score(batch), ranker.score(other), rtol=0, atol=0)


def test_frozen_tables_are_no_trained_state_and_are_never_changed():
    ranker = tiny_ranker()
    assert not [name for name in ranker.trained_state() if name.startswith("pretrained")]
    batch = tiny_batch(LENGTHS, HISTORIES)
    before = [bag.weight.clone() for bag in ranker.pretrained.embedding_bags.values()]
    ranker(ranker.encode(batch)).sum().backward()
    after = [bag.weight for bag in ranker.pretrained.embedding_bags.values()]
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))
    assert not [name for name, _ in ranker.named_parameters() if name.startswith("pretrained")]


def test_trained_state_is_the_model_itself():
    one, other = tiny_ranker(seed=1), tiny_ranker(seed=2)
    batch = tiny_batch(LENGTHS, HISTORIES)
    assert not one.score(batch).equal(other.score(batch))
    with torch.no_grad():
        for name, tensor in other.trained_state().items():
            tensor.copy_(one.trained_state()[name])
    assert other.score(batch).equal(one.score(batch))


requests = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=60)
@given(requests=requests.filter(lambda r: sum(n for n, _ in r)), batch_rows=st.integers(1, 40))
def test_split_covers_each_candidate_once_and_keeps_requests_whole(requests, batch_rows):
    lengths, histories = map(list, zip(*requests, strict=True))
    batch = tiny_batch(lengths, histories)
    encoded = _RANKER.encode(batch)
    parts = list(encoded.split(batch_rows))
    whole = ("query", "weight", "history", "history_age", "product", "clicked")
    for name in (*whole, "request_dense", "candidate_dense"):
        together = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(together, getattr(encoded, name), rtol=0, atol=0)
    for name in ("request_rows", "candidate_rows"):
        together = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert together.equal(getattr(encoded, name))
    for name, whole in (("candidate_offsets", lengths), ("history_offsets", histories)):
        together = torch.cat([getattr(part, name).diff() for part in parts])
        assert together.tolist() == whole
    rows = [len(part.product) for part in parts]
    number = max(1, round(sum(lengths) / batch_rows))
    assert len(parts) <= number
    assert max(rows) < sum(lengths) / number + max(lengths) + 1


_RANKER = tiny_ranker()


@pytest.mark.parametrize("counts", [True, False])
def test_parts_of_a_batch_score_as_the_whole(counts):
    ranker = tiny_ranker(history_counts=counts)
    encoded = ranker.encode(tiny_batch([4, 6, 1, 5, 3, 8, 2], [3, 0, 2, 1, 9, 0, 4]))
    with torch.no_grad():
        whole = ranker(encoded)
        parts = [ranker(part) for part in encoded.split(7)]
    assert len(parts) == 4
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


def test_requests_without_clicks_can_be_scored_and_split():
    batch = changed(tiny_batch(LENGTHS, HISTORIES), clicked=torch.zeros(0))
    parts = list(_RANKER.encode(batch).split(4))
    assert sum(len(part.product) for part in parts) == sum(LENGTHS)
    assert all(part.clicked.shape == (0,) for part in parts)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_half_precision_tables(dtype):
    ranker = tiny_ranker(dtype=dtype)
    batch = tiny_batch(LENGTHS, HISTORIES)
    weights, tables = copies(ranker)
    tables = {name: table.detach().float() for name, table in tables.items()}
    expected = reference_logits(ranker, batch, weights, tables)
    tolerance = 2e-2 if dtype == "float16" else 1e-5
    torch.testing.assert_close(
        ranker(ranker.encode(batch)), expected, rtol=tolerance, atol=tolerance
    )
