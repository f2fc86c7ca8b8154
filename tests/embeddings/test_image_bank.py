import pytest
import torch
from tiny_dashclip import COLOURS, picture, tiny_catalog, tiny_model

from embeddings.catalog import read_catalog
from embeddings.image_bank import ImageBank
from embeddings.images import ImageFaults, to_pixels
from features.errors import BadInputError

LARGE = 1e9
ROWS = torch.tensor([5, 0, 7, 5])
HERE = [row not in (1, 4, 6) for row in range(12)]
TRUNK = {"trunk": "efficientnet-lite0"}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return read_catalog(tiny_catalog(folder, products=12, without_image=(1, 6), broken=(4,)))


def bank(catalog, model, tmp_path, *, depth=0, room=LARGE, share=0.2):
    return ImageBank(
        catalog,
        model,
        depth=depth,
        room=room,
        faults=ImageFaults(share),
        spool=tmp_path / "work" / "images.arrow",
        bfloat16=False,
    )


@torch.no_grad()
def tokens_alone(model, rows):
    """Tokens [N, L, H] of images that go through the whole encoder, one by one."""
    size, mean, std = (
        model.config.vision_config.image_size,
        model.config.image_mean,
        model.config.image_std,
    )
    pictures = [picture(list(COLOURS)[row % 6], row) for row in rows.tolist()]
    each = [model.embed_image(to_pixels([image], size, mean, std)) for image in pictures]
    return torch.cat([model.run_image(states) for states in each])


@pytest.mark.parametrize(
    ("changes", "depth", "room", "kept", "layer"),
    [
        (TRUNK, 0, LARGE, 12 * 4 * 1280 * 2, 0),
        (TRUNK, 0, 0, 0, 0),
        ({}, 0, LARGE, 0, 0),  # patches are trained, nothing to keep
        ({}, 1, LARGE, 12 * 5 * 32 * 2, 1),
        ({}, 1, 0, 0, 1),
        ({}, 2, LARGE, 12 * 5 * 32 * 2, 2),
    ],
)
@torch.no_grad()
def test_images_are_as_each_alone(catalog, tmp_path, changes, depth, room, kept, layer):
    model = tiny_model(**changes)
    images = bank(catalog, model, tmp_path, depth=depth, room=room)
    assert (images.bytes, images.layer, images.depth) == (kept, layer, depth)
    assert images.has_image.tolist() == HERE
    tokens = model.run_image(images.states(ROWS), first=images.layer)
    tolerance = 2e-2 if kept else 1e-5  # float16
    torch.testing.assert_close(tokens, tokens_alone(model, ROWS), rtol=0, atol=tolerance)
    assert (tmp_path / "work" / "images.arrow").exists() == (not kept)


@pytest.mark.parametrize("room", [0, LARGE])
def test_a_broken_image_is_named_counted_and_missing(catalog, tmp_path, capsys, room):
    faults = ImageFaults(0.2)
    images = ImageBank(
        catalog,
        tiny_model(),
        depth=1,
        room=room,
        faults=faults,
        spool=tmp_path / "images.arrow",
        bfloat16=False,
    )
    assert (faults.seen, faults.broken) == (10, 1)
    said = capsys.readouterr().err
    assert "product 1004: its image counts as missing" in said
    assert "1 of 10 images are broken" in said
    assert not images.has_image[4]
    with pytest.raises(AssertionError, match="a row without an image"):
        images.states(torch.tensor([0, 4]))


def test_too_many_broken_images(catalog, tmp_path):
    with pytest.raises(BadInputError, match="1 of 10 images are broken, more than 5%"):
        bank(catalog, tiny_model(), tmp_path, share=0.05)


@pytest.mark.parametrize("room", [0, LARGE])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_catalog_without_images(tmp_path, depth, room):
    catalog = read_catalog(tiny_catalog(tmp_path, products=3, images=False))
    images = bank(catalog, tiny_model(), tmp_path, depth=depth, room=room)
    assert images.has_image.tolist() == [False] * 3


def test_gradients_go_down_to_the_frozen_layers(catalog, tmp_path):
    model = tiny_model()
    for depth, room in ((0, LARGE), (1, 0), (1, LARGE)):
        model.zero_grad()
        images = bank(catalog, model, tmp_path, depth=depth, room=room)
        model.run_image(images.states(ROWS), first=images.layer).square().sum().backward()
        layers = [layer.mlp.fc1.weight.grad for layer in model.vision_model.encoder.layers]
        assert [gradient is not None for gradient in layers] == [n >= depth for n in range(2)]
        patches = model.vision_model.embeddings.patch_embedding.weight.grad
        assert (patches is not None) == (depth == 0)


@torch.no_grad()
def test_another_model_runs_all_that_is_not_frozen(catalog, tmp_path):
    """The momentum encoders have patches of their own where these are trained."""
    other = tiny_model(seed=1)
    images = bank(catalog, tiny_model(), tmp_path)
    tokens = other.run_image(images.states(ROWS, other), first=images.layer)
    torch.testing.assert_close(tokens, tokens_alone(other, ROWS), rtol=0, atol=1e-5)


def test_many_batches_of_files(tmp_path):
    """More products than the reader takes at a time, and than a batch of the frozen layers."""
    catalog = read_catalog(tiny_catalog(tmp_path, products=300, without_image=(0, 257)))
    model = tiny_model()
    rows = torch.tensor([299, 1, 258, 40])
    for room in (0, LARGE):
        images = bank(catalog, model, tmp_path, depth=2, room=room)
        assert int(images.has_image.sum()) == 298
        tokens = model.run_image(images.states(rows), first=images.layer)
        torch.testing.assert_close(tokens, tokens_alone(model, rows), rtol=0, atol=2e-2)


@torch.no_grad()
def test_what_is_prepared_is_read_once_and_let_go(catalog, tmp_path, monkeypatch):
    model = tiny_model()
    images = bank(catalog, model, tmp_path, depth=1, room=0)
    read, plain = [], images._read
    monkeypatch.setattr(images, "_read", lambda place: (read.append(place), plain(place))[1])
    images.prepare(torch.tensor([5, 1, 0, 5]))  # row 1 has no image
    first = images.states(ROWS)
    assert sorted(read) == sorted(set(images._place[ROWS].tolist()))
    assert not images._ready
    assert torch.equal(images.states(ROWS), first)
    assert len(read) == 6


def test_kept_features_leave_nothing_to_prepare(catalog, tmp_path):
    images = bank(catalog, tiny_model(), tmp_path, depth=1)
    images.prepare(ROWS)
    assert not images._ready
