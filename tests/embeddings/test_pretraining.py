"""Stage 1 against plain arithmetic on what the saved model's encoder says of the same products."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_dashclip import picture, tiny_catalog, tiny_start, tiny_tokenizer

from embeddings.catalog import read_catalog
from embeddings.config import DashClipTraining, PretrainingConfig
from embeddings.corpus import Corpus
from embeddings.dashclip_encoder import DashClipEncoder
from embeddings.freezing import freeze
from embeddings.images import decode_image
from embeddings.pretraining import Pretraining

PRODUCTS = 18
NO_IMAGE, NO_TITLE = (1, 5), (2,)
CONFIG = PretrainingConfig(batch=4, queue=8, alpha=0.4, alpha_epochs=2.0)
PLAIN = replace(CONFIG, momentum=0.0, matching=False)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1")
    tiny_catalog(folder, products=PRODUCTS, without_image=NO_IMAGE, without_title=NO_TITLE)
    return read_catalog(folder)


@pytest.fixture
def made(catalog, tmp_path):
    """Returns the stage, and what its model says of products: images [N, D] and titles [N, D]."""

    def make(config=CONFIG, held_out=0.0, frozen=0.5, **shape):
        start = tiny_start(**shape)
        depth = freeze(start.model, frozen, Pretraining.name)
        corpus = Corpus(catalog, start, DashClipTraining(cache_gib=0), tmp_path / "work", False)
        products = corpus.products(start.model, depth)
        train, out = corpus.pairs(held_out)
        return Pretraining(start.model, config, products, train, out, seed=0)

    return make


def encoder(model):
    return DashClipEncoder.of(model, tiny_tokenizer(), "tiny", precision="float32")


def views(stage, catalog, rows):
    said = encoder(stage.model)
    images = [image for _, _, blobs in catalog.with_images() for image in blobs]
    images = said.encode_images([decode_image(images[row]) for row in rows])
    return images, said.encode_titles([catalog.titles[row].as_py() for row in rows])


def loss_of(stage, rows, *, epoch=0.0, seed=0):
    return stage.loss((np.array(rows),), epoch=epoch, seed=seed)


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def plain_contrast(one, other, keys, titles, key_titles, alpha, temperature):
    """Return the mean over rows of ``one`` of its cross-entropy among ``keys``, in loops."""
    losses = []
    for vector, slow, title in zip(one, other, titles, strict=True):
        same = np.array([title == key for key in key_titles], float)
        target = alpha * softmax(keys @ slow / temperature) + (1 - alpha) * same / same.sum()
        losses.append(-(target * np.log(softmax(keys @ vector / temperature))).sum())
    return np.mean(losses)


ROWS = [0, 3, 4, 7, 12]  # "red shirt new" and so on, all different


@pytest.mark.parametrize(("epoch", "alpha"), [(0.0, 0.0), (1.0, 0.2), (2.0, 0.4), (9.0, 0.4)])
def test_contrast_with_soft_labels(made, catalog, epoch, alpha):
    stage = made(replace(CONFIG, matching=False))
    image, title = views(stage, catalog, ROWS)
    names = [catalog.titles[row].as_py() for row in ROWS]
    expected = [
        plain_contrast(image, image, title, names, names, alpha, 0.07),
        plain_contrast(title, title, image, names, names, alpha, 0.07),
    ]
    loss, figures = loss_of(stage, ROWS, epoch=epoch)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert figures == {"loss": loss.item(), "itc": loss.item()}


def test_earlier_batches_are_negatives_as_the_slow_encoders_saw_them(made, catalog):
    stage = made(replace(CONFIG, matching=False, momentum=0.5))
    before = [*views(stage, catalog, [0, 3, 4])]
    loss_of(stage, [0, 3, 4])
    with torch.no_grad():
        stage.model.text_proj.weight.mul_(-1).add_(0.3)
    after = [*views(stage, catalog, [7, 12])]
    names = [catalog.titles[row].as_py() for row in (7, 12, 0, 3, 4)]
    slow = np.concatenate(
        [views_of_slow(stage, catalog, [7, 12]), [before[1][i] for i in range(3)]]
    )
    expected = [
        plain_contrast(after[0], after[0], slow, names[:2], names, 0.0, 0.07),
        plain_contrast(
            after[1], after[1], np.concatenate([after[0], before[0]]), names[:2], names, 0.0, 0.07
        ),
    ]
    loss, _ = loss_of(stage, [7, 12])
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)


def views_of_slow(stage, catalog, rows):
    return encoder(stage._slow.model).encode_titles([catalog.titles[row].as_py() for row in rows])


@pytest.mark.parametrize("frozen", [0.0, 0.5])
def test_the_slow_encoders_look_through_their_own_patches(made, catalog, frozen):
    stage = made(replace(CONFIG, matching=False), frozen=frozen)
    slow = views(stage, catalog, ROWS)
    with torch.no_grad():
        for name, parameter in stage.model.named_parameters():
            if parameter.requires_grad and name.startswith("vision_model"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    image, title = views(stage, catalog, ROWS)
    assert np.abs(image - slow[0]).max() > 0.01
    names = [catalog.titles[row].as_py() for row in ROWS]
    expected = [
        plain_contrast(image, slow[0], slow[1], names, names, 0.2, 0.07),
        plain_contrast(title, slow[1], slow[0], names, names, 0.2, 0.07),
    ]
    loss, _ = loss_of(stage, ROWS, epoch=1.0)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_without_momentum_the_batch_is_all_there_is(made, catalog):
    stage = made(PLAIN)
    image, title = views(stage, catalog, ROWS)
    names = [catalog.titles[row].as_py() for row in ROWS]
    expected = [
        plain_contrast(image, image, title, names, names, 0.0, 0.07),
        plain_contrast(title, title, image, names, names, 0.0, 0.07),
    ]
    for epoch in (0.0, 5.0):  # and no batch is remembered
        assert loss_of(stage, ROWS, epoch=epoch)[0].item() == pytest.approx(
            np.mean(expected), rel=1e-4
        )
    stage.after_step()
    assert stage.state() == {}


def test_matching_tells_pairs_from_exchanged_ones(made, catalog):
    stage = made(replace(CONFIG, momentum=0.0))
    rows = [0, 3]  # the other one is the only negative, whatever is drawn
    said, model = encoder(stage.model), stage.model
    found = []
    for title, image, target in [(0, 0, 1), (3, 3, 1), (0, 3, 0), (3, 0, 0), (0, 3, 0), (3, 0, 0)]:
        ids = torch.tensor(said._tokens([catalog.titles[title].as_py()]))
        mask = torch.ones_like(ids, dtype=torch.bool)
        colour = catalog.titles[image].as_py().split()[0]
        tokens = said._image_tokens([picture(colour, image)])
        with torch.no_grad():
            states = model.run_text(model.embed_text(ids), mask, image_tokens=tokens)
            logits = model.match_logits(model.pool(states, mask))
        found.append(-logits.log_softmax(1)[0, target].item())
    _, figures = loss_of(stage, rows)
    assert figures["itm"] == pytest.approx(np.mean(found), rel=1e-4)
    assert figures["loss"] == pytest.approx(figures["itc"] + figures["itm"], rel=1e-6)


def test_draws_follow_the_seed(made):
    losses = [
        loss_of(made(replace(CONFIG, momentum=0.0)), ROWS, seed=seed)[1] for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1]
    assert losses[0]["itm"] != losses[2]["itm"]
    assert losses[0]["itc"] == losses[2]["itc"]


# --- products without image or title


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, momentum=0.0)])
def test_products_that_lack_something_take_no_part(made, config):
    whole, part = made(config), made(config)
    with_lacking, figures = loss_of(whole, [1, *ROWS[:2], 2, *ROWS[2:], 5], epoch=1.0)
    alone, expected = loss_of(part, ROWS, epoch=1.0)
    assert with_lacking.item() == alone.item()
    assert figures == expected
    with_lacking.backward()
    alone.backward()
    for one, other in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or one.grad.equal(other.grad)


def test_a_batch_of_nothing_else_has_no_loss_and_moves_nothing(made):
    stage = made()
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    trained = [p for p in stage.model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
    loss, figures = loss_of(stage, [1, 2, 5])
    assert (loss.item(), figures) == (0.0, {"loss": 0.0})
    loss.backward()
    adam.step()
    stage.after_step()
    for name, tensor in stage.model.state_dict().items():
        assert tensor.equal(before[name]), name
    assert not stage.state()["queue/position"].any()


def test_a_title_in_two_products_is_nobodys_negative(tmp_path, catalog):
    table = pq.read_table(catalog.path).slice(0, 1)
    twice = pa.concat_tables([table, table.set_column(0, "product_id", pa.array([7]))])
    pq.write_table(twice, tmp_path / "catalog.parquet")
    start = tiny_start()
    depth = freeze(start.model, 0.5, Pretraining.name)
    corpus = Corpus(read_catalog(tmp_path), start, DashClipTraining(), tmp_path / "work", False)
    products = corpus.products(start.model, depth)
    stage = Pretraining(
        start.model, replace(CONFIG, momentum=0.0), products, *corpus.pairs(0.0), seed=0
    )
    _, figures = loss_of(stage, [0, 1])
    assert figures["itc"] == pytest.approx(math.log(2), rel=1e-5)  # both of two share the target
    # The two right pairs are all that is matched: 2 of the 6 terms that the mean is over.
    said = encoder(start.model)
    vectors = [decode_image(table["image"][0].as_py())] * 2
    ids = torch.tensor(said._tokens([table["title"][0].as_py()] * 2))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        states = start.model.run_text(
            start.model.embed_text(ids), mask, image_tokens=said._image_tokens(vectors)
        )
        logits = start.model.match_logits(start.model.pool(states, mask))
    assert figures["itm"] == pytest.approx(-logits.log_softmax(1)[0, 1].item() / 3, rel=1e-4)


# --- what follows a step, and what an epoch is made of


def test_momentum_copies_move_and_the_temperature_stays_within_bounds(made):
    stage = made()
    slow = {name: tensor.clone() for name, tensor in stage.state().items()}
    with torch.no_grad():
        for parameter in stage.model.parameters():
            parameter.add_(1.0)
        stage.model.log_temperature.fill_(5.0)
    stage.after_step()
    moved = stage.state()["momentum/text_proj.weight"] - slow["momentum/text_proj.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.005), rtol=1e-3, atol=1e-6)
    assert stage.model.log_temperature.exp().item() == pytest.approx(0.5)
    assert "momentum/text_encoder.embeddings.word_embeddings.weight" not in slow
    with torch.no_grad():
        stage.model.log_temperature.fill_(-50.0)
    stage.after_step()
    assert stage.model.log_temperature.exp().item() == pytest.approx(0.001)


def test_an_epoch_takes_each_pair_once_in_an_order_of_its_own(made):
    stage = made()
    usable = sorted(set(range(PRODUCTS)) - {*NO_IMAGE, *NO_TITLE})
    epochs = [[batch[0].tolist() for batch in stage.batches(epoch, 5)] for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert [len(batch) for batch in epochs[0]] == [5, 5, 5]
    assert sorted(sum(epochs[0], [])) == usable  # noqa: RUF017
    assert stage.examples == 15


@torch.no_grad()
def test_evaluation_is_on_titles_that_are_not_trained_on(made, catalog):
    stage = made(held_out=0.4)
    titles = catalog.titles.to_pylist()
    train, out = ({titles[row] for row in rows} for rows in (stage._train, stage._held_out))
    assert not train & out
    assert len(train) + len(out) == 15
    assert 2 <= len(out) <= 10
    figures = stage.evaluate()
    assert figures == stage.evaluate()
    assert figures["score"] == figures["itm_loss"] > 0
    assert figures["image_to_title_recall_at_10"] == 1  # at most ten to choose among
    assert made().evaluate() == {}
