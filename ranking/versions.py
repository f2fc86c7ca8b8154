"""Do the installed torch, torchrec and fbgemm fit each other?

The three are compiled against one another and fail in ways that do not name the cause: "undefined
symbol" for another torch, "libtorch_cuda.so: cannot open" for a CUDA fbgemm beside a CPU torch,
"libnvidia-ml.so.1: cannot open" for a CUDA fbgemm on a machine without a GPU. So `check_versions`
is called before torchrec is first imported. It reads the metadata of the installed packages and
imports none of them.
"""

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from features.errors import BadInputError

# One import name, `fbgemm_gpu`; CPU first.
FBGEMM_BUILDS = ("fbgemm-gpu-cpu", "fbgemm-gpu")
CHECKED = ("torch", "torchrec", *FBGEMM_BUILDS)


class VersionMismatchError(BadInputError, ImportError):
    """The installed packages do not fit; the message is one sentence that names what to install.

    A `BadInputError`, so that commands print the sentence and exit with status 2, and an
    ``ImportError``, because it is raised where torchrec would have been imported.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """Versions that load together; any other patch release of the same minor versions does too."""

    torch: str
    torchrec: str
    fbgemm: str


# The first is the project's default, pinned in requirements/.
COMBINATIONS = (
    Combination(torch="2.13.0", torchrec="1.8.0", fbgemm="1.8.0"),
    Combination(torch="2.11.0", torchrec="1.6.1", fbgemm="1.6.0"),
)


def check_versions() -> None:
    """Raise where torch, torchrec and fbgemm are missing or do not fit each other.

    Raises:
        VersionMismatchError: with one sentence that names what to install.
    """
    problem = find_mismatch(installed_versions(), driver=has_nvidia_driver())
    if problem is not None:
        raise VersionMismatchError(problem)


def installed_versions(names: Sequence[str] = CHECKED) -> dict[str, str]:
    """Return the versions of those of the packages that are installed, by distribution name."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def has_nvidia_driver() -> bool:
    """Whether the driver's library that CUDA builds of fbgemm are linked to can be loaded."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def find_mismatch(installed: Mapping[str, str], *, driver: bool) -> str | None:
    """Say in one sentence what is wrong with these versions and what to install instead.

    Args:
        installed: version by distribution name, as `installed_versions` returns it.
        driver: whether the machine has an NVIDIA driver.

    Returns:
        The sentence, or ``None`` where the versions fit.
    """
    builds = [name for name in FBGEMM_BUILDS if name in installed]
    missing = [name for name in ("torch", "torchrec") if name not in installed]
    if not builds:
        missing.append("fbgemm")
    remedy = _remedy(installed, driver=driver)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return f"{_listed(missing)} {verb} not installed: {remedy}"

    found = [f"{name} {installed[name]}" for name in ("torch", "torchrec", *builds)]
    if len(builds) > 1:
        return (
            f"{_listed(found[2:])} are both installed and overwrite each other: uninstall both, "
            f"then {remedy}"
        )
    if builds == ["fbgemm-gpu"]:
        lacking = None
        if _is_cpu_only(installed["torch"]):
            lacking = f"a CUDA build of torch and {found[0]} is built for CPU"
        elif not driver:
            lacking = "an NVIDIA driver and this machine has none"
        if lacking:
            return f"{found[2]} needs {lacking}: uninstall fbgemm-gpu, then {remedy}"
    fitting = _combination(installed["torch"])
    if (
        fitting is None
        or _minor(fitting.torchrec) != _minor(installed["torchrec"])
        or _minor(fitting.fbgemm) != _minor(installed[builds[0]])
    ):
        return f"{found[0]} does not fit {_listed(found[1:])}: {remedy}"
    return None


def _remedy(installed: Mapping[str, str], *, driver: bool) -> str:
    """Name a combination that works: the installed torch's where it has one, else the default."""
    torch = installed.get("torch", "")
    target = _combination(torch) or COMBINATIONS[0]
    wants_cuda = "fbgemm-gpu" in installed or "+cu" in torch
    build = "fbgemm-gpu" if wants_cuda and driver and not _is_cpu_only(torch) else "fbgemm-gpu-cpu"
    return (
        f"install torch=={target.torch} {build}=={target.fbgemm}, "
        f"and torchrec=={target.torchrec} with pip's --no-deps"
    )


def _combination(torch: str) -> Combination | None:
    for combination in COMBINATIONS:
        if _minor(combination.torch) == _minor(torch):
            return combination
    return None


def _minor(version: str) -> str:
    """Return ``"2.13"`` for ``"2.13.0+cpu"``, and what is no version as it is."""
    match = re.match(r"\d+\.\d+", version)
    return match.group() if match else version


def _is_cpu_only(torch: str) -> bool:
    return torch.partition("+")[2].startswith("cpu")


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
