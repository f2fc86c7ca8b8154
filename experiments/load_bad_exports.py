"""Exported rankers that must not be taken up."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from experiments.load_bodies import GOLDEN


def _flipped_byte(folder: Path) -> None:
    """Spoil one byte in the middle of the largest file."""
    file = max((f for f in folder.iterdir() if f.is_file()), key=lambda f: f.stat().st_size)
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        byte = content.read(1)
        content.seek(-1, 1)
        content.write(bytes([byte[0] ^ 0x55]))


def _half_a_manifest(folder: Path) -> None:
    """Leave the first half of the manifest."""
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _no_model(folder: Path) -> None:
    """Take the model's file away."""
    (folder / "ranker.pt").unlink()


def _other_golden(folder: Path) -> None:
    """Change what the model must answer, with sums and fingerprint that fit."""
    file = folder / GOLDEN
    golden = json.loads(file.read_bytes())
    scored = next(one for one in golden["requests"] if one["probabilities"])
    scored["probabilities"][0] = (scored["probabilities"][0] + 0.5) % 1
    file.write_text(json.dumps(golden))
    _sign(folder)


def _sign(folder: Path) -> None:
    """Put the sums of the files as they are into the manifest."""
    from serving.manifest import Manifest, describe_file

    manifest = Manifest.load(folder)
    files = {name: describe_file(folder / name) for name in manifest.files}
    replace(manifest, files=files).save(folder)


BAD: dict[str, Callable[[Path], None]] = {
    "one byte is another": _flipped_byte,
    "half a manifest": _half_a_manifest,
    "no model": _no_model,
    "golden requests come out otherwise": _other_golden,
}
"""Ways to spoil an exported ranker's folder, by what is wrong with it then."""
