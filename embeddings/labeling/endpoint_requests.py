"""What is sent to an OpenAI-compatible endpoint, what comes back, and what its errors mean."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from embeddings.labeling.config import EndpointConfig
from embeddings.labeling.grades import LABELS, UNGRADED, Grades
from embeddings.labeling.prompts import Prompt, answer_schema, parse_answer
from features.errors import BadInputError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI, OpenAI

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"
OF_THE_PAIR = ("context_length_exceeded", "content_filter", "content_policy_violation")
"""Codes of errors that are due to one pair and not to the way it is asked."""

_NO_KEY = "none"  # what is sent to a server of one's own, which asks for none
_BYTES_PER_TOKEN = 3.0  # of English with its chat marks; rather too few
_MESSAGE_TOKENS = 8
_SHOWN = 300
_MILLION = 1e6
_OUT_OF_MONEY = ("insufficient_quota", "billing_hard_limit_reached")


class MalformedError(ValueError):
    """A response that is no chat completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one response says.

    Attributes:
        label: 0, 1 or 2; ``None`` where the answer was cut or does not state exactly one label.
        probability: of the label; NaN where the endpoint does not tell.
        text: the answer.
        input_tokens: read, as the endpoint counts them; ``None`` where it does not.
        output_tokens: written.
    """

    label: int | None
    probability: float
    text: str
    input_tokens: int | None
    output_tokens: int | None


def base_url(config: EndpointConfig) -> str:
    """Return where the interface begins: of the configuration, the environment, or OpenAI's."""
    return (config.base_url or os.environ.get(URL_VARIABLE) or OPENAI_URL).rstrip("/")


def connect(config: EndpointConfig) -> "AsyncOpenAI":
    """Return a client that does not retry by itself; to be closed in its event loop.

    Raises:
        BadInputError: the package is missing, or the environment holds no key for OpenAI's server.
    """
    settings = _settings(config)
    from openai import AsyncOpenAI

    return AsyncOpenAI(**settings)


def connect_blocking(config: EndpointConfig) -> "OpenAI":
    """Return a client as `connect` does, for one request at a time."""
    settings = _settings(config)
    from openai import OpenAI

    return OpenAI(**settings)


def _settings(config: EndpointConfig) -> dict[str, Any]:
    if find_spec("openai") is None:
        raise BadInputError(
            "an endpoint needs the package 'openai': pip install 'dashclip-ranker[labeling]'"
        )
    url, key = base_url(config), os.environ.get(KEY_VARIABLE)
    if not key and url == OPENAI_URL:
        raise BadInputError(f"{url} asks for a key: set the environment variable {KEY_VARIABLE}")
    return {
        "base_url": url,
        "api_key": key or _NO_KEY,
        "max_retries": 0,
        "timeout": config.timeout_seconds,
    }


def chat_body(
    config: EndpointConfig, prompt: Prompt, query: str, title: str, *, again: bool = False
) -> dict[str, Any]:
    """Return the body of a chat request for one pair.

    Args:
        config: of the endpoint.
        prompt: how to ask.
        query: of the pair.
        title: of the pair.
        again: whether an answer to the same could not be read. The server then samples as it
            likes, since at temperature 0 it would say the same.
    """
    body: dict[str, Any] = {
        "model": config.model,
        "messages": prompt.messages(query, title),
        "max_completion_tokens": config.max_output_tokens,
    }
    if config.sampling == "greedy" and not again:
        body["temperature"] = 0
    if config.constraint == "json-schema":
        schema = {"name": "grade", "strict": True, "schema": answer_schema()}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if config.logprobs:
        body["logprobs"] = True
    return body


