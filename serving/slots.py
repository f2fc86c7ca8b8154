"""A place for an exported ranker that is watched and filled anew while requests are served.

An exported ranker is replaced as a whole: another folder is moved to the watched path, or the
symbolic link there is pointed at another folder::

    models/current -> models/2024-08-01        ln -sfn 2024-08-08 models/next
                                               mv -T models/next models/current

Files must not be written over in place: the ranker that serves has mapped them.
"""

import datetime as dt
import os
import threading
from pathlib import Path
from typing import Any

from serving.exported import ExportedRanker
from serving.manifest import MANIFEST

_Signature = tuple[tuple[str, int, int, int, int], ...]


class Slot:
    """One named place for an exported ranker, such as ``control`` or ``treatment``.

    Attributes:
        name: of the slot.
        folder: that is watched; may be a symbolic link.
        current: the ranker that serves. Take it once for a batch and use that: it may be another
            at the next look. The old one's memory is freed when the last batch lets go of it.
    """

    current: ExportedRanker

    def __init__(self, name: str, folder: Path) -> None:
        """Load what ``folder`` holds.

        Raises:
            BadInputError: there is no exported ranker, it is damaged, or its golden requests do
                not come out.
        """
        self.name = name
        self.folder = folder
        self._swaps = 0
        self._failed_loads = 0
        self._last_error: str | None = None
        self._polling = threading.Lock()
        place = _resolved(folder)
        self._seen = _signature(place)
        self._fill(place)

    def poll(self) -> None:
        """Take up what the folder holds if that has changed; else a few calls of ``stat``.

        The new ranker is loaded, verified and asked its golden requests while the old one serves.
        One that fails is not taken, and not tried again before the folder changes again; the old
        one stays. A folder that is not there for the moment is looked at again the next time.
        """
        with self._polling:
            place = _resolved(self.folder)
            signature = _signature(place)
            if not signature or signature == self._seen:
                return
            try:
                self._fill(place)
            except Exception as error:  # whatever is wrong with the new one, the old one serves
                if _signature(_resolved(self.folder)) != signature:
                    return  # it was just being replaced
                self._failed_loads += 1
                self._last_error = str(error) or type(error).__name__
            else:
                self._swaps += 1
                self._last_error = None
            self._seen = signature

    def describe(self) -> dict[str, Any]:
        """Return what serves and what happened, in words and numbers of JSON.

        Returns:
            ``name``, ``fingerprint``, ``dataset``, ``table_dtype``, ``loaded_at`` (ISO 8601, UTC),
            ``swaps``, ``failed_loads``, and ``last_error``, why the latest content of the folder
            was not taken, or ``None``.
        """
        manifest = self.current.manifest
        return {
            "name": self.name,
            "fingerprint": manifest.fingerprint,
            "dataset": manifest.dataset,
            "table_dtype": manifest.table_dtype,
            "loaded_at": self._loaded_at.isoformat(timespec="seconds"),
            "swaps": self._swaps,
            "failed_loads": self._failed_loads,
            "last_error": self._last_error,
        }

    def _fill(self, place: Path) -> None:
        ranker = ExportedRanker.open(place)
        ranker.check_golden()
        self.current = ranker
        self._loaded_at = dt.datetime.now(dt.UTC)


def _resolved(folder: Path) -> Path:
    """Return where the links of a path lead now: one that moves must not mix two rankers."""
    return Path(os.path.realpath(folder))


def _signature(folder: Path) -> _Signature:
    """Return what tells one content of a folder from another; empty without a manifest there."""
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found = entry.stat()
                key = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
                files.append((entry.name, *key))
    except OSError:  # it is being replaced
        return ()
    return tuple(sorted(files)) if any(file[0] == MANIFEST for file in files) else ()
