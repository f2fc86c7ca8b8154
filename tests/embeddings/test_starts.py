import shutil

import numpy as np
import pytest
import torch
from tiny_dashclip import (
    BERT_WORDS,
    COLOURS,
    THINGS,
    picture,
    tiny_bert,
    tiny_blip,
    tiny_blip_release,
    tiny_dashclip,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModel, AutoTokenizer, BlipForImageTextRetrieval

from embeddings.batching import padded, quiet_transformers
from embeddings.config import StartConfig
from embeddings.image_trunk import TrunkEmbeddings, load_pretrained
from embeddings.images import to_pixels
from embeddings.starts import Start, fit_projections, load_start, rename_blip, tokenize
from features.errors import BadInputError

TITLES = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
SOME = ["red shirt", "new new blue watch old", "", "sock"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return tiny_blip_release(tmp_path_factory.mktemp("release") / "model_base_14M.pth")


def start_of(checkpoint, *, reads_images=True, seed=0, **changes):
    config = StartConfig(checkpoint=str(checkpoint), **{"image_size": 32} | changes)
    start = load_start(config, reads_images=reads_images, seed=seed)
    start.model.eval()
    return start


@pytest.fixture(scope="module")
def from_blip(blip):
    return start_of(blip)


@pytest.fixture(scope="module")
def from_bert(bert):
    return start_of(bert)


def close(got, wanted, atol=1e-5):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def title_states(start, texts, *, ground=False, image_tokens=None):
    ids, mask = padded(tokenize(start, texts), start.tokenizer.pad_token_id)
    model = start.model
    states = model.embed_text(model.ground(ids) if ground else ids)
    states = model.run_text(states, mask, image_tokens=image_tokens)
    return model.pool(states, mask)


# --- from BLIP


@torch.no_grad()
def test_a_blip_start_scores_pairs_as_blip_does(blip, from_blip):
    with quiet_transformers():
        oracle = BlipForImageTextRetrieval.from_pretrained(blip)
    model = from_blip.model
    ids, mask = padded(tokenize(from_blip, SOME), 0)
    config = model.config
    images = [picture(colour) for colour in ("red", "blue", "black", "pink")]
    pixels = to_pixels(images, 32, config.image_mean, config.image_std)
    image_tokens = model.run_image(model.embed_image(pixels))
    itc = oracle(input_ids=ids, pixel_values=pixels, attention_mask=mask, use_itm_head=False)
    titles = model.title_embedding(title_states(from_blip, SOME))
    close(model.image_embedding(image_tokens) @ titles.t(), itc.itm_score)
    # BLIP itself starts a grounded text with [ENC]; transformers leaves that to who gives the ids.
    enc = ids.clone()
    enc[:, 0] = BERT_WORDS + 1
    itm = oracle(input_ids=enc, pixel_values=pixels, attention_mask=mask, use_itm_head=True)
    got = title_states(from_blip, SOME, ground=True, image_tokens=image_tokens)
    close(model.match_logits(got), itm.itm_score)


def test_a_blip_start_is_pooled_and_grounded_as_in_blip(from_blip):
    config = from_blip.model.config
    assert (config.pooling, config.cross_attention_start) == ("cls", 0)
    assert config.grounded_token_id == BERT_WORDS + 1 == 30_523
    assert config.projection_dim == 16
    assert not from_blip.new_projections


def test_the_release_gives_the_very_same_model(from_blip, release):
    start = start_of(release)
    ours, theirs = start.model.state_dict(), from_blip.model.state_dict()
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert differing == ["log_temperature"]
    assert start.model.log_temperature.exp().item() == pytest.approx(0.05)
    assert theirs["log_temperature"].exp().item() == pytest.approx(0.07)
    for part in ("text_config", "vision_config"):
        found, wanted = (getattr(s.model.config, part).to_dict() for s in (start, from_blip))
        for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "layer_norm_eps"):
            assert found[key] == wanted[key]
    assert start.model.config.grounded_token_id == 30_523
    assert start.model.config.vision_config.image_size == 32
    assert tokenize(start, SOME) == tokenize(from_blip, SOME)


def test_what_the_release_holds_beside_the_encoders_is_left_out(release, blip):
    from safetensors.torch import load_file

    renamed = rename_blip(torch.load(release, weights_only=True)["model"])
    assert renamed.keys() - {"temp"} == load_file(blip / "model.safetensors").keys()


def test_query_encoder_and_projections_start_as_the_titles(from_blip, from_bert):
    for model in (from_blip.model, from_bert.model):
        text = model.text_encoder.state_dict()
        for name, tensor in model.query_encoder.state_dict().items():
            assert torch.equal(tensor, text[name])
        for layer in (model.product_proj, model.query_proj):
            assert torch.equal(layer.weight, model.text_proj.weight)
            assert layer.weight.data_ptr() != model.text_proj.weight.data_ptr()


# --- from BERT


@pytest.mark.parametrize("reads_images", [True, False])
@torch.no_grad()
def test_a_bert_start_says_of_texts_what_bert_says(bert, reads_images):
    start = start_of(bert, reads_images=reads_images)
    with quiet_transformers():
        oracle = AutoModel.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    for text, got in zip(SOME, title_states(start, SOME), strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        close(got, oracle(**encoded).last_hidden_state[0].mean(0))
    assert start.model.config.reads_images == reads_images
    assert start.new_projections


@torch.no_grad()
def test_images_say_nothing_before_cross_attention_is_trained(from_bert):
    """Its output starts at zero; what is left of it is one more normalisation."""
    model = from_bert.model
    assert model.config.cross_attention_start == 2
    ids, mask = padded(tokenize(from_bert, SOME), 0)
    tokens = torch.randn(2, 4, 5, 32, generator=torch.Generator().manual_seed(0))
    below = model.run_text(model.embed_text(ids), mask, last=2)
    seen = [model.run_text(model.embed_text(ids), mask, last=2, image_tokens=t) for t in tokens]
    assert torch.equal(seen[0], below)
    one, other = (model.run_text(below, mask, first=2, image_tokens=t) for t in tokens)
    close(one[mask], other[mask])
    plain = model.run_text(below, mask, first=2)
    assert torch.cosine_similarity(one[mask], plain[mask]).min() > 0.9


def test_a_trunk_with_its_trained_weights(from_bert):
    packaged = TrunkEmbeddings("efficientnet-lite0", 32, 32)
    load_pretrained(packaged, "efficientnet-lite0")
    trunk = from_bert.model.vision_model.embeddings.trunk
    assert torch.equal(trunk._conv_stem.weight, packaged.trunk._conv_stem.weight)
    assert trunk._bn0.running_var.std() > 0.1  # ones before any training
    assert from_bert.model.config.vision_config.num_hidden_layers == 2
    assert from_bert.model.config.image_mean == (0.485, 0.456, 0.406)


def test_new_weights_follow_the_seed(bert, from_bert):
    before = torch.random.get_rng_state()
    same, other = (start_of(bert, seed=seed).model.state_dict() for seed in (0, 1))
    ours = from_bert.model.state_dict()
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    for name in ("vision_proj.weight", "vision_model.encoder.layers.0.mlp.fc1.weight"):
        assert not torch.equal(ours[name], other[name])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_texts_are_cut_to_what_the_model_takes(bert):
    long = ["new " * 100]
    assert len(tokenize(start_of(bert, max_tokens=8), long)[0]) == 8
    assert len(tokenize(start_of(bert), long)[0]) == 24  # it has no more positions
    assert tokenize(start_of(bert), []) == []


# --- projections


def vectors(start, texts):
    with torch.no_grad():
        return torch.nn.functional.normalize(title_states(start, texts), dim=1)


def test_projections_keep_cosines_within_their_subspace():
    """All vectors of 10 titles lie in 10 dimensions, which 16 hold."""
    start = Start(model=tiny_model(), tokenizer=tiny_tokenizer(), new_projections=True)
    titles = TITLES[::4][:10]
    model = start.model
    for layer in (model.text_proj, model.product_proj, model.query_proj):
        torch.nn.init.zeros_(layer.bias)
    fit_projections(start, titles)
    wanted = vectors(start, titles)
    with torch.no_grad():
        projected = model.text_proj(wanted)
        close(projected @ projected.t(), wanted @ wanted.t())
        embedded = model.title_embedding(title_states(start, titles))
        close(embedded @ embedded.t(), wanted @ wanted.t())
    for layer in (model.product_proj, model.query_proj):
        assert torch.equal(layer.weight, model.text_proj.weight)


def test_projections_are_the_principal_directions():
    start = Start(model=tiny_model(dim=4), tokenizer=tiny_tokenizer(), new_projections=True)
    fit_projections(start, TITLES)
    with torch.no_grad():
        kept = vectors(start, TITLES).double() @ start.model.text_proj.weight.double().t()
    singular = np.linalg.svd(vectors(start, TITLES).double().numpy(), compute_uv=False)
    np.testing.assert_allclose(kept.norm(dim=0).numpy(), singular[:4], rtol=1e-4)


def test_projections_wider_than_the_encoder_keep_all_cosines(bert):
    """256 dimensions for an encoder of 32."""
    start = start_of(bert, reads_images=False)
    fit_projections(start, TITLES)
    wanted = vectors(start, TITLES)
    with torch.no_grad():
        embedded = start.model.title_embedding(title_states(start, TITLES))
    assert embedded.shape == (36, 256)
    close(embedded @ embedded.t(), wanted @ wanted.t())


# --- from a model of this project


def test_a_model_of_this_project(tmp_path):
    start = start_of(tiny_dashclip(tmp_path, pooling="cls", grounded_token_id=5))
    wanted = tiny_model(pooling="cls", grounded_token_id=5).state_dict()
    found = start.model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not start.new_projections
    assert start.model.config.grounded_token_id == 5


# --- what cannot be started from


def refused(checkpoint, said):
    with pytest.raises(BadInputError, match=said) as caught:
        load_start(StartConfig(checkpoint=str(checkpoint)), reads_images=True, seed=0)
    assert "\n" not in str(caught.value)
    assert str(checkpoint) in str(caught.value)


def test_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(tmp_path, "of architecture 'gpt2'; expected blip, bert or dashclip")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no config.json"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "of architecture 'unknown'"),
    ],
)
def test_a_folder_without_a_configuration(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    refused(tmp_path, said)


def test_a_captioning_blip(tmp_path):
    from transformers import BlipConfig, BlipForConditionalGeneration

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2}
    config = BlipConfig(
        text_config=shape | {"vocab_size": 40, "encoder_hidden_size": 16, "bos_token_id": 1},
        vision_config=shape | {"image_size": 32, "patch_size": 16},
    )
    with quiet_transformers():
        BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    refused(tmp_path, "of another architecture, it lacks the weight 'itm_head.bias'")


