"""The grader that asks a causal language model on this machine how likely each label is.

Nothing is generated and nothing parsed: the three names are scored as the assistant's answers, each
with the end of its turn, and share the probability among themselves. The answers are whole texts of
which at most one can be given, so that their lengths need no correction: a longer name is not
less likely for its length once the model has been told the three names, and fine-tuning maximises
just this probability.

Legend: ``P`` pairs, ``3`` labels.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.batching import torch_threads
from embeddings.labeling.chat_tokens import ChatTokens
from embeddings.labeling.config import CausalConfig
from embeddings.labeling.grades import LABELS, Grades, Pairs
from embeddings.labeling.prompts import Prompt, read_prompt
from features.hardware import Precision, keep_freed_memory

_CHUNK_PAIRS = 1024
_CPU_TOKENS = 512  # of a batch; more of them make the attention's mask dearer than they save
_GPU_TOKENS = 4096
_SCORING = 1  # changes with what the scores mean


class CausalGrader:
    """Grades with a causal language model; implements `embeddings.labeling.grades.Grader`.

    Args:
        language_model: of transformers, on the device to compute on.
        chat: the prompt's tokens.
        max_tokens: of the longest chat.
        threads: cores to compute on, where there is no GPU.
        model: the grader's name.
        prompt_version: of the prompt.
        fingerprint: of weights, tokenizer, adapter and prompt.

    Raises:
        BadInputError: the prompt alone is too long.
    """

    chunk_pairs = _CHUNK_PAIRS

    def __init__(
        self,
        language_model: Any,
        chat: ChatTokens,
        *,
        max_tokens: int,
        threads: int,
        model: str,
        prompt_version: str,
        fingerprint: str,
    ) -> None:
        from embeddings.labeling.answer_scores import can_pack
        from embeddings.labeling.causal_model import positions

        self.model = model
        self.prompt_version = prompt_version
        self.fingerprint = fingerprint
        self._language_model = language_model
        self._chat = chat
        self._limit = positions(language_model, max_tokens)
        self._threads = threads
        self._packs = can_pack(language_model, self._limit)
        self._cache: Any = None
        chat.check(Pairs(queries=[], titles=[]), [], self._limit)

    @classmethod
    def open(
        cls, config: CausalConfig, folder: Path, *, precision: Precision | None = None
    ) -> "CausalGrader":
        """Return the grader of a configuration.

        Args:
            config: of the grader.
            folder: what a relative path in ``config`` begins at.
            precision: of the weights; by default bfloat16 on a GPU and on processors that compute
                with it, else float32.

        Raises:
            BadInputError: model, adapter or prompt cannot be had or do not fit each other.
        """
        from embeddings.distributed import device
        from embeddings.labeling import causal_model as models

        prompt = read_prompt(config.prompt, folder=folder)
        source = models.find_model(config.model, folder)
        adapter = folder / config.adapter if config.adapter else None
        tokenizer = models.load_tokenizer(source)
        chat = ChatTokens(tokenizer, prompt, name=source)
        precision = precision or models.choose_precision(device())
        language_model = models.load_causal(
            source, adapter=adapter, precision=precision, device=device()
        )
        keep_freed_memory()
        found = _fingerprint(source, adapter, prompt)
        name = folder.resolve().name if adapter else Path(source).resolve().name
        return cls(
            language_model,
            chat,
            max_tokens=config.max_tokens,
            threads=config.threads,
            model=f"{name}-{found[-8:]}",
            prompt_version=prompt.version,
            fingerprint=found,
        )

    def grade(self, pairs: Pairs) -> Iterator[Grades]:
        """Yield the grades of a batch of pairs after the other, in their order.

        Raises:
            BadInputError: a pair is too long; no pair has been graded then.
        """
        from embeddings.labeling.answer_scores import parts

        questions = self._chat.questions(pairs)
        self._chat.check(pairs, questions, self._limit)
        on_gpu = self._language_model.device.type == "cuda"
        added = sum(map(len, self._chat.answers))
        tokens = [len(question) + added for question in questions]
        for part in parts(tokens, _GPU_TOKENS if on_gpu else _CPU_TOKENS):
            scores = self._scores(questions[part])
            yield Grades(
                position=np.arange(part.start, part.stop),
                label=scores.argmax(1).astype(np.int8),
                probability=softmax(scores),
            )

    def _scores(self, questions: Sequence[list[int]]) -> np.ndarray:
        """Return the log probability of each label's answer, [P, 3] float32."""
        import torch

        from embeddings.labeling.answer_scores import read_prefix, score_apart, score_packed

        model, prefix = self._language_model, self._chat.prefix
        answers = [self._chat.answers] * len(questions)
        with torch.inference_mode(), torch_threads(self._threads):
            if self._packs:
                if self._cache is None:
                    self._cache = read_prefix(model, prefix)
                found = score_packed(model, prefix, questions, answers, self._cache)
            else:
                found = score_apart(model, prefix, questions, answers)
            return found.view(-1, len(LABELS)).cpu().numpy()


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return the probabilities [P, 3] float32 of log probabilities."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True), np.float32)


def _fingerprint(source: str, adapter: Path | None, prompt: Prompt) -> str:
    from embeddings.labeling.causal_model import model_fingerprint

    parts = [
        model_fingerprint(source),
        model_fingerprint(str(adapter)) if adapter else "",
        prompt.version,
        _SCORING,
    ]
    return f"causal-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"
