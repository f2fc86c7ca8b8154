"""Pretrained tables in the model, by numbers worked out by hand."""

import numpy as np
import pytest
import torch

from ranking.pretrained_embeddings import (
    DataType,
    EmbeddingBagConfig,
    KeyedJaggedTensor,
    PoolingType,
    PretrainedEmbeddingBagCollection,
    PretrainedTable,
)

PRODUCT_IDS = np.array([30, -5, 1 << 40])
PRODUCTS = np.array([[1, 2, 3, 4], [3, 6, -3, 0], [0.5, 0, 0, 8]], np.float32)
QUERY_IDS = np.array([7, 8])
QUERIES = np.array([[1, 0, 0, 0, 0, 0, 0, 1], [0, 0, 2, 0, 2, 0, 0, 0]], np.float32)
TRAINED = ["fine-tuned", "random"]
MODES = ["frozen", *TRAINED]


def content(dtype=np.float32):
    return {
        "product": PretrainedTable(ids=PRODUCT_IDS, weight=PRODUCTS.astype(dtype)),
        "query": PretrainedTable(ids=QUERY_IDS, weight=QUERIES.astype(dtype)),
    }


def configs(product_rows=4, product_dim=4, dtype=DataType.FP32):
    return [
        EmbeddingBagConfig(
            name="product",
            num_embeddings=product_rows,
            embedding_dim=product_dim,
            feature_names=["product", "purchase_history"],
            pooling=PoolingType.MEAN,
            data_type=dtype,
        ),
        EmbeddingBagConfig(
            name="query",
            num_embeddings=3,
            embedding_dim=8,
            feature_names=["query"],
            pooling=PoolingType.MEAN,
            data_type=dtype,
        ),
    ]


def collection(mode="frozen", rate=0.1):
    return PretrainedEmbeddingBagCollection(configs(), content(), mode, rate)


def bags(**features):
    """Return a jagged tensor of lists of bags of raw ids by feature."""
    values = [raw for lists in features.values() for bag in lists for raw in bag]
    lengths = [len(bag) for lists in features.values() for bag in lists]
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(features),
        values=torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
    )


def table_rows(tables, name):
    return tables.embedding_bags[name].weight.detach().clone()


def test_mean_pooling_by_hand():
    pooled = collection()(bags(purchase_history=[[30, -5], [], [30, 30, -5, 1 << 40], [-5]]))
    assert pooled["purchase_history"].tolist() == [
        [2, 4, 0, 2],
        [0, 0, 0, 0],
        [5.5 / 4, 10 / 4, 3 / 4, 16 / 4],
        [3, 6, -3, 0],
    ]


def test_product_and_history_share_a_table():
    tables = collection()
    assert list(tables.embedding_bags) == ["product", "query"]
    pooled = tables(bags(product=[[30], [-5]], purchase_history=[[30], [-5]]))
    torch.testing.assert_close(pooled["product"], pooled["purchase_history"], rtol=0, atol=0)
    assert tables.rows("product", torch.tensor([-5])).tolist() == [2]
    assert tables.rows("purchase_history", torch.tensor([-5, 31])).tolist() == [2, 0]


def test_features_come_in_the_order_asked_with_their_dimensions():
    pooled = collection()(bags(query=[[8], [9]], purchase_history=[[30], []]))
    assert pooled.keys() == ["query", "purchase_history"]
    assert pooled.length_per_key() == [8, 4]
    assert pooled.values().tolist() == [[*QUERIES[1], 1, 2, 3, 4], [0.0] * 12]


@pytest.mark.parametrize("mode", MODES)
def test_unknown_ids_and_empty_bags_are_zero_vectors(mode):
    pooled = collection(mode)(bags(product=[[31], [], [0], [-(1 << 63)]]))
    assert pooled.values().tolist() == [[0.0] * 4] * 4


