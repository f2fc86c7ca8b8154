"""State files: whole or not at all, and nothing else is taken for one."""

import errno
import subprocess

import pytest
import torch

from features.checkpoint import copy_into, load_state, save_state
from features.errors import BadInputError


@pytest.fixture
def full_disk(tmp_path):
    """A file system of one megabyte."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_was_saved_is_loaded(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.zeros(0, dtype=torch.int64)}
    save_state(tmp_path / "s", tensors, {"step": 3, "losses": [[1, 0.5]]})
    found, header = load_state(tmp_path / "s")
    assert header == {"step": 3, "losses": [[1, 0.5]]}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_full_disk_leaves_the_old_state(full_disk):
    save_state(full_disk / "s", {"a": torch.ones(10)}, {"step": 1})
    with pytest.raises(OSError, match="No space left") as raised:
        save_state(full_disk / "s", {"a": torch.ones(1_000_000)}, {"step": 2})
    assert raised.value.errno == errno.ENOSPC
    assert [path.name for path in full_disk.iterdir()] == ["s"]
    assert load_state(full_disk / "s")[1] == {"step": 1}


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".s.partial-1").write_text("half")
    save_state(tmp_path / "s", {"a": torch.ones(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="no such file"):
        load_state(tmp_path / "s")
    (tmp_path / "s").write_bytes(b"not tensors at all")
    with pytest.raises(BadInputError, match="damaged or not a safetensors file"):
        load_state(tmp_path / "s")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({}, "lacks tensor 'a'"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, "has an unknown tensor 'b'"),
        ({"a": torch.ones(3)}, r"shape \(3,\), expected \(2,\)"),
    ],
)
def test_a_state_of_another_model_is_refused(source, said):
    target = {"a": torch.zeros(2)}
    with pytest.raises(BadInputError, match=f"file: .*{said}"):
        copy_into(target, source, "file")
    assert target["a"].tolist() == [0, 0]
