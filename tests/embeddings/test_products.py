from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_dashclip import COLOURS, picture, tiny_catalog, tiny_model, tiny_tokenizer

from embeddings.catalog import read_catalog
from embeddings.config import DashClipTraining
from embeddings.corpus import Corpus
from embeddings.dashclip_encoder import DashClipEncoder
from embeddings.freezing import freeze
from embeddings.losses import product_query_contrast
from embeddings.starts import Start

NO_IMAGE, NO_TITLE, BROKEN = (1, 5), (2, 5), (4,)  # 5 has neither
MIXED = torch.tensor([2, 7, 1, 0, 5, 4, 9, 2, 6])
KINDS = [
    {},
    {"pooling": "cls", "grounded_token_id": 5},
    {"cross_attention_start": 2},
    {"cross_attention_start": 2, "trunk": "efficientnet-lite0"},
    {"images": False},
]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return read_catalog(
        tiny_catalog(
            folder, products=10, without_image=NO_IMAGE, without_title=NO_TITLE, broken=BROKEN
        )
    )


def corpus_of(catalog, model, work, **changes):
    config = replace(DashClipTraining(), max_broken_images=0.5, **changes)
    return Corpus(catalog, Start(model=model, tokenizer=tiny_tokenizer()), config, work, False)


def products_of(catalog, model, work, share=2 / 3, **changes):
    depth = freeze(model, share, "stage 2")
    return corpus_of(catalog, model, work, **changes).products(model, depth)


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0, 2 / 3, 1])
@torch.no_grad()
def test_a_mixed_batch_equals_each_alone(catalog, tmp_path, kind, cache_gib, share):
    model = tiny_model(**kind)
    products = products_of(catalog, model, tmp_path, share, cache_gib=cache_gib)
    together = products.embed(model, MIXED)
    alone = torch.cat([products.embed(model, row[None]) for row in MIXED])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(9))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_training_sees_what_the_encoder_gives(catalog, tmp_path, kind):
    model = tiny_model(**kind)
    products = products_of(catalog, model, tmp_path, cache_gib=0.0)
    titles = catalog.titles.fill_null("").to_pylist()
    images = [picture(list(COLOURS)[row % 6], row) for row in range(10)]
    for row in (*NO_IMAGE, *BROKEN):
        images[row] = None
    encoder = DashClipEncoder.of(model, tiny_tokenizer(), "tiny", precision="float32")
    wanted = encoder.encode_products([titles[row] for row in MIXED], [images[row] for row in MIXED])
    found = products.embed(model, MIXED).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_image_and_title_both_matter(catalog, tmp_path):
    model = tiny_model()
    products = products_of(catalog, model, tmp_path)
    # 0 and 6 differ in thing and photo, 2 has the photo of 8 but for the noise, and no title.
    near = products.embed(model, torch.tensor([0, 6, 2, 8]))
    assert (near[0] @ near[1]).item() < 0.999
    assert (near[2] @ near[3]).item() < 0.999


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [NO_IMAGE, NO_TITLE, (5, 5)])
def test_a_batch_of_products_that_lack_something_trains(catalog, tmp_path, kind, rows):
    model = tiny_model(**kind)
    products = products_of(catalog, model, tmp_path)
    queries = torch.nn.functional.normalize(torch.ones(3, 16) + torch.eye(3, 16), dim=1)
    cosine = products.embed(model, torch.tensor(rows)) @ queries.t()
    loss = product_query_contrast(cosine, torch.tensor([0, 1]), torch.tensor([[2], [2]]), 0.05)
    loss.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert model.product_proj.weight.grad.abs().max() > 0
    if rows == (5, 5) and model.vision_model is not None:
        assert all(p.grad is None for p in model.vision_model.parameters())


@torch.no_grad()
def test_a_missing_title_is_the_empty_text(catalog, tmp_path):
    model = tiny_model()
    products = products_of(catalog, model, tmp_path)
    ids, mask = products.titles.ids(torch.tensor([len(products.titles.lengths) - 1]))
    assert ids.tolist() == [[2, 3]]  # [CLS] [SEP]
    states = model.run_text(model.embed_text(ids), mask)
    wanted = model.product_embedding(model.pool(states, mask))
    torch.testing.assert_close(products.embed(model, torch.tensor([5])), wanted, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_another_model_runs_all_that_is_not_frozen(catalog, tmp_path, kind):
    other = tiny_model(**kind, seed=1)
    wanted = products_of(catalog, other, tmp_path, 0).embed(other, MIXED)
    found = products_of(catalog, tiny_model(**kind), tmp_path, 0).embed(other, MIXED)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