def read_completion(body: Any) -> Completion:
    """Read the body of a response to `chat_body`, as parsed from JSON.

    An answer that was cut at ``max_output_tokens``, or that a filter cut, states no label.

    Raises:
        MalformedError: the body is no chat completion.
    """
    try:
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        finish = choice.get("finish_reason")
        usage = body.get("usage") or {}
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        tokens = [(str(token["token"]), float(token["logprob"])) for token in logprobs]
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise MalformedError("it is no chat completion") from error
    if not isinstance(text, str):
        raise MalformedError("its content is no text")
    label = None if finish in ("length", "content_filter") else parse_answer(text)
    read, written = (count if isinstance(count, int) else None for count in counts)
    return Completion(
        label=label,
        probability=math.nan if label is None else _probability(LABELS[label], tokens),
        text=text,
        input_tokens=read,
        output_tokens=written,
    )


def _probability(label: str, tokens: list[tuple[str, float]]) -> float:
    """Return the probability of the tokens that spell a label's name within an answer."""
    start = "".join(token for token, _ in tokens).casefold().rfind(label)
    if start < 0:
        return math.nan
    total, at = 0.0, 0
    for token, logprob in tokens:
        if at < start + len(label) and at + len(token) > start:
            total += logprob
        at += len(token)
    return min(math.exp(min(total, 0.0)), 1.0)


def grades_of(answers: list[tuple[int, int | None, float]]) -> Grades:
    """Return grades of positions, labels and the labels' probabilities."""
    position = np.array([at for at, _, _ in answers], np.int64)
    label = np.array([UNGRADED if x is None else x for _, x, _ in answers], np.int8)
    probability = np.full((len(answers), len(LABELS)), np.nan, np.float32)
    told = np.flatnonzero(label != UNGRADED)
    probability[told, label[told]] = [answers[row][2] for row in told]
    return Grades(position=position, label=label, probability=probability)


def input_tokens(body: Mapping[str, Any]) -> int:
    """Return about how many tokens the messages of a request are, rather too many."""
    texts = [message["content"] for message in body["messages"]]
    size = sum(len(text.encode()) for text in texts)
    return math.ceil(size / _BYTES_PER_TOKEN) + _MESSAGE_TOKENS * len(texts)


def cost(config: EndpointConfig, input_tokens: int, output_tokens: int) -> float:
    """Return what tokens cost."""
    read, written = config.input_price * input_tokens, config.output_price * output_tokens
    return (read + written) / _MILLION


def is_of_the_pair(error: "APIStatusError") -> bool:
    """Return whether an endpoint refuses one pair (too long, filtered) and not the way it asks."""
    return error.status_code == 400 and error.code in OF_THE_PAIR


def is_passing(error: "APIStatusError") -> bool:
    """Return whether a refused request may succeed later."""
    if error.status_code == 429:
        return error.code not in _OUT_OF_MONEY
    return error.status_code in (408, 409, 425) or error.status_code >= 500


def refusal(config: EndpointConfig, error: Exception) -> BadInputError:
    """Return what a user is told of an error that ends a run, in one sentence without the key."""
    status = getattr(error, "status_code", None)
    advice = {
        401: f"; is {KEY_VARIABLE} the right key?",
        403: f"; the key in {KEY_VARIABLE} may not do this",
        404: f"; does it know the model {config.model!r}?",
    }
    refused = f" refuses with status {status}" if status else " gives no answer"
    text = f"{base_url(config)}{refused}: {shown(error)}{advice.get(status or 0, '')}"
    return BadInputError(text)


def shown(error: object) -> str:
    """Return an error's text on one line, cut, and without the key."""
    said = getattr(error, "body", None)  # the server's words; the message may lack them
    if isinstance(said, Mapping):
        said = said.get("message") or said.get("detail")
    text = " ".join(str(said or error).split()) or type(error).__name__
    key = os.environ.get(KEY_VARIABLE)
    if key:
        text = text.replace(key, "***")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def parse_json(text: str) -> Any:
    """Return the content of a response.

    Raises:
        MalformedError: it is not JSON, for instance since it was cut.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise MalformedError("it is not JSON") from error
