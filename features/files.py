"""Outputs that appear whole or not at all."""

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _scratch_for(target: Path) -> Path:
    """Return a new scratch path beside ``target``; what killed processes left there is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a scratch path that becomes ``target`` when the block ends well.

    The scratch file lies beside the target (same file system), is flushed to disk before the
    rename, and is removed when the block raises.
    """
    scratch = _scratch_for(target)
    try:
        yield scratch
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty scratch folder that becomes ``target`` when the block ends well.

    An existing ``target`` is replaced only then.
    """
    scratch = _scratch_for(target)
    scratch.mkdir()
    try:
        yield scratch
        if target.exists():
            shutil.rmtree(target)
        scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` to ``target``, whole or not at all."""
    with atomic_file(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


def fingerprint(*paths: Path) -> str:
    """Return the SHA-256 (hex) of the names and contents of files and folders of files."""
    digest = hashlib.sha256()
    for root in paths:
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        for file in files:
            if not file.is_file():
                continue
            digest.update(file.relative_to(root.parent).as_posix().encode())
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
