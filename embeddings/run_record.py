"""What a run of ``train-dashclip`` was made of, so that only the same run goes on in its folder."""

import json
from pathlib import Path

from embeddings import distributed
from embeddings.catalog import CATALOG, RELEVANCE
from embeddings.relevance import label_files
from features.errors import BadInputError
from features.files import fingerprint, write_text

CONFIG = "training.toml"
_RECORD = "run.json"
_DATA, _LABELS = "data_fingerprint", "labels_fingerprint"


def claim(output: Path, data: Path, labels: Path | None, *, config: str, command: str) -> None:
    """Make a folder this run's, or find that it is already; all processes call it together.

    Args:
        output: the model's folder.
        data: dataset folder.
        labels: folder of further labels.
        config: the resolved configuration as TOML.
        command: the command line.

    Raises:
        BadInputError: it holds something else.
    """
    files = [path for path in (data / CATALOG, data / RELEVANCE) if path.exists()]
    made_of = {_DATA: fingerprint(*files)} | _of_labels(labels)
    record, resolved = output / _RECORD, output / CONFIG
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file; name a folder")
    there = set(output.iterdir()) if output.exists() else set()
    there = {path for path in there if ".partial-" not in path.name}
    begun = there > {record, resolved}
    if begun:
        found = json.loads(record.read_text(encoding="utf-8"))
        differs = [
            what
            for what, same in (
                ("data", found.get(_DATA) == made_of[_DATA]),
                ("folder of labels", found.get(_LABELS) == made_of.get(_LABELS)),
                ("configuration", resolved.read_text(encoding="utf-8") == config),
            )
            if not same
        ]
        if differs:
            raise BadInputError(
                f"{output}: holds another run (its {differs[0]} differs); choose another --output "
                "or remove it"
            )
    elif there - {record, resolved}:
        raise BadInputError(
            f"{output}: exists and is no run of train-dashclip; choose another --output"
        )
    distributed.barrier()  # every process has looked
    if distributed.rank() == 0 and not begun:
        output.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(made_of | {"command": command}, indent=2))
        write_text(resolved, config)
    distributed.barrier()


def copy_record(source: Path, folder: Path, labels: Path | None, *, config: str) -> None:
    """Have a run begin in ``folder`` on the data of another, with labels and settings of its own.

    Args:
        source: folder of the other run.
        folder: is there.
        labels: folder of further labels, of the new run.
        config: of the new run, as TOML.
    """
    record = json.loads((source / _RECORD).read_text(encoding="utf-8"))
    record.pop(_LABELS, None)
    (folder / _RECORD).write_text(json.dumps(record | _of_labels(labels), indent=2), "utf-8")
    (folder / CONFIG).write_text(config, encoding="utf-8")


def _of_labels(labels: Path | None) -> dict[str, str]:
    return {} if labels is None else {_LABELS: fingerprint(*label_files(labels))}
