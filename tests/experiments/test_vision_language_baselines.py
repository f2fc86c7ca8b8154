"""Tiny random CLIP, BLIP and FLAVA checkpoints: the vectors that each one's own loss compares."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import FAMILIES, SIDE, save_blip_release, save_checkpoint
from transformers import BlipForImageTextRetrieval, BlipImageProcessor, CLIPModel, FlavaModel

from experiments import vision_language_baselines
from experiments.vision_language_baselines import CheckpointMissingError, load_baseline
from features.errors import BadInputError

TEXTS = ["red shirt", "a", "blue long shirt red blue", "shirt"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder for each family; read only."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_checkpoint(family, root / family) for family in FAMILIES}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    for module in ("features.hardware", "embeddings.dashclip_encoder"):
        monkeypatch.setattr(f"{module}.fast_precision", lambda: "float32")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for height, width in ((40, 30), (32, 32), (20, 60))
    ]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def inputs(baseline, texts, images):
    tokens = baseline.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = baseline.processor(images, return_tensors="pt")["pixel_values"]
    return tokens["input_ids"], tokens["attention_mask"], pixels


def clip_similarity(folder, ids, mask, pixels):
    found = CLIPModel.from_pretrained(folder)(
        input_ids=ids, attention_mask=mask, pixel_values=pixels
    )
    return found.text_embeds @ found.image_embeds.T


def blip_similarity(folder, ids, mask, pixels):
    model = BlipForImageTextRetrieval.from_pretrained(folder)
    columns = [  # each image beside all texts
        model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=image[None].expand(len(ids), -1, -1, -1),
            use_itm_head=False,
        )[0][0]
        for image in pixels
    ]
    return torch.stack(columns, 1)


def flava_similarity(folder, ids, mask, pixels):
    model = FlavaModel.from_pretrained(folder)
    found = (model.get_text_features(ids, mask), model.get_image_features(pixels))
    text, image = (getattr(part, "pooler_output", part)[:, 0] for part in found)
    normalize = torch.nn.functional.normalize
    return normalize(text, dim=1) @ normalize(image, dim=1).T


@pytest.mark.parametrize(
    ("family", "similarity"),
    [("clip", clip_similarity), ("blip", blip_similarity), ("flava", flava_similarity)],
)
def test_vectors_are_those_that_the_model_compares(family, similarity, checkpoints, images):
    baseline = load_baseline(family, str(checkpoints[family]))
    texts, pictures = baseline.encode_texts(TEXTS), baseline.encode_images(images)
    assert texts.dtype == pictures.dtype == np.float32
    with torch.inference_mode():
        expected = similarity(checkpoints[family], *inputs(baseline, TEXTS, images)).numpy()
    np.testing.assert_allclose(unit(texts) @ unit(pictures).T, expected, atol=1e-5)


def test_texts_keep_their_order_in_batches_by_length(checkpoints, monkeypatch):
    baseline = load_baseline("clip", str(checkpoints["clip"]))
    together = baseline.encode_texts(TEXTS)
    monkeypatch.setattr(vision_language_baselines, "_TEXTS_A_BATCH", 1)
    np.testing.assert_allclose(baseline.encode_texts(TEXTS), together, atol=1e-5)
    assert len(np.unique(together.round(4), axis=0)) == len(TEXTS)


def test_a_text_longer_than_the_model_takes_is_cut(checkpoints):
    baseline = load_baseline("flava", str(checkpoints["flava"]))
    assert np.isfinite(baseline.encode_texts(["red " * 100])).all()


def test_another_architecture_is_refused(checkpoints):
    with pytest.raises(BadInputError, match="is a checkpoint of architecture 'clip', not blip"):
        load_baseline("blip", str(checkpoints["clip"]))


def test_weights_that_lack_a_projection_are_refused(checkpoints, tmp_path):
    folder = save_checkpoint("clip", tmp_path / "clip")
    CLIPModel.from_pretrained(folder).text_model.save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(BadInputError, match=r"the weights lack '\w+"):
        load_baseline("clip", str(folder))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = save_checkpoint("clip", tmp_path / "clip")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BadInputError, match="clip"):
        load_baseline("clip", str(folder))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c"])
def test_a_folder_that_is_not_there_is_missing(name):
    with pytest.raises(CheckpointMissingError, match="no such folder"):
        load_baseline("clip", name)


def test_a_release_file_is_of_blip(tmp_path):
    with pytest.raises(CheckpointMissingError, match="no such file"):
        load_baseline("blip", str(tmp_path / "model.pth"))
    (tmp_path / "model.pth").touch()
    with pytest.raises(BadInputError, match="a checkpoint of BLIP's release, not of clip"):
        load_baseline("clip", str(tmp_path / "model.pth"))


def test_a_file_of_blips_release_gives_the_vectors_of_transformers_model(tmp_path):
    model = save_blip_release(tmp_path / "model.pth")
    baseline = load_baseline("blip", str(tmp_path / "model.pth"))
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    pixels = BlipImageProcessor(size={"height": SIDE, "width": SIDE})([image], return_tensors="pt")
    tokens = baseline.encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        text = model.text_encoder(tokens["input_ids"], tokens["attention_mask"])[0][:, 0]
        seen = model.vision_model(pixels["pixel_values"])[0][:, 0]
        expected = unit(model.text_proj(text).numpy()), unit(model.vision_proj(seen).numpy())
    np.testing.assert_allclose(unit(baseline.encode_texts(TEXTS)), expected[0], atol=1e-5)
    np.testing.assert_allclose(unit(baseline.encode_images([image])), expected[1], atol=1e-5)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, capsys):
    asked = []

    def refuse(self, name, *, timeout):
        asked.append((name, timeout))
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(CheckpointMissingError, match="nobody/nothing: not on this machine nor"):
        load_baseline("clip", "nobody/nothing")
    assert asked == [("nobody/nothing", 5)]
    assert "does not give it: Name or service not known" in capsys.readouterr().err


def test_a_cached_checkpoint_is_read_without_the_hub(checkpoints, monkeypatch):
    def cached(name, *, local_files_only):
        assert (name, local_files_only) == ("some/clip", True)
        return str(checkpoints["clip"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    baseline = load_baseline("clip", "some/clip")
    assert baseline.encode_texts(["red"]).shape == (1, 8)