@pytest.mark.parametrize("kind", [tiny_bert, tiny_blip, tiny_dashclip])
def test_a_truncated_file(tmp_path, kind):
    path = kind(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, "is damaged")


@pytest.mark.parametrize("kind", [tiny_bert, tiny_blip, tiny_dashclip])
def test_a_missing_weight(tmp_path, kind):
    from safetensors.torch import load_file, save_file

    path = kind(tmp_path) / "model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if name.endswith("layer.1.output.dense.bias"))
    del weights[lost]
    save_file(weights, path, metadata={"format": "pt"})
    refused(tmp_path, rf"lacks the weight '{lost}'")


def test_no_tokenizer(bert, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert / name, tmp_path / name)
    refused(tmp_path, "has no tokenizer that knows a word")


@pytest.mark.parametrize(
    "name", ["absent", "absent.pth", "nobody/no-such-model", "/no/such/folder"]
)
def test_what_is_not_there(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(name, "cannot be read as a checkpoint|no such file")


def test_a_file_that_is_no_release(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"PK\x03\x04 not a checkpoint")
    refused(path, "cannot be read as a checkpoint")
    torch.save({"state_dict": {}}, path)
    refused(path, "is not a checkpoint of BLIP's release, it has no 'model'")
    torch.save({"model": {"visual_encoder.cls_token": torch.zeros(1)}}, path)
    refused(path, "of another architecture, it lacks the weight 'text_encoder.embeddings.word")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda w: w.pop("itm_head.weight"), "lacks the weight 'itm_head.weight'"),
        (
            lambda w: w.update({"text_encoder.pooler.dense.bias": torch.zeros(64)}),
            "holds the unknown weight 'text_encoder.pooler.dense.bias'",
        ),
        (
            lambda w: w.update({"text_encoder.embeddings.word_embeddings.weight": _few()}),
            "knows 21 tokens, fewer than the 30,524 of its tokenizer",
        ),
    ],
)
def test_a_release_that_does_not_fit(release, tmp_path, changed, said):
    content = torch.load(release, weights_only=True)
    changed(content["model"])
    path = tmp_path / "changed.pth"
    torch.save(content, path)
    refused(path, said)


def _few():
    return torch.zeros(21, 64)
