"""Fine-tuning of a causal language model on human labels (paper, Section 2.2).

The loss is that of what grading uses: minus the log probability of the label's name and the end of
the turn as the answer, and of nothing else. Where several people graded a pair, each label counts
by its share.

Legend: ``P`` pairs, ``3`` labels.
"""

import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from embeddings.batching import quiet_transformers, torch_threads
from embeddings.distributed import device
from embeddings.labeling import causal_model as models
from embeddings.labeling.answer_scores import (
    can_pack,
    parts,
    read_prefix,
    score_apart,
    score_packed,
)
from embeddings.labeling.chat_tokens import ChatTokens
from embeddings.labeling.config import CausalConfig
from embeddings.labeling.fine_tuned_folder import agreement, begin, finish
from embeddings.labeling.judgements import Judgements, read_judgements
from embeddings.labeling.prompts import Prompt, read_prompt
from embeddings.labeling.tuning import LabelStage, tune, tuning_figures
from embeddings.stage import Batch, Progress
from features.config_file import to_toml
from features.files import atomic_folder, write_text
from features.hardware import keep_freed_memory

ADAPTER = "adapter"
WEIGHTS = "model"
PROMPT = "prompt.toml"
_LARGE = 1_000_000_000  # weights from which activations are computed twice rather than kept
_LORA_DROPOUT = 0.05
_VALIDATION_TOKENS = 2048


def fine_tune(
    config: CausalConfig, folder: Path, split: Path, output: Path, *, command: str = ""
) -> dict[str, Any]:
    """Fine-tune a causal language model; returns the content of ``metrics.json``.

    With a rank, LoRA matrices are trained and saved, and the model stays where it is; with rank 0
    all weights are. A model that has an adapter already goes on with it. The epoch with the lowest
    loss on the validation part is kept. The evaluation part is not read.

    Args:
        config: of the start and of the training.
        folder: what a relative path in ``config`` begins at.
        split: folder of ``label-relevance split``.
        output: the grader's folder.
        command: the command line, for the record.

    Raises:
        BadInputError: an input breaks a rule, a pair is too long, ``output`` holds something else,
            peft is missing, or the loss became infinite.
    """
    if (figures := begin(output, config, folder, split, command)) is not None:
        return figures
    prompt = read_prompt(config.prompt, folder=folder)
    source = models.find_model(config.model, folder)
    tokenizer = models.load_tokenizer(source)
    with torch_threads(config.threads):
        keep_freed_memory()
        model = _trainable(config, source, folder)
        stage = AnswerTuning(
            model,
            ChatTokens(tokenizer, prompt, name=source),
            config,
            read_judgements(split, "fine_tuning"),
            read_judgements(split, "validation"),
        )
        progress = tune(
            stage,
            stage.model,
            output,
            bfloat16=models.choose_precision(device()) == "bfloat16",
            seed=config.seed,
        )
    return finish(
        output,
        _write(output, config, source, stage.model, tokenizer, prompt),
        {"command": command, "kind": config.kind, **_figures(stage, progress)},
    )


