"""``manifest.json``: what a folder of request records holds."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from features.errors import BadInputError
from features.files import write_text

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished.json"  # says which build is under way

# 2: records carry `purchase_age_days`. Before it manifests named no format.
FORMAT = 2


class OtherFormatError(BadInputError):
    """Request records of another format than `FORMAT`; they can be built anew."""


def week_path(folder: Path, week: int) -> Path:
    """Return where the records of ``week`` lie in ``folder``."""
    return folder / f"week-{week:04d}.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeekCounts:
    """What one week of request records holds.

    Attributes:
        requests: number of requests.
        rows: number of impressions (candidates of all requests).
        positives: number of clicked impressions.
    """

    requests: int
    rows: int
    positives: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsManifest:
    """A folder of request records.

    Attributes:
        folder: where the records lie.
        format: which columns the records have, see `FORMAT`.
        dataset: name of the dataset.
        fingerprint: SHA-256 of the dataset's files.
        window_days: length of the purchase-history window.
        history_cap: the most products in a history.
        unknown_products: impressions whose product the catalog does not hold.
        weeks: counts of each week, ascending.
    """

    folder: Path
    format: int
    dataset: str
    fingerprint: str
    window_days: int
    history_cap: int
    unknown_products: int
    weeks: dict[int, WeekCounts]

    @classmethod
    def load(cls, folder: Path) -> "RequestsManifest":
        """Read ``folder/manifest.json``.

        Raises:
            OtherFormatError: another version wrote the records.
            BadInputError: ``folder`` does not hold finished request records.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise BadInputError(f"{folder}: holds no finished request records (no {MANIFEST})")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            weeks = {int(week): WeekCounts(**c) for week, c in content.pop("weeks").items()}
            manifest = cls(folder=folder, weeks=weeks, **{"format": 1, **content})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(f"{path}: not a manifest of request records: {error}") from error
        if manifest.format != FORMAT:
            raise OtherFormatError(
                f"{path}: the request records have format {manifest.format}, expected {FORMAT}; "
                "build them again with build-features"
            )
        return manifest

    def path(self, week: int) -> Path:
        """Return the Parquet file of ``week``.

        Raises:
            BadInputError: the records hold no such week.
        """
        if week not in self.weeks:
            known = f"{min(self.weeks)} to {max(self.weeks)}"
            raise BadInputError(f"{self.folder}: holds no week {week}; it holds weeks {known}")
        return week_path(self.folder, week)

    def save(self) -> None:
        """Write ``manifest.json``, whole or not at all; it tells that the records are complete."""
        content = asdict(self)
        del content["folder"]
        write_text(self.folder / MANIFEST, json.dumps(content, indent=2) + "\n")
