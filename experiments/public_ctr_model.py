"""The parallel DCNv2 + DNN over embeddings that BARS trains.

Legend: ``B`` rows of a batch, ``F`` categorical and ``D`` numeric fields, ``E`` embedding dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.public_ctr_config import PublicConfig
from ranking.towers import SplitCrossNet

_EMBEDDING_STD = 1e-4


class ParallelDCNv2(nn.Module):
    r"""A full-rank cross network beside a deep network, one linear layer over both.

    .. math:: x_0 = [e_1 .. e_F, v_1 w_1 .. v_D w_D], \quad
              \hat{y} = \sigma(w^T [cross(x_0), deep(x_0)] + b)

    (DCN-V2, https://arxiv.org/abs/2008.13535, Figure 1b.) A categorical field is a row ``e`` of the
    one embedding table; a numeric field is its value times an embedding ``w`` of its own.
    """

    def __init__(self, table_rows: int, fields: int, numeric: int, config: PublicConfig) -> None:
        """Create the model with random weights.

        Args:
            table_rows: rows of the embedding table.
            fields: categorical fields.
            numeric: numeric fields.
            config: sizes.
        """
        super().__init__()
        self.table = nn.Embedding(table_rows, config.embedding_dim)
        self.numeric = nn.Parameter(torch.empty(numeric, config.embedding_dim))
        width = (fields + numeric) * config.embedding_dim
        self.cross = SplitCrossNet(width, config.cross_layers, 0)
        self.deep = _deep_network(width, config)
        self.output = nn.Linear(width + config.deep[-1], 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as FuxiCTR does: Xavier normal matrices, small embeddings, no biases."""
        nn.init.normal_(self.table.weight, std=_EMBEDDING_STD)
        nn.init.normal_(self.numeric, std=(2 / (1 + self.table.embedding_dim)) ** 0.5)
        for kernel in self.cross.net.kernels:
            nn.init.xavier_normal_(kernel)
        for layer in (*self.deep, self.output):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def embeddings(self) -> list[Tensor]:
        """Return the weights that the embedding L2 holds for."""
        return [self.table.weight, self.numeric]

    def forward(self, rows: Tensor, values: Tensor) -> Tensor:
        """Return the log odds of a click, [B].

        Args:
            rows: [B, F] int32, rows of the table.
            values: [B, D] float32.
        """
        x_0 = self.table(rows).flatten(1)
        if len(self.numeric):
            x_0 = torch.cat([x_0, (values.unsqueeze(2) * self.numeric).flatten(1)], dim=1)
        crossed = self.cross(x_0, F.linear(x_0, *self.cross.first_layer()))
        logits: Tensor = self.output(torch.cat([crossed, self.deep(x_0)], dim=1))
        return logits.squeeze(1)


def _deep_network(width: int, config: PublicConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    for units in config.deep:
        layers.append(nn.Linear(width, units))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(units))
        layers.append(nn.ReLU())
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
        width = units
    return nn.Sequential(*layers)