class AnswerTuning(LabelStage):
    """What `embeddings.stage.StageLoop` asks of a stage.

    Args:
        model: to train, in place.
        chat: the prompt's tokens.
        config: of the training.
        training: pairs to learn.
        validation: pairs that choose the epoch.

    Raises:
        BadInputError: a pair is too long.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatTokens,
        config: CausalConfig,
        training: Judgements,
        validation: Judgements,
    ) -> None:
        super().__init__(config, training, validation, weight_decay=0.0)
        self.model = model
        self.evaluation_seconds = 0.0
        limit = models.positions(model, config.max_tokens)
        self._packs = can_pack(_plain(model), limit)
        self._chat = chat
        self._questions = _questions(chat, training, limit)
        self._validation_questions = _questions(chat, validation, limit)

    def batches(self, epoch: int, size: int) -> Iterator[Batch]:
        """Yield the batches of an epoch: random pairs."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.examples)
        for first in range(0, self.examples // size * size, size):
            yield (order[first : first + size],)

    def loss(self, batch: Batch, *, epoch: float, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Return minus the mean log probability of the answers that humans gave."""
        share = self.targets[batch[0]]
        said = self._scores(
            [self._questions[row] for row in batch[0]],
            [[self._chat.answers[label] for label in np.flatnonzero(row)] for row in share],
        )
        weight = torch.from_numpy(share[share > 0]).to(said.device)
        loss = -(weight * said).sum() / len(share)
        return loss, {"loss": float(loss.detach())}

    def evaluate(self) -> dict[str, float]:
        """Return the figures on the validation part, of the probabilities that grading gives."""
        began = time.perf_counter()
        cache = read_prefix(_plain(self.model), self._chat.prefix) if self._packs else None
        scores = []
        for part in parts([len(q) for q in self._validation_questions], _VALIDATION_TOKENS):
            questions = self._validation_questions[part]
            answers = [self._chat.answers] * len(questions)
            scores.append(self._scores(questions, answers, cache).view(len(questions), -1).cpu())
        said = torch.cat(scores).log_softmax(1)
        self.evaluation_seconds = time.perf_counter() - began
        loss = -float((said * self.validation_targets).sum(1).mean())
        found = agreement(self.validation.label, said.argmax(1).numpy())
        return {"score": loss, "loss": loss, **found}

    def _scores(
        self, questions: list[list[int]], answers: list[list[list[int]]], cache: Any = None
    ) -> Tensor:
        model, prefix = _plain(self.model), self._chat.prefix
        if self._packs:
            return score_packed(model, prefix, questions, answers, cache)
        return score_apart(model, prefix, questions, answers)


def _questions(chat: ChatTokens, judgements: Judgements, limit: int) -> list[list[int]]:
    """Return the tokens of what is asked of each pair.

    Raises:
        BadInputError: there are too many for a pair.
    """
    questions = chat.questions(judgements.pairs)
    chat.check(judgements.pairs, questions, limit)
    return questions


def _plain(model: Any) -> Any:
    """Return the model of transformers that peft may have wrapped; LoRA works within it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _trainable(config: CausalConfig, source: str, folder: Path) -> Any:
    """Return the model to train, on its device; the same one for the same seed."""
    precision = models.choose_precision(device())
    adapter = folder / config.adapter if config.adapter else None
    lora = config.rank > 0
    model = models.load_causal(
        source,
        adapter=None if lora else adapter,
        # Weights that are trained are too coarse in bfloat16 for small steps.
        precision=precision if lora else "float32",
        device=device(),
    )
    if sum(p.numel() for p in model.parameters()) >= _LARGE:
        # The public way to do it has two names over the versions of transformers.
        model._set_gradient_checkpointing(
            gradient_checkpointing_func=partial(checkpoint, use_reentrant=False)
        )
    if not lora:
        return model.requires_grad_(True)
    if adapter is not None:
        return models.load_adapter(model, adapter, trainable=True)
    peft = models.import_peft()
    with torch.random.fork_rng(), models.quiet_peft():
        torch.manual_seed(config.seed)
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=config.rank,
                lora_alpha=2 * config.rank,
                lora_dropout=_LORA_DROPOUT,
                target_modules="all-linear",
            ),
        )


def _write(
    output: Path, config: CausalConfig, source: str, model: Any, tokenizer: Any, prompt: Prompt
) -> CausalConfig:
    """Write weights and prompt; returns the configuration of the fine-tuned grader."""
    write_text(output / PROMPT, to_toml(prompt))
    if not config.rank:
        with quiet_transformers(), atomic_folder(output / WEIGHTS) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        return replace(config, model=WEIGHTS, adapter="", prompt=PROMPT)
    base = models.relative(source, output)
    for entry in model.peft_config.values():
        entry.base_model_name_or_path = base
    with models.quiet_peft(), atomic_folder(output / ADAPTER) as scratch:
        model.save_pretrained(scratch, save_embedding_layers=False)
        (scratch / "README.md").unlink(missing_ok=True)  # a form that nobody filled in
    return replace(config, model=base, adapter=ADAPTER, prompt=PROMPT)


def _figures(stage: AnswerTuning, progress: Progress) -> dict[str, Any]:
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    pairs = len(stage.validation)
    memory = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        memory["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return {
        "trained_weights": trained,
        **tuning_figures(stage.examples, progress),
        "validation": {"pairs": pairs, **progress.evaluations[progress.best]},
        "grading_pairs_per_second": pairs / max(stage.evaluation_seconds, 1e-9),
        **memory,
    }
