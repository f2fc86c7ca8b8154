"""Point-in-time features: dataset folders, request records, transforms and batches."""

from features.errors import BadInputError
from features.schema import DatasetSchema, Feature, Weeks

__all__ = ["BadInputError", "DatasetSchema", "Feature", "Weeks"]
