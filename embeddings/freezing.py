"""Which weights a stage trains (paper, Section 3.2: the first 8 of 12 layers stay frozen)."""

from dataclasses import dataclass

from torch import nn

from embeddings.dashclip import DashClip

# What a stage leaves alone, besides the frozen layers: it takes no part in its loss.
UNUSED = {
    "stage 1": ("query_encoder", "query_proj", "product_proj"),
    "title crops": ("text_proj", "vision_proj", "itm_head", "log_temperature"),
    "stage 2": ("text_proj", "vision_proj", "itm_head", "log_temperature"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenDepth:
    """How many layers, counted from the input, say the same throughout a stage.

    Attributes:
        title: of the text encoder, as far as titles go through them without an image.
        query: of the query encoder.
        image: of the image encoder.
    """

    title: int
    query: int
    image: int


def freeze(model: DashClip, share: float, stage: str) -> FrozenDepth:
    """Set which parameters of ``model`` are trained.

    Embeddings are frozen with the first layer. Layers over an image trunk are new and trained, as
    is new cross-attention (`DashClipConfig.cross_attention_start`) wherever it stands; the trunk
    itself never is.

    Args:
        model: the encoders.
        share: of the layers that are frozen, 8 / 12 in the paper.
        stage: its name.
    """
    config = model.config
    model.requires_grad_(True)
    title = _freeze_first(model.text_encoder.embeddings, model.text_encoder.encoder.layer, share)
    query = _freeze_first(model.query_encoder.embeddings, model.query_encoder.encoder.layer, share)
    image = 0
    if model.vision_model is not None:
        if config.image_trunk:
            model.vision_model.embeddings.trunk.requires_grad_(False)
        else:
            vision = model.vision_model
            image = _freeze_first(vision.embeddings, vision.encoder.layers, share)
        if config.cross_attention_start:
            for layer in model.text_encoder.encoder.layer[config.cross_attention_start :]:
                layer.crossattention.requires_grad_(True)
            # What grounding starts from is kept, not what lies above it.
            title = min(title, config.cross_attention_start)
    for name in UNUSED[stage]:
        part = getattr(model, name, None)
        if part is not None:
            part.requires_grad_(False)
    return FrozenDepth(title=title, query=query, image=image)


def _freeze_first(embeddings: nn.Module, layers: nn.ModuleList, share: float) -> int:
    """Freeze the embeddings and a share of the layers; returns their number."""
    count = round(share * len(layers))
    if count:
        embeddings.requires_grad_(False)
        for layer in layers[:count]:
            layer.requires_grad_(False)
    return count
