"""Configuration of graders: a TOML file whose ``kind`` says which one it is.

A folder that ``label-relevance fine-tune`` wrote holds such a file, ``grader.toml``; paths in it
are relative to the folder.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from features.config_file import check_least, from_dict, to_toml
from features.errors import BadInputError
from features.files import write_text
from features.schema import reject_unknown

GRADER = "grader.toml"
DEFAULT_PROMPT = "relevance-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityConfig:
    """The cosine of a sentence encoder, with cuts between the labels: the floor.

    Attributes:
        model: folder of the encoder; empty for the packaged MiniLM.
    """

    kind: ClassVar[str] = "similarity"
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEncoderConfig:
    """A transformer that reads query and title together, with one output for each label.

    Attributes:
        model: folder or hub name of a BERT-like encoder; empty for the packaged MiniLM.
        max_tokens: longer pairs are cut at the end of the longer text.
        epochs: most passes over the fine-tuning part; the one with the lowest validation loss
            counts.
        batch: pairs a step.
        learning_rate: peak of AdamW; warmed up, then a cosine to 0.
        warmup: share of the steps that warm up.
        weight_decay: of AdamW, on matrices.
        frozen_layers: share of the layers that stay as they are, counted from the input; the word
            vectors stay in any case.
        threads: cores to compute on.
        seed: of the order of the pairs.
    """

    kind: ClassVar[str] = "cross-encoder"
    model: str = ""
    max_tokens: int = 96
    epochs: int = 2
    batch: int = 32
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    frozen_layers: float = 0.5
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, {"max_tokens": 8, "epochs": 1, "batch": 1, "threads": 1})
        for name in ("warmup", "frozen_layers"):
            if getattr(self, name) > 1:
                raise BadInputError(f"'{name}' must be 1 or less, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalConfig:
    """A causal language model on this machine, which is asked how likely each label's name is.

    Attributes:
        model: folder or hub name.
        adapter: folder of LoRA weights, empty for none.
        prompt: name of a packaged prompt, or path of a TOML file.
        max_tokens: longer prompts are refused.
        rank: of the LoRA matrices that fine-tuning adds; 0 trains all weights, which asks for a
            learning rate of about 1e-5.
        epochs: most passes over the fine-tuning part.
        batch: pairs a step.
        learning_rate: peak of AdamW; warmed up, then a cosine to 0.
        warmup: share of the steps that warm up.
        threads: cores to compute on, where there is no GPU.
        seed: of new weights, dropout and orders.
    """

    kind: ClassVar[str] = "causal"
    model: str
    adapter: str = ""
    prompt: str = DEFAULT_PROMPT
    max_tokens: int = 1024
    rank: int = 16
    epochs: int = 1
    batch: int = 16
    learning_rate: float = 2e-4
    warmup: float = 0.05
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, {"max_tokens": 8, "batch": 1, "threads": 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """A language model behind an OpenAI-compatible HTTP interface.

    The key is read from the environment variable ``OPENAI_API_KEY`` only.

    Attributes:
        model: name, as the server knows it.
        base_url: where the interface begins; empty for ``OPENAI_BASE_URL`` of the environment, or
            OpenAI's own.
        prompt: name of a packaged prompt, or path of a TOML file.
        mode: ``chat`` asks one pair a request; ``batch`` hands in files of requests, which costs
            half at OpenAI and takes up to a day.
        constraint: how the server is told to answer with a label: by a JSON schema, or not at all.
        sampling: ``greedy`` asks for temperature 0; ``server`` leaves it to the server, as models
            that reason before they answer demand.
        logprobs: whether to ask for the probability of the answer.
        max_output_tokens: an answer longer than that is cut, and then not read.
        concurrency: requests at a time.
        requests_per_minute: the most; 0 for no limit.
        tokens_per_minute: the most, prompt and answer; 0 for no limit.
        timeout_seconds: for one answer.
        retries: further attempts for a pair, after an error or an answer that cannot be read.
        input_price: of a million tokens read.
        output_price: of a million tokens written.
        training_price: of a million tokens of fine-tuning, in each of its epochs.
        epochs: of fine-tuning; 0 leaves it to the server.
    """

    kind: ClassVar[str] = "endpoint"
    model: str
    base_url: str = ""
    prompt: str = DEFAULT_PROMPT
    mode: Literal["chat", "batch"] = "chat"
    constraint: Literal["json-schema", "none"] = "json-schema"
    sampling: Literal["greedy", "server"] = "greedy"
    logprobs: bool = False
    max_output_tokens: int = 32
    concurrency: int = 8
    requests_per_minute: float = 0.0
    tokens_per_minute: float = 0.0
    timeout_seconds: float = 60.0
    retries: int = 6
    input_price: float = 0.0
    output_price: float = 0.0
    training_price: float = 0.0
    epochs: int = 0

    def __post_init__(self) -> None:
        check_least(self, {"max_output_tokens": 1, "concurrency": 1, "timeout_seconds": 0.001})


GraderConfig = SimilarityConfig | CrossEncoderConfig | CausalConfig | EndpointConfig
_KINDS: dict[str, type[Any]] = {
    config.kind: config
    for config in (SimilarityConfig, CrossEncoderConfig, CausalConfig, EndpointConfig)
}


def read_grader_config(path: Path) -> GraderConfig:
    """Read a grader's TOML file, or that of a folder.

    Raises:
        BadInputError: the file is missing or not TOML, or a key or value does not fit.
    """
    if path.is_dir():
        path = path / GRADER
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: no such file; it says which grader it is") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: not valid TOML: {error}") from error
    kind = content.pop("kind", None)
    if not isinstance(kind, str):
        raise BadInputError(f"{path}: 'kind' must be one of {', '.join(_KINDS)}, got {kind!r}")
    reject_unknown(str(path), [kind], _KINDS, what="kind")
    return from_dict(str(path), content, _KINDS[kind])


def write_grader_config(path: Path, config: GraderConfig) -> None:
    """Write a grader's TOML file, whole or not at all."""
    write_text(path, f'kind = "{config.kind}"\n{to_toml(config)}')