@pytest.mark.parametrize("mode", ["frozen", "fine-tuned"])
def test_the_mean_counts_unknown_ids(mode):
    pooled = collection(mode)(bags(purchase_history=[[30, 31, 32, 33], [-5, 31]]))
    assert pooled.values().tolist() == [[0.25, 0.5, 0.75, 1], [1.5, 3, -1.5, 0]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grad", [True, False])
def test_empty_bags_only_and_no_bags_at_all(mode, grad):
    tables = collection(mode)
    with torch.set_grad_enabled(grad):
        pooled = tables(bags(purchase_history=[[], []], query=[[], []]))
        assert pooled.values().tolist() == [[0.0] * 12] * 2
        assert tables(bags(purchase_history=[], query=[])).values().shape == (0, 12)


@pytest.mark.parametrize(
    ("dtype", "data_type", "torch_type"),
    [
        (np.float16, DataType.FP16, torch.float16),
        (np.float32, DataType.FP32, torch.float32),
    ],
)
def test_frozen_tables_keep_their_precision(dtype, data_type, torch_type):
    tables = PretrainedEmbeddingBagCollection(configs(dtype=data_type), content(dtype))
    weight = tables.embedding_bags["product"].weight
    assert weight.dtype == torch_type
    assert weight.tolist() == [[0] * 4, *PRODUCTS.tolist()]
    pooled = tables(bags(product=[[30], [31]], purchase_history=[[30, -5], []]))
    assert pooled.values().dtype == torch.float32
    assert pooled["purchase_history"].tolist() == [[2, 4, 0, 2], [0, 0, 0, 0]]


def test_half_precision_means_are_close_to_those_of_float32():
    random = np.random.default_rng(0)
    weight = random.normal(size=(3, 4)).astype(np.float16)
    asked = bags(purchase_history=[[30, -5, 1 << 40] * 50])
    pooled = []
    for dtype, data_type in ((np.float16, DataType.FP16), (np.float32, DataType.FP32)):
        tables = content(dtype) | {
            "product": PretrainedTable(ids=PRODUCT_IDS, weight=weight.astype(dtype))
        }
        pooled.append(PretrainedEmbeddingBagCollection(configs(dtype=data_type), tables)(asked))
    torch.testing.assert_close(pooled[0].values(), pooled[1].values(), atol=2e-3, rtol=2e-3)


def test_frozen_tables_are_no_parameters_and_get_no_gradient():
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    tables = collection()
    assert isinstance(tables, EmbeddingBagCollection)
    assert list(tables.parameters()) == []
    before = table_rows(tables, "product")
    pooled = tables(bags(product=[[30]])).values()
    assert not pooled.requires_grad
    scale = torch.ones(1, requires_grad=True)
    (pooled * scale).sum().backward()
    assert scale.grad is not None
    assert not tables.embedding_bags["product"].weight.requires_grad
    torch.testing.assert_close(table_rows(tables, "product"), before, rtol=0, atol=0)


def test_fine_tuned_tables_start_from_the_pretrained_values():
    tables = collection("fine-tuned")
    assert table_rows(tables, "product").tolist() == [[0] * 4, *PRODUCTS.tolist()]
    assert table_rows(tables, "query").tolist() == [[0] * 8, *QUERIES.tolist()]


def test_random_tables_have_the_pretrained_size_but_not_the_values():
    random = np.random.default_rng(0)
    ids = np.arange(2000)
    weight = random.normal(0, 3, (2000, 4)).astype(np.float32)
    tables = PretrainedEmbeddingBagCollection(
        [configs(product_rows=2001)[0]],
        {"product": PretrainedTable(ids=ids, weight=weight)},
        "random",
    )
    rows = table_rows(tables, "product")
    assert rows[0].tolist() == [0] * 4
    assert rows[1:].std().item() == pytest.approx(3, rel=0.05)
    assert np.corrcoef(rows[1:].flatten(), weight.flatten())[0, 1] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("mode", TRAINED)
def test_a_step_changes_the_rows_read_and_no_other(mode):
    tables = collection(mode)
    product, query = table_rows(tables, "product"), table_rows(tables, "query")
    tables(
        bags(product=[[30], [31]], purchase_history=[[30, 31, 31], []])
    ).values().sum().backward()
    after = table_rows(tables, "product")
    assert (after[1] != product[1]).all()
    assert after[[0, 2, 3]].equal(product[[0, 2, 3]])  # the unknown id 31 is row 0
    assert table_rows(tables, "query").equal(query)


def test_a_step_of_row_wise_adagrad_by_hand():
    """The gradient of a row is summed over its reads; Adagrad then has one scale for the row."""
    tables = collection("fine-tuned", rate=0.1)
    weights = torch.tensor([1.0, 2, 3, 4])
    pooled = tables(bags(purchase_history=[[30, 30, 31, -5], [30]])).values()
    (pooled * weights).sum().backward()
    after = table_rows(tables, "product")
    for row, share in ((1, 2 / 4 + 1), (2, 1 / 4)):
        gradient = share * weights
        step = 0.1 * gradient / gradient.square().mean().sqrt()
        torch.testing.assert_close(after[row], torch.from_numpy(PRODUCTS[row - 1]) - step)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "dim"), [(5, 4), (3, 4), (4, 8)])
def test_content_of_another_shape_is_refused(mode, rows, dim):
    with pytest.raises(ValueError, match=rf"'product' is configured as \({rows - 1}, {dim}\), got"):
        PretrainedEmbeddingBagCollection(
            configs(product_rows=rows, product_dim=dim), content(), mode
        )


def test_ids_given_twice_are_refused():
    twice = PretrainedTable(ids=np.array([4, 4, 9]), weight=PRODUCTS)
    with pytest.raises(ValueError, match="got 4 twice"):
        PretrainedEmbeddingBagCollection([configs()[0]], {"product": twice})
