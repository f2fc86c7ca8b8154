"""Names and types of what a served model reads: what a client has to send."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa

from features.config_file import from_dict
from features.errors import BadInputError
from features.schema import DatasetSchema, Kind, Level

InputType = Literal["int64", "string", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One feature of a raw request.

    Attributes:
        name: its name.
        kind: ``sparse`` or ``dense``.
        type: ``int64`` or ``string`` of a sparse one, ``float32`` of a dense one.
    """

    name: str
    kind: Kind
    type: InputType


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """The features of a raw request, in the order of the model's tensors.

    Attributes:
        request: those of the request.
        candidate: those of each candidate.
    """

    request: tuple[Input, ...]
    candidate: tuple[Input, ...]

    @classmethod
    def of(cls, schema: DatasetSchema, records: pa.Schema) -> "InputSpec":
        """Describe the features of ``schema``, with the types that request records have."""
        found: dict[Level, list[Input]] = {"request": [], "candidate": []}
        for feature in schema.features:
            kind = records.field(feature.name).type
            if pa.types.is_list(kind):
                kind = kind.value_type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            sparse: InputType = "int64" if pa.types.is_integer(kind) else "string"
            found[feature.level].append(
                Input(
                    name=feature.name,
                    kind=feature.kind,
                    type=sparse if feature.kind == "sparse" else "float32",
                )
            )
        return cls(request=tuple(found["request"]), candidate=tuple(found["candidate"]))

    @classmethod
    def from_json(cls, where: str, content: Any) -> "InputSpec":
        """Read what `dataclasses.asdict` gives.

        Raises:
            BadInputError: something is missing or of another form.
        """
        levels: dict[str, tuple[Input, ...]] = {}
        for level in get_args(Level):
            entries = content.get(level) if isinstance(content, dict) else None
            if not isinstance(entries, list):
                raise BadInputError(f"{where}: 'inputs' lacks a list '{level}'")
            levels[level] = tuple(from_dict(f"{where}: inputs", e, Input) for e in entries)
        return cls(request=levels["request"], candidate=levels["candidate"])

    def of_kind(self, kind: Kind, level: Level) -> list[Input]:
        """Return one level's sparse or dense features, in order."""
        items = self.request if level == "request" else self.candidate
        return [item for item in items if item.kind == kind]

    def names(self, kind: Kind, level: Level) -> list[str]:
        """Return the names of one level's sparse or dense features, in order."""
        return [item.name for item in self.of_kind(kind, level)]
