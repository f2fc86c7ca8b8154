"""``manifest.json`` of an exported ranker: what it is, what it reads, what its files must be."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.errors import BadInputError
from serving.inputs import InputSpec

FORMAT = 1
MANIFEST = "manifest.json"
TORCHSCRIPT = "ranker.pt"
PT2 = "ranker.pt2"
GOLDEN = "golden.json"

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        dataset: name of the dataset that the ranker was trained on.
        model: ``two-tower`` or ``dcn``.
        table_dtype: of the tables in ``ranker.pt``.
        window_days: days that a purchase history reaches back.
        history_cap: the most purchases in one.
        one_request_a_batch: whether requests are better scored one by one.
        inputs: names and types of the features.
        versions: of Python, torch and the rest, at the export.
        provenance: of the bundle that was exported.
        table_fingerprint: of the encoder of the pretrained tables; empty without.
        sizes: bytes by part of the model.
        parity: the differences that were measured, and their bounds.
        shared_tables: where in ``ranker.pt`` large tables lie: ``offset`` and ``bytes`` by name.
        files: ``bytes`` and ``sha256`` of each file.
        fingerprint: SHA-256 of all of the above.
    """

    dataset: str
    model: str
    table_dtype: str
    window_days: int
    history_cap: int
    one_request_a_batch: bool
    inputs: InputSpec
    versions: dict[str, str]
    provenance: dict[str, Any]
    table_fingerprint: str
    sizes: dict[str, int]
    parity: dict[str, Any]
    shared_tables: dict[str, dict[str, int]]
    files: dict[str, dict[str, Any]]
    fingerprint: str = ""

    def save(self, folder: Path) -> "Manifest":
        """Write it to ``folder`` with its fingerprint, and return it so."""
        signed = dataclasses.replace(self, fingerprint=self._digest())
        document = {"format": FORMAT, **dataclasses.asdict(signed)}
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        return signed

    def _digest(self) -> str:
        content = dataclasses.asdict(dataclasses.replace(self, fingerprint=""))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check the manifest of an exported ranker, without its files.

        Raises:
            BadInputError: there is none, or it is not what was written.
        """
        path = folder / MANIFEST
        content = _read_json(path, f"{folder}: no exported ranker there (no {MANIFEST})")
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != FORMAT:
            raise BadInputError(f"{path}: format {found!r}, this version reads {FORMAT}")
        names = {field.name for field in dataclasses.fields(cls)}
        if content.keys() != names:
            wrong = min(content.keys() ^ names)
            raise BadInputError(f"{path}: lacks '{wrong}' or should not have it")
        content["inputs"] = InputSpec.from_json(str(path), content["inputs"])
        manifest = cls(**content)
        if manifest.fingerprint != manifest._digest():
            raise BadInputError(
                f"{path}: was changed after the export (its fingerprint is another)"
            )
        return manifest

    def verify(self, folder: Path) -> None:
        """Check size and SHA-256 of every file of the manifest.

        Raises:
            BadInputError: it names the first file that is missing or another.
        """
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise BadInputError(f"{path}: is missing from the exported ranker")
            if describe_file(path) != expected:
                raise BadInputError(f"{path}: is not the file that was exported (SHA-256 differs)")


def describe_file(path: Path) -> dict[str, Any]:
    """Return ``bytes`` and ``sha256`` of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """A request with the probabilities that an exported ranker must give for it.

    Attributes:
        request: a raw request (`serving.raw_requests`).
        probabilities: [C] of its candidates.
        titles: [C] of its products, or None where they are not known.
        name: what the request is an example of.
    """

    name: str
    request: dict[str, Any]
    probabilities: list[float]
    titles: list[str] | None


def save_golden(folder: Path, golden: list[Golden]) -> None:
    """Write ``golden.json``."""
    document = {"requests": [dataclasses.asdict(item) for item in golden]}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / GOLDEN).write_text(text, encoding="utf-8")


def load_golden(folder: Path) -> tuple[Golden, ...]:
    """Read ``golden.json``.

    Raises:
        BadInputError: it is missing or of another form.
    """
    path = folder / GOLDEN
    content = _read_json(path, f"{path}: is missing from the exported ranker")
    try:
        return tuple(Golden(**item) for item in content["requests"])
    except (KeyError, TypeError) as error:
        raise BadInputError(f"{path}: not a list of golden requests: {error}") from error


def _read_json(path: Path, missing: str) -> Any:
    if not path.is_file():
        raise BadInputError(missing)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path}: not valid JSON: {error}") from error
