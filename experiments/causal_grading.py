"""Measures what sharing the prompt saves a grader that asks a causal language model.

The same pairs are graded twice: as `embeddings.labeling.causal` does it, the prompt read once and
all answers of a batch in one sequence, and the plain way, a whole chat for each of the three
answers. Training steps are measured alike. Both ways must give the same numbers.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from features.console import print_table, run_command, say
from features.files import write_text

Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]

_STEPS = 2
_BATCH = 16
_BATCH_TOKENS = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Measure what sharing the prompt saves a grader that asks a causal language model."""

    split: Folder
    """Folder of ``label-relevance split``; pairs are of its evaluation part."""
    output: Annotated[Path, tyro.conf.arg(metavar="JSON")]
    """File of the figures."""
    model: str | None = None
    """Folder or hub name; if not given, random weights of 16 million (8 layers of 320)."""
    prompt: str = "relevance-1"
    """Name of a packaged prompt, or path of a TOML file."""
    pairs: int = 32
    """Pairs to grade."""
    threads: int = 1
    """Cores to compute on, where there is no GPU."""


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _run, prog="causal_grading")


def _run(options: Options) -> None:
    figures = measure(options)
    write_text(options.output, json.dumps(figures, indent=2) + "\n")
    rows = [(name.replace("_", " "), f"{value:,.4g}") for name, value in _numbers(figures)]
    print_table("grading with a causal language model", ("what", "figure"), rows)


def measure(options: Options) -> dict[str, Any]:
    """Return the figures: pairs/s both ways, their ratio and the largest difference of scores."""
    import torch

    from embeddings.batching import torch_threads
    from embeddings.distributed import device
    from embeddings.labeling import causal_model as models
    from embeddings.labeling.answer_scores import (
        parts,
        read_prefix,
        score_apart,
        score_packed,
    )
    from embeddings.labeling.chat_tokens import ChatTokens
    from embeddings.labeling.judgements import read_judgements
    from embeddings.labeling.prompts import read_prompt

    found = read_judgements(options.split, "evaluation")
    pairs = found.pairs.take(range(min(options.pairs, len(found))))  # type: ignore[arg-type]
    precision = models.choose_precision(device())
    with _model(options.model, found.pairs.titles) as source, torch_threads(options.threads):
        chat = ChatTokens(
            models.load_tokenizer(source), read_prompt(options.prompt), name="the model"
        )
        model = models.load_causal(source, adapter=None, precision=precision, device=device())
        questions = chat.questions(pairs)
        batches = list(parts([len(q) + 8 for q in questions], _BATCH_TOKENS[device().type]))

        def shared() -> torch.Tensor:
            cache = read_prefix(model, chat.prefix)
            return torch.cat([packed(part, cache) for part in batches])

        def packed(part: slice, cache: Any) -> torch.Tensor:
            answers = [chat.answers] * len(questions[part])
            return score_packed(model, chat.prefix, questions[part], answers, cache)

        def plain() -> torch.Tensor:
            return score_apart(model, chat.prefix, questions, [chat.answers] * len(questions))

        with torch.inference_mode():
            say(f"grading {len(questions)} pairs both ways")
            timed = {"shared": _timed(shared), "plain": _timed(plain)}
        say("training both ways")
        steps = {
            name: _timed(partial(_steps, model, chat, questions, score))
            for name, score in (("shared", score_packed), ("plain", score_apart))
        }
    grading = {name: len(questions) / seconds for name, (seconds, _) in timed.items()}
    training = {name: _STEPS * _BATCH / seconds for name, (seconds, _) in steps.items()}
    return {
        "model": options.model or "random",
        "weights": sum(p.numel() for p in model.parameters()),
        "device": device().type,
        "precision": precision,
        "threads": options.threads,
        "prompt_tokens": len(chat.prefix),
        "question_tokens": sum(map(len, questions)) / len(questions),
        "grading_pairs_per_second": grading | {"ratio": grading["shared"] / grading["plain"]},
        "training_pairs_per_second": training | {"ratio": training["shared"] / training["plain"]},
        "largest_difference": float((timed["shared"][1] - timed["plain"][1]).abs().max()),
    }


def _steps(model: Any, chat: Any, questions: list[list[int]], score: Callable[..., Any]) -> Any:
    """Compute the gradient of some batches, each question with one answer."""
    for step in range(_STEPS):
        batch = [questions[(step * _BATCH + row) % len(questions)] for row in range(_BATCH)]
        answers = [[chat.answers[row % 3]] for row in range(_BATCH)]
        model.zero_grad()
        score(model, chat.prefix, batch, answers).mean().backward()


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    import torch

    if torch.cuda.is_available():
        work()  # chooses kernels
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


@contextmanager
def _model(name: str | None, texts: Any) -> Iterator[str]:
    """Yield the model's folder or hub name; one is made where none is given."""
    if name is not None:
        yield name
        return
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from embeddings.batching import quiet_transformers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=16_384,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    sizes = {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 5, "num_key_value_heads": 5, "tie_word_embeddings": True}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        LlamaForCausalLM(
            LlamaConfig(**sizes, **heads, **ends, vocab_size=16_384, max_position_embeddings=8192)
        ).save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
        ).save_pretrained(folder)
        yield folder


def _numbers(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from ((f"{name}: {key}", number) for key, number in _numbers(value))
        elif isinstance(value, int | float):
            yield name, value


if __name__ == "__main__":
    sys.exit(main())
