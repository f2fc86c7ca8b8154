import math

import pytest
import torch
from tiny_dashclip import SIDE, WORDS, tiny_dashclip, tiny_model

from embeddings.batching import padded
from embeddings.dashclip import DashClip, DashClipConfig
from embeddings.image_trunk import TrunkEmbeddings
from features.errors import BadInputError

TEXTS = [[2, 6, 12, 3], [2, 3], [2, 7, 13, 18, 18, 18, 3]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def tokens():
    return padded(TEXTS, 0)


def pixels(count=3):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("query", [False, True])
@torch.no_grad()
def test_texts_go_as_through_transformers_own_model(model, query):
    ids, mask = tokens()
    tower = model.query_encoder if query else model.text_encoder
    wanted = tower(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    got = model.run_text(model.embed_text(ids, query=query), mask, query=query)
    close(got[mask], wanted[mask])


@torch.no_grad()
def test_grounded_texts_go_as_through_transformers_own_model(model):
    ids, mask = tokens()
    image_tokens = model.run_image(model.embed_image(pixels()))
    wanted = model.text_encoder(
        input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=image_tokens
    ).last_hidden_state
    got = model.run_text(model.embed_text(ids), mask, image_tokens=image_tokens)
    close(got[mask], wanted[mask])
    plain = model.run_text(model.embed_text(ids), mask)
    assert (got - plain)[mask].abs().max() > 0.1


@torch.no_grad()
def test_images_go_as_through_transformers_own_model(model):
    wanted = model.vision_model(pixel_values=pixels()).last_hidden_state
    assert wanted.shape == (3, 5, 32)  # 4 patches and a class token
    close(model.run_image(model.embed_image(pixels())), wanted)


@torch.no_grad()
def test_layers_run_in_parts_as_at_once(model):
    ids, mask = tokens()
    image = model.embed_image(pixels())
    image_tokens = model.run_image(image)
    torch.testing.assert_close(
        model.run_image(model.run_image(image, last=1), first=1), image_tokens, rtol=0, atol=0
    )
    for query, grounded in ((False, None), (True, None), (False, image_tokens)):
        states = model.embed_text(ids, query=query)
        wanted = model.run_text(states, mask, query=query, image_tokens=grounded)
        for first, last in ((0, 1), (1, 2), (2, None)):
            states = model.run_text(
                states, mask, first=first, last=last, query=query, image_tokens=grounded
            )
        torch.testing.assert_close(states, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_a_grounded_batch_equals_each_alone(pooling):
    model = tiny_model(pooling=pooling, grounded_token_id=5)

    def embed(rows, images):
        ids, mask = padded(rows, 0)
        image_tokens = model.run_image(model.embed_image(images))
        states = model.run_text(
            model.embed_text(model.ground(ids)), mask, image_tokens=image_tokens
        )
        return model.product_embedding(model.pool(states, mask))

    together = embed(TEXTS, pixels())
    close(together.norm(dim=1), torch.ones(3))
    for row in range(3):
        close(together[row : row + 1], embed(TEXTS[row : row + 1], pixels()[row : row + 1]))


@torch.no_grad()
def test_layers_below_the_first_cross_attention_do_not_look_at_images():
    model = tiny_model(cross_attention_start=2)
    layers = model.text_encoder.encoder.layer
    assert [hasattr(layer, "crossattention") for layer in layers] == [False, False, True]
    ids, mask = tokens()
    states = model.embed_text(ids)
    image_tokens = model.run_image(model.embed_image(pixels()))
    below = model.run_text(states, mask, last=2)
    assert torch.equal(model.run_text(states, mask, last=2, image_tokens=image_tokens), below)
    wanted = layers[2](
        below,
        encoder_hidden_states=image_tokens,
        attention_mask=torch.where(mask, 0.0, -1e30)[:, None, None],
    )
    got = model.run_text(states, mask, image_tokens=image_tokens)
    close(got[mask], wanted[mask])


def test_pooling_by_hand():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [50.0, 50.0]], [[1, 1], [2, 2], [6, 0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert tiny_model(pooling="mean").pool(states, mask).tolist() == [[2, 4], [3, 1]]
    assert tiny_model(pooling="cls").pool(states, mask).tolist() == [[1, 2], [1, 1]]


def test_the_first_token_of_a_grounded_text():
    ids, _ = tokens()
    assert torch.equal(tiny_model().ground(ids), ids)
    grounded = tiny_model(grounded_token_id=5).ground(ids)
    assert grounded[:, 0].tolist() == [5, 5, 5]
    assert torch.equal(grounded[:, 1:], ids[:, 1:])
    assert ids[0, 0] == 2  # the argument stays as it was


def test_a_model_of_texts_has_nothing_for_images():
    model = tiny_model(images=False, cross_attention_start=2)
    assert model.vision_model is None
    assert not model.config.reads_images
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"text_encoder", "query_encoder", "text_proj", "product_proj", "query_proj"}
    assert not any("crossattention" in name for name, _ in model.named_parameters())


def test_the_first_temperature(model):
    assert model.log_temperature.item() == pytest.approx(math.log(0.07))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"images": False},
        {"trunk": "efficientnet-lite0", "cross_attention_start": 1},
        {"pooling": "cls", "grounded_token_id": 5, "dropout": 0.1},
    ],
)
def test_a_saved_model_loads_with_one_call(tmp_path, changes):
    model = tiny_model(**changes)
    loaded = DashClip.load(tiny_dashclip(tmp_path, **changes))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("pooling", "cross_attention_start", "grounded_token_id", "image_trunk"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    assert loaded.config.image_mean == model.config.image_mean
    assert loaded.config.text_config.hidden_dropout_prob == changes.get("dropout", 0)
    assert not loaded.training


def test_weights_that_lack_one_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny_dashclip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["query_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match=r"lacks the weight 'query_proj\.weight'"):
        DashClip.load(folder)


def test_the_configuration_of_nothing_in_particular():
    config = DashClipConfig()
    assert (config.projection_dim, config.pooling, config.reads_images) == (256, "cls", False)


def test_gradient_checkpointing_changes_no_gradient():
    def gradients(checkpointing):
        model = tiny_model().train()
        if checkpointing:
            later = getattr(model, "activation_checkpointing_enable", None)  # its newer name
            (later or model.gradient_checkpointing_enable)({"use_reentrant": False})
        ids, mask = tokens()
        image_tokens = model.run_image(model.embed_image(pixels()))
        states = model.run_text(model.embed_text(ids), mask, image_tokens=image_tokens)
        model.match_logits(model.pool(states, mask)).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert {"vision_model.embeddings.class_embedding", "itm_head.weight"} <= plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_new_weights_are_drawn_as_in_bert():
    config = DashClipConfig(
        text_config={"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
        | {"vocab_size": len(WORDS)}
    )
    weight = DashClip(config).query_encoder.encoder.layer[0].intermediate.dense.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_a_trunk_stands_for_the_patches():
    model = tiny_model(trunk="efficientnet-lite0")
    assert isinstance(model.vision_model.embeddings, TrunkEmbeddings)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = model.embed_image(images)
    assert features.shape == (2, 4, 1280)
    assert not features.requires_grad
    assert model.run_image(features).shape == (2, 5, 32)
