"""What batches and fine-tuning jobs at an endpoint share: files, repeated calls, waiting."""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from embeddings.labeling.config import EndpointConfig
from embeddings.labeling.endpoint_requests import connect_blocking, is_passing, refusal
from embeddings.labeling.pace import back_off, retry_after
from features.console import say

if TYPE_CHECKING:
    from openai import OpenAI

Result = TypeVar("Result")

MARK = "label_relevance"
"""The key of a batch's or job's metadata that holds the name which its owner gave it."""

_FIRST_LOOK = 2.0
_LONGEST_LOOK = 60.0
_LOOKED_THROUGH = 1000  # of an account's newest batches or jobs, for one that was not noted


class Jobs:
    """Calls of an endpoint that hand in files and start long work, in a ``with`` block.

    Args:
        config: of the endpoint.

    Raises:
        BadInputError: the package is missing, or the environment holds no key for OpenAI's server.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self.client: OpenAI = connect_blocking(config)

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def call(self, function: Callable[[], Result]) -> Result:
        """Return what a call returns; one that fails in passing is repeated.

        Raises:
            BadInputError: it is refused, or keeps failing.
        """
        from openai import APIConnectionError, APIStatusError

        failures = 0
        while True:
            wait = None
            try:
                return function()
            except APIStatusError as error:
                failures += 1
                if failures > self._config.retries or not is_passing(error):
                    raise refusal(self._config, error) from None
                wait = retry_after(error.response.headers)
            except APIConnectionError as error:
                failures += 1
                if failures > self._config.retries:
                    raise refusal(self._config, error) from None
            time.sleep(back_off(failures) if wait is None else wait)

    def look(self, function: Callable[[], Result]) -> Result | None:
        """Return what a call returns as `call` does, ``None`` where there is no such thing."""
        from openai import NotFoundError

        def found() -> Result | None:
            try:
                return function()
            except NotFoundError:
                return None

        return self.call(found)

    def upload(self, path: Path, purpose: Literal["batch", "fine-tune"]) -> str:
        """Hand in a file; returns its id."""
        return self.call(lambda: self.client.files.create(file=path, purpose=purpose)).id

    def download(self, file: str) -> bytes:
        """Return the content of a file that the endpoint holds; empty if it does no more."""
        return self.look(lambda: self.client.files.content(file).content) or b""

    def start(
        self, name: str, create: Callable[[], Any], listed: Callable[[], Iterable[Any]]
    ) -> Any:
        """Start work once, whatever becomes of the response.

        Args:
            name: its `MARK`, which no other has.
            create: starts it, with that mark.
            listed: the work that the endpoint knows, the newest first.
        """
        return self.call(lambda: self.find(name, listed) or create())

    def find(self, name: str, listed: Callable[[], Iterable[Any]]) -> Any:
        """Return the work of a name, ``None`` where there is none."""
        for work in islice(listed(), _LOOKED_THROUGH):
            if (work.metadata or {}).get(MARK) == name:
                return work
        return None


def looks() -> Iterator[None]:
    """Yield whenever it is time to look at work that takes long: often at first."""
    wait = _FIRST_LOOK
    while True:
        yield
        time.sleep(wait)
        wait = min(wait * 1.5, _LONGEST_LOOK)


class News:
    """Says a line when it is another than the last."""

    def __init__(self) -> None:
        self._last = ""

    def tell(self, line: str) -> None:
        """Print the line to standard error, if it is new."""
        if line != self._last:
            say(line)
        self._last = line
