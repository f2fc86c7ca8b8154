"""What ``serve-ranker`` is told, and how its worker processes learn of it."""

import dataclasses
import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from features.config_file import check_least
from features.errors import BadInputError

API_KEY_VARIABLE = "RANKER_API_KEY"
FAILURE_VARIABLE = "RANKER_FAILURE_FILE"
"""Names the file where a worker leaves the reason why it cannot start."""
_SETTINGS_VARIABLE = "RANKER_SETTINGS"
_FOLDERS = ("bundle", "treatment", "exposures")
_AT_LEAST_1 = (
    *("workers", "queue", "deadline_ms", "batch_candidates"),
    *("max_body_kb", "max_candidates", "max_connections"),
)
_LEAST = {**dict.fromkeys(_AT_LEAST_1, 1), "poll_seconds": 0.01}
_HIGHEST_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Serve an exported ranker over HTTP.

    Listens until it is told to stop by SIGTERM or Ctrl-C, and then answers what it has accepted.
    SIGHUP replaces its worker processes one after the other. A new export in the bundle's folder
    is taken up without a stop. With RANKER_API_KEY in the environment, every path but /healthz and
    /readyz asks for the header "Authorization: Bearer KEY".
    """

    bundle: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder that export-ranker wrote."""
    treatment: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Another exported ranker, for an A/B test; --bundle is the control then."""
    treatment_share: float = 0.5
    """Share of the users who meet the treatment, from 0 to 1."""
    salt: str = ""
    """Name of the A/B test; another name deals the users anew."""
    store: Annotated[str | None, tyro.conf.arg(metavar="SPEC")] = None
    """Where purchase histories are looked up by user id: parquet:PATH or redis://HOST:PORT/DB."""
    exposures: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the exposure log; without it nothing is logged of what was shown."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of the machine's."""
    port: int = 8000
    """Port to listen on; 0 for any free one."""
    workers: int = 2
    """Worker processes; each scores on one core, and all share the tables' memory."""
    queue: int = 64
    """The most requests that a worker has accepted and not answered; further ones get 429."""
    deadline_ms: int = 1000
    """Milliseconds in which a request is answered, else 504."""
    batch_candidates: int = 400
    """The most candidates of several requests that are scored together."""
    batch_wait_ms: float = 0.0
    """Milliseconds that a request may wait for others to be scored together with."""
    max_body_kb: int = 1024
    """The largest body of a request, in units of 1024 bytes; larger ones get 413."""
    max_candidates: int = 1000
    """The most candidates of a request."""
    max_history: int = 1000
    """The most purchases in a request."""
    max_connections: int = 1000
    """The most connections that a worker holds open."""
    poll_seconds: float = 1.0
    """How often each worker looks whether there is a new export in its folder."""
    drain_seconds: float = 0.0
    """How long to go on listening after SIGTERM, with /readyz at 503, so that a load balancer
    sends no more."""

    @property
    def max_body_bytes(self) -> int:
        """The largest body of a request."""
        return self.max_body_kb * 1024

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """Raise for settings that make no sense.

        Raises:
            BadInputError: it names the setting and its value.
        """
        check_least(self, _LEAST)
        if self.port > _HIGHEST_PORT:
            raise BadInputError(f"'port' must be {_HIGHEST_PORT} or less, got {self.port}")
        if not 0 <= self.treatment_share <= 1:
            raise BadInputError(
                f"'treatment_share' must be from 0 to 1, got {self.treatment_share}"
            )
        if (self.treatment is None) != (not self.salt):
            raise BadInputError(
                "'treatment' and 'salt' go together: an A/B test has an exported ranker and a name"
            )
        if os.environ.get(API_KEY_VARIABLE) == "":
            raise BadInputError(f"{API_KEY_VARIABLE} is empty: set a key, or unset it for none")

    def to_environment(self) -> None:
        """Put the settings where worker processes find them."""
        plain = dataclasses.asdict(self)
        for name in _FOLDERS:
            plain[name] = None if plain[name] is None else str(plain[name])
        os.environ[_SETTINGS_VARIABLE] = json.dumps(plain)

    @classmethod
    def from_environment(cls) -> "ServerConfig":
        """Return the settings that `to_environment` put there."""
        plain = json.loads(os.environ[_SETTINGS_VARIABLE])
        for name in _FOLDERS:
            plain[name] = None if plain[name] is None else Path(plain[name])
        return cls(**plain)


def api_key() -> str | None:
    """Return the key that callers must know; ``None`` where anybody may call."""
    return os.environ.get(API_KEY_VARIABLE)
