import numpy as np
import pytest
import torch
from tiny_dashclip import tiny_catalog, tiny_model, tiny_tokenizer

from embeddings.alignment import Alignment
from embeddings.catalog import read_catalog
from embeddings.config import AlignmentConfig, DashClipTraining, PretrainingConfig
from embeddings.corpus import Corpus
from embeddings.freezing import FrozenDepth, freeze
from embeddings.pretraining import Pretraining
from embeddings.relevance import read_relevance
from embeddings.sampling import SamplingConfig, TupleSampler
from embeddings.starts import Start

BLIP_LIKE = {"pooling": "cls", "grounded_token_id": 5}  # 3 text layers, 2 over patches
BERT_LIKE = {"cross_attention_start": 2, "trunk": "efficientnet-lite0"}


def frozen_layers(model):
    """Return for each tower which layers train nothing, and whether the embeddings do."""

    def of(embeddings, layers):
        still = [not any(p.requires_grad for p in layer.parameters()) for layer in layers]
        return still, not any(p.requires_grad for p in embeddings.parameters())

    towers = [of(t.embeddings, t.encoder.layer) for t in (model.text_encoder, model.query_encoder)]
    if model.vision_model is not None:
        towers.append(of(model.vision_model.embeddings, model.vision_model.encoder.layers))
    return towers


def first(count, of):
    return [layer < count for layer in range(of)], count > 0


@pytest.mark.parametrize(
    ("share", "count", "image"), [(0, 0, 0), (1 / 3, 1, 1), (2 / 3, 2, 1), (1, 3, 2)]
)
def test_layers_of_a_model_like_blip(share, count, image):
    model = tiny_model(**BLIP_LIKE)
    depth = freeze(model, share, "stage 2")
    assert depth == FrozenDepth(title=count, query=count, image=image)
    assert frozen_layers(model) == [first(count, 3), first(count, 3), first(image, 2)]


@pytest.mark.parametrize(("share", "count"), [(0, 0), (1 / 3, 1), (2 / 3, 2), (1, 3)])
def test_layers_of_a_model_like_bert(share, count):
    """New layers over the trunk are trained, and new cross-attention, which is in layer 2."""
    model = tiny_model(**BERT_LIKE)
    depth = freeze(model, share, "stage 2")
    assert depth == FrozenDepth(title=min(count, 2), query=count, image=0)
    text, query, image = frozen_layers(model)
    assert text == ([count > 0, count > 1, False], count > 0)
    assert query == first(count, 3)
    assert image == first(0, 2)
    last = model.text_encoder.encoder.layer[2]
    trained = {n.split(".")[0] for n, p in last.named_parameters() if p.requires_grad}
    everything = {"attention", "crossattention", "intermediate", "output"}
    assert trained == ({"crossattention"} if count == 3 else everything)
    trunk = model.vision_model.embeddings.trunk
    assert not any(p.requires_grad for p in trunk.parameters())
    assert model.vision_model.embeddings.project.weight.requires_grad


def test_twelve_layers_freeze_eight():
    depth = freeze(tiny_model(images=False, layers=12), 2 / 3, "stage 2")
    assert depth == FrozenDepth(title=8, query=8, image=0)


def test_a_stage_leaves_alone_what_its_loss_does_not_see():
    model = tiny_model()
    freeze(model, 0, "stage 1")
    still = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {"query_encoder", "query_proj", "product_proj"}
    freeze(model, 0, "stage 2")
    still = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {"text_proj", "vision_proj", "itm_head", "log_temperature"}


# --- where gradients arrive


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return tiny_catalog(folder, products=18, without_image=(1, 8), without_title=(2, 8))


def stage_of(name, model, share, data, tmp_path):
    """Return a stage and its first batch of 8 examples."""
    depth = freeze(model, share, name)
    catalog = read_catalog(data)
    start = Start(model=model, tokenizer=tiny_tokenizer())
    corpus = Corpus(catalog, start, DashClipTraining(), tmp_path, False)
    products = corpus.products(model, depth)
    if name == "stage 1":
        train, held_out = corpus.pairs(0)
        config = PretrainingConfig(batch=8, queue=8)
        stage = Pretraining(model, config, products, train, held_out, seed=0)
    else:
        relevance = read_relevance(data, catalog)
        sampler = TupleSampler(
            relevance, catalog.aisles(), SamplingConfig(positives=3, negatives=3), seed=0
        )
        queries = corpus.queries(model, depth, relevance.queries)
        stage = Alignment(model, AlignmentConfig(batch=8), products, queries, sampler)
    return stage, next(iter(stage.batches(0, 8)))


@pytest.mark.parametrize("kind", [BLIP_LIKE, BERT_LIKE], ids=["blip", "bert"])
@pytest.mark.parametrize("share", [0, 2 / 3, 1])
@pytest.mark.parametrize("name", ["stage 1", "stage 2"])
def test_the_gradient_reaches_exactly_what_is_trained(name, share, kind, data, tmp_path):
    model = tiny_model(**kind)
    stage, batch = stage_of(name, model, share, data, tmp_path)
    if name == "stage 2":  # products with and without an image, so that all parts are called for
        batch = (np.arange(8), *batch[1:])
    loss, figures = stage.loss(batch, epoch=1.0, seed=0)
    assert figures["loss"] == pytest.approx(loss.item())
    loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {n for n, p in model.named_parameters() if p.requires_grad}
    # A bias of the keys shifts all of a softmax's inputs alike, which changes nothing.
    lost = {n for n in reached if not n.endswith("key.bias")} - {
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9
    }
    assert not lost
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_batch_of_nothing_to_contrast_trains_on(data, tmp_path):
    """Without an image, without a title, with neither: stage 1 has no pair among them."""
    model = tiny_model(**BLIP_LIKE)
    stage, _ = stage_of("stage 1", model, 2 / 3, data, tmp_path)
    loss, figures = stage.loss((np.array([1, 2, 8]),), epoch=1.0, seed=0)
    loss.backward()
    assert loss.item() == figures["loss"] == 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_products_that_lack_something_are_aligned(data, tmp_path):
    model = tiny_model(**BLIP_LIKE)
    stage, (_, *queries) = stage_of("stage 2", model, 2 / 3, data, tmp_path)
    products = np.array([1, 2, 8, 1, 2, 8, 8, 8])
    loss, _ = stage.loss((products, *queries), epoch=0.0, seed=0)
    loss.backward()
    assert loss.item() > 0
    for name in ("product_proj.weight", "text_encoder.encoder.layer.2.output.dense.weight"):
        gradient = model.get_parameter(name).grad
        assert bool(gradient.isfinite().all())
        assert gradient.abs().max() > 0
    assert torch.isfinite(loss)
