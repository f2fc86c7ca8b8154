import shutil

import numpy as np
import pytest
import torch
from tiny_dashclip import COLOURS, picture, tiny_bert, tiny_dashclip, tiny_model, tiny_tokenizer

from embeddings.dashclip_encoder import DashClipEncoder
from embeddings.images import to_pixels
from embeddings.open_encoder import open_encoder
from features.errors import BadInputError

TITLES = ["red shirt", "", "new new new blue watch", "sock", "old " * 100, "pink bag new", ""]
IMAGES = [picture("red"), picture("blue"), None, None, picture("black"), picture("pink"), None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_dashclip(tmp_path_factory.mktemp("model"), grounded_token_id=5)


@pytest.fixture(scope="module")
def encoder(folder):
    return DashClipEncoder(folder, precision="float32")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def one_by_one(encode, *columns):
    return np.concatenate([encode(*([value] for value in row)) for row in zip(*columns)])  # noqa: B905


def test_a_saved_model_gives_the_very_same_vectors(encoder):
    model = tiny_model(grounded_token_id=5)
    kept = DashClipEncoder.of(model, tiny_tokenizer(), "tiny", precision="float32")
    np.testing.assert_array_equal(
        encoder.encode_products(TITLES, IMAGES), kept.encode_products(TITLES, IMAGES)
    )
    np.testing.assert_array_equal(encoder.encode_queries(TITLES), kept.encode_queries(TITLES))
    assert kept.fingerprint == "tiny"


def test_what_it_says_of_itself(encoder, folder):
    assert (encoder.dim, encoder.normalized, encoder.reads_images) == (16, True, True)
    prefix, digest = encoder.fingerprint.split("-")
    assert prefix == "dashclip"
    assert len(bytes.fromhex(digest)) == 32
    assert isinstance(open_encoder(folder), DashClipEncoder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_fingerprint_changes_with_each_file(copy, encoder, name):
    assert DashClipEncoder(copy).fingerprint == encoder.fingerprint
    if name == "model.safetensors":
        tiny_model(grounded_token_id=5, seed=1).save_pretrained(copy)
    else:
        (copy / name).write_text((copy / name).read_text() + " ")
    assert DashClipEncoder(copy).fingerprint != encoder.fingerprint


@torch.no_grad()
def test_each_kind_of_vector_by_the_model_itself(encoder):
    model, ids = encoder.model, torch.tensor([[2, 6, 12, 3]])  # [CLS] red shirt [SEP]
    mask = torch.ones_like(ids)
    size, mean, std = 32, model.config.image_mean, model.config.image_std
    tokens = model.run_image(model.embed_image(to_pixels([IMAGES[0]], size, mean, std)))

    def pooled(ids, query=False, image_tokens=None):
        states = model.embed_text(ids, query=query)
        states = model.run_text(states, mask, query=query, image_tokens=image_tokens)
        return states.mean(1)

    enc = torch.tensor([[5, 6, 12, 3]])
    for found, wanted in (
        (encoder.encode_titles(["red shirt"]), model.title_embedding(pooled(ids))),
        (encoder.encode_queries(["red shirt"]), model.query_embedding(pooled(ids, query=True))),
        (encoder.encode_products(["red shirt"]), model.product_embedding(pooled(ids))),
        (encoder.encode_images(IMAGES[:1]), model.image_embedding(tokens)),
        (
            encoder.encode_products(["red shirt"], IMAGES[:1]),
            model.product_embedding(pooled(enc, image_tokens=tokens)),
        ),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5)


def test_vectors_do_not_depend_on_their_batch(encoder):
    together = encoder.encode_products(TITLES, IMAGES)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = one_by_one(encoder.encode_products, TITLES, IMAGES)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    for encode in (encoder.encode_queries, encoder.encode_titles):
        np.testing.assert_allclose(encode(TITLES), one_by_one(encode, TITLES), rtol=0, atol=1e-5)
    found = encoder.encode_images(IMAGES)
    np.testing.assert_allclose(found, one_by_one(encoder.encode_images, IMAGES), rtol=0, atol=1e-5)


def test_many_batches_keep_their_order(encoder):
    numbers = np.random.default_rng(0).integers(0, len(TITLES), 150)
    titles, images = [TITLES[n] for n in numbers], [IMAGES[n] for n in numbers]
    found = encoder.encode_products(titles, images)
    wanted = encoder.encode_products(TITLES, IMAGES)[numbers]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found, encoder.encode_products(titles, images))
    photos = encoder.encode_images(images)
    np.testing.assert_allclose(photos, encoder.encode_images(IMAGES)[numbers], rtol=0, atol=1e-5)


def test_an_image_changes_the_vector_of_a_product(encoder):
    plain = encoder.encode_products(TITLES)
    seen = encoder.encode_products(TITLES, IMAGES)
    has_image = [image is not None for image in IMAGES]
    same = [bool(np.allclose(a, b, atol=1e-5)) for a, b in zip(plain, seen, strict=True)]
    assert same == [not there for there in has_image]


def test_a_missing_image_is_a_row_of_zeros(encoder):
    found = encoder.encode_images([None, picture("red"), None])
    assert found.shape == (3, 16)
    assert not found[[0, 2]].any()
    assert np.linalg.norm(found[1]) == pytest.approx(1)
    assert not encoder.encode_images([None]).any()


def test_nothing_gives_nothing(encoder):
    assert encoder.encode_products([], []).shape == (0, 16)
    assert encoder.encode_queries([]).shape == (0, 16)
    assert encoder.encode_images([]).shape == (0, 16)


def test_a_model_of_texts_does_not_look_at_images(tmp_path):
    encoder = DashClipEncoder(tiny_dashclip(tmp_path, images=False), precision="float32")
    assert not encoder.reads_images
    np.testing.assert_array_equal(
        encoder.encode_products(TITLES, IMAGES), encoder.encode_products(TITLES)
    )
    with pytest.raises(BadInputError, match="was trained without images"):
        encoder.encode_images(IMAGES)


def test_a_model_over_a_trunk(tmp_path):
    encoder = DashClipEncoder(tiny_dashclip(tmp_path, trunk="efficientnet-lite0"))
    found = encoder.encode_images([picture(colour) for colour in COLOURS])
    cosine = found @ found.T
    assert cosine[~np.eye(6, dtype=bool)].max() < 0.999


def test_bfloat16_is_close_to_float32(folder, encoder):
    fast = DashClipEncoder(folder, precision="bfloat16")
    cosine = fast.encode_products(TITLES, IMAGES) * encoder.encode_products(TITLES, IMAGES)
    assert 0.99 < cosine.sum(1).min() < 1


def test_dropout_is_off():
    model = tiny_model(dropout=0.5).train()
    encoder = DashClipEncoder.of(model, tiny_tokenizer(), "tiny", precision="float32")
    np.testing.assert_array_equal(encoder.encode_titles(TITLES), encoder.encode_titles(TITLES))


def test_loading_says_nothing(folder, capfd):
    capfd.readouterr()
    DashClipEncoder(folder).encode_queries(["red"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(BadInputError, match=f"is no DashCLIP model, it has no {name}"):
        DashClipEncoder(copy)


def test_a_missing_folder(tmp_path):
    with pytest.raises(BadInputError, match=r"absent: is no DashCLIP model"):
        DashClipEncoder(tmp_path / "absent")


def test_damaged_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInputError, match="is damaged"):
        DashClipEncoder(copy)


def test_weights_of_another_shape(copy, tmp_path):
    other = tiny_dashclip(tmp_path / "other", dim=8)
    shutil.copy(other / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(BadInputError, match=r"cannot be read as a checkpoint: [^\n]+$"):
        DashClipEncoder(copy)


def test_another_architecture(tmp_path):
    with pytest.raises(BadInputError, match="of architecture 'bert', not dashclip"):
        DashClipEncoder(tiny_bert(tmp_path))
