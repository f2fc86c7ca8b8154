"""DashCLIP's encoders as one transformers model (paper, Section 3.1 and Figure 1).

Built of transformers' BLIP modules: an image encoder, a text encoder that becomes image-grounded
where its layers also attend to image tokens (as in BLIP, both uses share all other weights), and a
query encoder of its own. Each ends in a projection to one space of unit vectors.

=================  ==============================================================================
embedding          made of
=================  ==============================================================================
image              class token of the image encoder
title              text encoder without images
product            text encoder grounded on the image's tokens; the plain one without an image
query              query encoder
=================  ==============================================================================

Texts and images go through the layers in parts (`run_text`, `run_image`), so that what frozen
layers say of them is computed once and kept.

Legend: ``N`` texts or images, ``T`` tokens of the longest text, ``L`` image tokens, ``H`` hidden
size, ``D`` embedding dimension.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    PretrainedConfig,
    PreTrainedModel,
)

from embeddings.image_trunk import TrunkEmbeddings
from features.errors import BadInputError

Pooling = Literal["cls", "mean"]
MODEL_TYPE = "dashclip"
PROJECTION_DIM = 256


class DashClipConfig(PretrainedConfig):
    """Shape of the encoders.

    Args:
        text_config: of the text encoder and, cross-attention aside, of the query encoder.
        vision_config: of the image encoder; ``None`` for a model that reads texts only.
        projection_dim: embedding dimension ``D``.
        pooling: what stands for a text: its first token (BLIP) or the mean of its tokens.
        cross_attention_start: layers before this one never attend to the image. 0 in BLIP; later
            where the layers below come from a text encoder that knows no images (as in ALBEF).
        grounded_token_id: what replaces a text's first token when it is grounded on an image
            (BLIP's ``[ENC]``); ``None`` for nothing.
        image_trunk: pretrained convolutional trunk whose feature map the image encoder reads;
            empty for BLIP's own patches.
        image_mean: of each channel, 0 to 1, to normalise with.
        image_std: the same.
        max_tokens: longer texts are cut.
    """

    model_type = MODEL_TYPE
    sub_configs = {"text_config": BlipTextConfig, "vision_config": BlipVisionConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: BlipTextConfig | dict[str, Any] | None = None,
        vision_config: BlipVisionConfig | dict[str, Any] | None = None,
        projection_dim: int = PROJECTION_DIM,
        pooling: Pooling = "cls",
        cross_attention_start: int = 0,
        grounded_token_id: int | None = None,
        image_trunk: str = "",
        image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073),
        image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711),
        max_tokens: int = 64,
        **kwargs: Any,
    ) -> None:
        vision = (
            BlipVisionConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        )
        text = text_config
        if not isinstance(text, BlipTextConfig):
            text = BlipTextConfig(**(text or {}))
        if vision is not None:
            text.encoder_hidden_size = vision.hidden_size
        self.text_config: Any = text
        self.vision_config: Any = vision
        self.projection_dim = projection_dim
        self.pooling = pooling
        self.cross_attention_start = cross_attention_start
        self.grounded_token_id = grounded_token_id
        self.image_trunk = image_trunk
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.max_tokens = max_tokens
        super().__init__(**kwargs)

    @property
    def reads_images(self) -> bool:
        """Whether there is an image encoder."""
        return self.vision_config is not None


class DashClip(PreTrainedModel):
    """The encoders and their projections.

    Attributes:
        vision_model: image encoder, or ``None``.
        text_encoder: text encoder, image-grounded where it is given image tokens.
        query_encoder: starts as a copy of the text encoder.
        vision_proj, text_proj, product_proj, query_proj: ``[D, H]`` projections.
        itm_head: does the image belong to the text? ``[2, H]``, index 1 for yes.
        log_temperature: of the image-text contrast; learnt, kept as a logarithm.
    """

    config_class = DashClipConfig
    base_model_prefix = MODEL_TYPE
    supports_gradient_checkpointing = True

    def __init__(self, config: DashClipConfig) -> None:
        super().__init__(config)
        text, vision, dim = config.text_config, config.vision_config, config.projection_dim
        text.is_decoder = vision is not None  # gives the layers their cross-attention
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        plain = BlipTextConfig(**{**text.to_dict(), "is_decoder": False})
        self.query_encoder = BlipTextModel(plain, add_pooling_layer=False)
        for name in ("text_proj", "product_proj", "query_proj"):
            setattr(self, name, nn.Linear(text.hidden_size, dim))
        self.vision_model = None
        if vision is not None:
            self.vision_model = BlipVisionModel(vision)
            if config.image_trunk:
                self.vision_model.embeddings = TrunkEmbeddings(
                    config.image_trunk, vision.hidden_size, vision.image_size
                )
            for layer in self.text_encoder.encoder.layer[: config.cross_attention_start]:
                del layer.crossattention
            self.vision_proj = nn.Linear(vision.hidden_size, dim)
            self.itm_head = nn.Linear(text.hidden_size, 2)
            self.log_temperature = nn.Parameter(torch.tensor(0.07).log())
        self.post_init()

    @classmethod
    def load(cls, folder: Path) -> "DashClip":
        """Load a saved model; see `embeddings.dashclip_encoder` for the one call that encodes.

        Raises:
            BadInputError: it lacks a weight.
        """
        model, report = cls.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:
            lacking = min(report["missing_keys"])
            raise BadInputError(f"{folder}: lacks the weight '{lacking}'")
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise new linear layers, embeddings and norms as BERT does."""
        std = self.config.text_config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    # --- texts

    def embed_text(self, ids: Tensor, *, query: bool = False) -> Tensor:
        """Return the ``[N, T, H]`` input of the first layer for token ids ``[N, T]``."""
        tower = self.query_encoder if query else self.text_encoder
        return tower.embeddings(input_ids=ids)

    def run_text(
        self,
        states: Tensor,
        mask: Tensor,
        *,
        first: int = 0,
        last: int | None = None,
        query: bool = False,
        image_tokens: Tensor | None = None,
    ) -> Tensor:
        """Run layers ``first`` to ``last`` (exclusive; all where None).

        Args:
            states: ``[N, T, H]``, of `embed_text` or of the layers before.
            mask: ``[N, T]``, true where there is a token.
            first: the first layer to run.
            last: the layer to stop before.
            query: run the query encoder.
            image_tokens: ``[N, L, H]`` of `run_image`, one image a text, to ground the text on.

        Returns:
            ``[N, T, H]``.
        """
        tower = self.query_encoder if query else self.text_encoder
        bias = torch.zeros(mask.shape, dtype=states.dtype, device=states.device)
        bias = bias.masked_fill(~mask.bool(), torch.finfo(bias.dtype).min)[:, None, None, :]
        for index in range(first, len(tower.encoder.layer) if last is None else last):
            grounded = image_tokens if index >= self.config.cross_attention_start else None
            states = tower.encoder.layer[index](
                states, encoder_hidden_states=grounded, attention_mask=bias
            )
        return states

    def ground(self, ids: Tensor) -> Tensor:
        """Return token ids ``[N, T]`` as the image-grounded encoder takes them."""
        if self.config.grounded_token_id is None:
            return ids
        ids = ids.clone()
        ids[:, 0] = self.config.grounded_token_id
        return ids

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return one ``[N, H]`` vector a text: of last states ``[N, T, H]`` and mask ``[N, T]``."""
        if self.config.pooling == "cls":
            return states[:, 0]
        mask = mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def title_embedding(self, pooled: Tensor) -> Tensor:
        """Return ``[N, D]`` unit vectors of titles, pooled from the text encoder's last states."""
        return self._project(self.text_proj, pooled)

    def product_embedding(self, pooled: Tensor) -> Tensor:
        """Return ``[N, D]`` unit vectors of products, pooled from the (grounded) last states."""
        return self._project(self.product_proj, pooled)

    def query_embedding(self, pooled: Tensor) -> Tensor:
        """Return ``[N, D]`` unit vectors of queries, pooled from the query encoder."""
        return self._project(self.query_proj, pooled)

    def match_logits(self, pooled: Tensor) -> Tensor:
        """Return ``[N, 2]`` logits of image-text matching, pooled from the grounded last states."""
        return self.itm_head(pooled).float()

    # --- images

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Return what precedes the image encoder's layers for pixels ``[N, 3, S, S]``.

        With a trunk that is its feature map ``[N, L - 1, C]``; otherwise patches and class token,
        ``[N, L, H]``.
        """
        assert self.vision_model is not None
        embeddings = self.vision_model.embeddings
        if isinstance(embeddings, TrunkEmbeddings):
            return embeddings.features(pixels)
        return embeddings(pixels)

    def run_image(self, states: Tensor, *, first: int = 0, last: int | None = None) -> Tensor:
        """Run image layers ``first`` to ``last`` on what `embed_image` gave.

        Returns:
            ``[N, L, H]``; normalised image tokens where ``last`` is None.
        """
        assert self.vision_model is not None
        if first == 0 and isinstance(self.vision_model.embeddings, TrunkEmbeddings):
            states = self.vision_model.embeddings(states)
        for layer in self.vision_model.encoder.layers[first:last]:
            states = layer(states, attention_mask=None)
        return states if last is not None else self.vision_model.post_layernorm(states)

    def image_embedding(self, image_tokens: Tensor) -> Tensor:
        """Return ``[N, D]`` unit vectors of images from their tokens ``[N, L, H]``."""
        return self._project(self.vision_proj, image_tokens[:, 0])

    @staticmethod
    def _project(layer: nn.Linear, pooled: Tensor) -> Tensor:
        return F.normalize(layer(pooled).float(), dim=-1)
