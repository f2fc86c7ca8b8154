"""Which torch, torchrec and fbgemm fit, and what the sentence says where they do not."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from features.errors import BadInputError
from ranking import versions
from ranking.versions import (
    COMBINATIONS,
    VersionMismatchError,
    check_versions,
    find_mismatch,
    installed_versions,
)

ROOT = Path(__file__).parents[2]
DEFAULT_CPU = (
    "install torch==2.13.0 fbgemm-gpu-cpu==1.8.0, and torchrec==1.8.0 with pip's --no-deps"
)
DEFAULT_CUDA = DEFAULT_CPU.replace("-cpu", "")
OLDER_CUDA = "install torch==2.11.0 fbgemm-gpu==1.6.0, and torchrec==1.6.1 with pip's --no-deps"


def packages(torch=None, torchrec=None, cpu=None, cuda=None):
    given = {"torch": torch, "torchrec": torchrec, "fbgemm-gpu-cpu": cpu, "fbgemm-gpu": cuda}
    return {name: version for name, version in given.items() if version is not None}


@pytest.mark.parametrize(
    "installed",
    [
        packages("2.13.0", "1.8.0", cpu="1.8.0"),
        packages("2.13.0+cpu", "1.8.0", cpu="1.8.0"),
        packages("2.13.0+cu130", "1.8.0", cpu="1.8.0"),
        packages("2.13.0+cu130", "1.8.0", cuda="1.8.0"),
        packages("2.13.1", "1.8.2", cuda="1.8.1+cu130"),
        packages("2.11.0+cu130", "1.6.1", cuda="1.6.0"),
        packages("2.11.0a0+1f2e3d", "1.6.0", cuda="1.6.0"),
    ],
)
def test_fitting_versions_pass(installed):
    assert find_mismatch(installed, driver=True) is None


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        (
            packages("2.12.0", "1.8.0", cpu="1.8.0"),
            f"torch 2.12.0 does not fit torchrec 1.8.0 and fbgemm-gpu-cpu 1.8.0: {DEFAULT_CPU}",
        ),
        (
            packages("2.13.0+cpu", "1.9.2", cpu="1.8.0"),
            f"torch 2.13.0+cpu does not fit torchrec 1.9.2 and fbgemm-gpu-cpu 1.8.0: {DEFAULT_CPU}",
        ),
        (
            packages("2.13.0+cu130", "1.8.0", cuda="1.9.0"),
            f"torch 2.13.0+cu130 does not fit torchrec 1.8.0 and fbgemm-gpu 1.9.0: {DEFAULT_CUDA}",
        ),
        (
            packages("2.11.0+cu130", "1.8.0", cuda="1.8.0"),
            f"torch 2.11.0+cu130 does not fit torchrec 1.8.0 and fbgemm-gpu 1.8.0: {OLDER_CUDA}",
        ),
        (
            packages("2.1.0", "1.8.0", cpu="1.8.0"),
            f"torch 2.1.0 does not fit torchrec 1.8.0 and fbgemm-gpu-cpu 1.8.0: {DEFAULT_CPU}",
        ),
        (
            packages("2.13.0+cpu", "1.8.0", cuda="1.8.0"),
            "fbgemm-gpu 1.8.0 needs a CUDA build of torch and torch 2.13.0+cpu is built for CPU: "
            f"uninstall fbgemm-gpu, then {DEFAULT_CPU}",
        ),
        (
            packages("2.13.0+cpu", "1.8.0", cpu="1.8.0", cuda="1.9.0"),
            "fbgemm-gpu-cpu 1.8.0 and fbgemm-gpu 1.9.0 are both installed and overwrite each "
            f"other: uninstall both, then {DEFAULT_CPU}",
        ),
        (packages("2.13.0", cpu="1.8.0"), f"torchrec is not installed: {DEFAULT_CPU}"),
        (packages("2.11.0+cu130", "1.6.1"), f"fbgemm is not installed: {OLDER_CUDA}"),
        (packages(), f"torch, torchrec and fbgemm are not installed: {DEFAULT_CPU}"),
    ],
)
def test_others_are_told_what_to_install(installed, sentence):
    assert find_mismatch(installed, driver=True) == sentence


def test_what_each_sentence_advises_fits():
    for installed in (packages(), packages("2.11.0+cu130"), packages("2.12.0+cpu", cuda="1.7.0")):
        advised = dict(re.findall(r"(\S+)==([\d.]+)", find_mismatch(installed, driver=True)))
        assert find_mismatch(advised, driver=True) is None


def test_cuda_build_needs_a_driver():
    cuda = packages("2.13.0", "1.8.0", cuda="1.8.0")
    assert find_mismatch(cuda, driver=True) is None
    assert find_mismatch(cuda, driver=False) == (
        "fbgemm-gpu 1.8.0 needs an NVIDIA driver and this machine has none: "
        f"uninstall fbgemm-gpu, then {DEFAULT_CPU}"
    )
    assert find_mismatch(packages("2.13.0+cu130", "1.8.0", cpu="1.8.0"), driver=False) is None


def test_error_is_both_bad_input_and_an_import_error(monkeypatch):
    monkeypatch.setattr(versions, "installed_versions", lambda: packages("2.13.0", cpu="1.8.0"))
    with pytest.raises(VersionMismatchError) as caught:
        check_versions()
    assert isinstance(caught.value, BadInputError)
    assert isinstance(caught.value, ImportError)
    assert str(caught.value) == f"torchrec is not installed: {DEFAULT_CPU}"


def test_absent_packages_are_left_out(monkeypatch):
    def version(name):
        if name != "torch":
            raise metadata.PackageNotFoundError(name)
        return "2.13.0"

    monkeypatch.setattr(metadata, "version", version)
    assert installed_versions() == {"torch": "2.13.0"}


def test_installed_versions_fit_and_are_read_without_an_import():
    code = (
        "import sys; from ranking.versions import check_versions; check_versions(); "
        "print({'torch', 'torchrec', 'fbgemm_gpu'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_requirements_pin_the_default_combination():
    pins = {}
    for name in ("common", "cpu", "cuda", "torchrec"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text()
        pins.update(re.findall(r"^([\w-]+)==([\w.]+)", text, flags=re.MULTILINE))
    default = COMBINATIONS[0]
    assert pins["torch"] == default.torch
    assert pins["torchrec"] == default.torchrec
    assert pins["fbgemm-gpu-cpu"] == pins["fbgemm-gpu"] == default.fbgemm
