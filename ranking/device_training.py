"""The training loop on one GPU."""

from typing import Any

import torch
from torch import Tensor

from features.batch import RecordFiles
from features.schema import DatasetSchema
from ranking.config import TrainingConfig
from ranking.device import training_device, training_precision
from ranking.device_model import DeviceModel
from ranking.device_step import DeviceStep
from ranking.ranker import Ranker
from ranking.training import Trainer


class DeviceTrainer(Trainer):
    """Trains a `Ranker` on a GPU as `Trainer` does on cores, from the same checkpoints.

    Batches are read and encoded on the CPU as there. What differs: a table of products that is
    trained is updated once a step by the gradients of candidates and histories together, and all
    sums have another order.

    Args:
        ranker: the model; moved to the device.
        schema: of the records.
        files: training records.
        total_rows: candidates in them, which fix the number of steps.
        config: how to train.
        validation: records of the validation week, or None.
        device: where to train; what the configuration asks for where None.
        budget: bytes of the GPU's memory for tables; a share of what is free where None.

    Raises:
        BadInputError: the GPU that is asked for cannot be used, or is too small.
    """

    def __init__(
        self,
        ranker: Ranker,
        schema: DatasetSchema,
        files: RecordFiles,
        total_rows: int,
        config: TrainingConfig,
        validation: RecordFiles | None = None,
        *,
        device: torch.device | None = None,
        budget: int | None = None,
    ) -> None:
        self._device = device or training_device(config.device)
        self.model = DeviceModel(ranker, self._device, budget)
        super().__init__(ranker, schema, files, total_rows, config, validation)
        self._bfloat16 = training_precision(config.precision, self._device) == "bfloat16"

    def whole_state(self) -> dict[str, Tensor]:
        """Return what training changed, by the names of a ranker on the CPU, and there."""
        return {name: tensor.cpu() for name, tensor in self._trained_state().items()}

    def _table_optimizers(self) -> list[tuple[str, Any]]:
        return self.model.optimizers

    def _gradients(self) -> DeviceStep:
        return DeviceStep(self.ranker, self._device, bfloat16=self._bfloat16)

    def _trained_state(self) -> dict[str, Tensor]:
        return self.ranker.trained_state() | self.model.weights()

    def _momenta(self) -> dict[str, Tensor]:
        return self.model.momenta()
