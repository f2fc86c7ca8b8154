"""Trained tables on a GPU, looked up and updated by one operator, wherever each of them lies.

Legend: ``S`` tables of a collection, ``N`` bags of each, ``L`` rows of all bags, ``D`` embedding
dimension, ``R`` rows of a table.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ranking.device_placement import Place
from ranking.versions import check_versions

check_versions()

from fbgemm_gpu.split_embedding_configs import EmbOptimType  # noqa: E402
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (  # noqa: E402
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (  # noqa: E402
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig  # noqa: E402
from torchrec.modules.fused_embedding_modules import EmbeddingFusedOptimizer  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor  # noqa: E402

_EPSILON = 1e-8
_SET = 32  # rows that compete for the same slots of the cache
_LOCATIONS = {"device": EmbeddingLocation.DEVICE, "cached": EmbeddingLocation.MANAGED_CACHING}


class DeviceTables(nn.Module):
    """Tables that row-wise Adagrad updates in the backward pass, where they were read.

    Its weights are no part of its state dictionary: where there is a cache they are not all in one
    place. `weights` puts them there.

    Args:
        configs: of the S tables; one feature each.
        places: where each table lies, by name; one on a GPU, of no account on the CPU.
        device: where they are looked up.
        learning_rate: of the tables.

    Attributes:
        optimizer: hands a learning rate over at each ``step()``; it updates no weight itself.
    """

    # NOTE: fbgemm's operator itself, as torchrec's collection over it has one place for all tables
    # and would ask a GPU for the lengths of each feature, and so wait for it, at every lookup.

    def __init__(
        self,
        configs: Sequence[EmbeddingBagConfig],
        places: Mapping[str, Place],
        device: torch.device,
        learning_rate: float,
    ) -> None:
        super().__init__()
        self._configs = list(configs)
        self._device = device
        self._width = sum(config.embedding_dim for config in configs)
        cuda = device.type == "cuda"
        compute = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
        specs = [
            (
                config.num_embeddings,
                config.embedding_dim,
                _LOCATIONS[places[config.name].where] if cuda else EmbeddingLocation.HOST,
                compute,
            )
            for config in configs
        ]
        cache_rows = sum(places[config.name].cache_rows for config in configs) if cuda else 0
        lookup = SplitTableBatchedEmbeddingBagsCodegen(
            specs,
            pooling_mode=PoolingMode.SUM,  # of weighted means, the CPU's gradient is wrong
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=learning_rate,
            eps=_EPSILON,
            device=device,
            cache_sets=max(1, cache_rows // _SET),
            uvm_host_mapped=True,  # pages that moved to and fro would cost more than rows read
        )
        self._hidden = (lookup,)  # not a submodule
        self.optimizer = EmbeddingFusedOptimizer(self._configs, lookup)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return the tables' configurations."""
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and sum N bags of each of the S features, in the tables' order; [N, S * D]."""
        bags = (features.offsets().numel() - 1) // len(self._configs)
        return KeyedTensor(
            keys=[name for config in self._configs for name in config.feature_names],
            length_per_key=[config.embedding_dim for config in self._configs],
            values=self._look_up(bags, features.values(), features.offsets(), None),
        )

    def pool(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Return the means [N, D] of bags of rows of the only table.

        Row 0, the unknown one, counts in a mean, adds nothing to it and is not trained.

        Args:
            rows: [L] int64.
            offsets: [N + 1] int64.
        """
        lengths = offsets.diff()
        of_row = torch.repeat_interleave(lengths, lengths, output_size=len(rows))
        return self._look_up(len(lengths), rows, offsets, (rows > 0) / of_row)

    def _look_up(self, bags: int, rows: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        if bags == 0:
            return torch.zeros(0, self._width, device=self._device)
        found: Tensor = self._hidden[0](rows, offsets, weights)
        return found

    def weights(self) -> dict[str, Tensor]:
        """Return the tables [R, D] by name, to be read or written before the next lookup.

        A cache is written back and left empty, so that it holds nothing that is written over.
        """
        self._hidden[0].flush()
        self._hidden[0].reset_cache_states()
        found = self._hidden[0].split_embedding_weights()
        return dict(zip(self._names(), found, strict=True))

    def momenta(self) -> dict[str, Tensor]:
        """Return the sums of squared gradients [R] by table."""
        found = self._hidden[0].split_optimizer_states()
        return {name: states[0] for name, states in zip(self._names(), found, strict=True)}

    def _names(self) -> list[str]:
        return [config.name for config in self._configs]
