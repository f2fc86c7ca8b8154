"""Fine-tuning of a language model where it runs, on human labels (paper, Section 2.2).

::

    OUTPUT/
      fine_tuning.jsonl  validation.jsonl   the chats that were handed in
      job.json                              what the endpoint calls files and job
      prompt.toml                           how the fine-tuned model is asked
      grader.toml  metrics.json  run.json   as of any fine-tuned grader
"""

import json
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embeddings.labeling.config import EndpointConfig
from embeddings.labeling.endpoint_jobs import MARK, Jobs, News, looks
from embeddings.labeling.endpoint_requests import base_url, input_tokens, shown
from embeddings.labeling.fine_tuned_folder import begin, finish
from embeddings.labeling.grades import LABELS
from embeddings.labeling.judgements import Judgements, Part, read_judgements
from embeddings.labeling.prompts import Prompt, read_prompt
from features.config_file import to_toml
from features.console import say, stderr
from features.errors import BadInputError
from features.files import atomic_file, write_text

PROMPT = "prompt.toml"
JOB = "job.json"

_PARTS: tuple[Part, ...] = ("fine_tuning", "validation")
_USUAL_EPOCHS = 3  # that OpenAI's server chooses for some thousands of examples
_MILLION = 1e6
_YES = ("y", "yes")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is known of a job.

    Attributes:
        name: its mark at the endpoint.
        files: ids of the two files, once they are handed in.
        id: of the job, once it is created.
    """

    name: str
    files: tuple[str, ...] = ()
    id: str = ""


def fine_tune(
    config: EndpointConfig,
    folder: Path,
    split: Path,
    output: Path,
    *,
    command: str = "",
    yes: bool = False,
) -> dict[str, Any]:
    """Have an endpoint fine-tune its model; returns the content of ``metrics.json``.

    A run that was stopped finds its job again.

    Args:
        config: the endpoint and the model to start from.
        folder: what the path of a prompt begins at.
        split: of `label-relevance split`.
        output: the grader's folder.
        command: the command line, for the record.
        yes: start the job without asking.

    Raises:
        BadInputError: an input breaks a rule, the user does not want it, or the endpoint refuses
            or fails.
    """
    done = begin(output, config, folder, split, command)
    if done is not None:
        return done
    prompt = read_prompt(config.prompt, folder=folder)
    write_text(output / PROMPT, to_toml(prompt))
    parts = [read_judgements(split, part) for part in _PARTS]
    sizes = [
        _write_chats(output / f"{part}.jsonl", config, prompt, judged)
        for part, judged in zip(_PARTS, parts, strict=True)
    ]
    expected = _estimate(config, sizes[0])
    began = time.monotonic()
    with Jobs(config) as jobs:
        job = _read_job(output)
        if job is None:
            _approve(expected, yes=yes)
            job = _Job(name=uuid.uuid4().hex)
            _note(output, job)
        state = _wait(config, jobs, output, _start(config, jobs, output, job))
    tuned = replace(config, model=state.fine_tuned_model, prompt=PROMPT)
    return finish(
        output,
        tuned,
        {
            "model": tuned.model,
            "base_model": config.model,
            "prompt_version": prompt.version,
            "job": state.id,
            "pairs": len(parts[0]),
            "validation_pairs": len(parts[1]),
            "estimate": expected,
            "trained_tokens": state.trained_tokens,
            "cost": config.training_price * (state.trained_tokens or 0) / _MILLION,
            "seconds_waited": time.monotonic() - began,
            "command": command,
        },
    )


def chats(config: EndpointConfig, prompt: Prompt, judged: Judgements) -> Iterator[dict[str, Any]]:
    """Yield what a model learns from: for each pair the chat that asks, with the answer.

    The answer has the form that the endpoint is later made to give: the object of
    `embeddings.labeling.prompts.answer_schema`, or the label's name alone.
    """
    pairs = judged.pairs
    for query, title, label in zip(pairs.queries, pairs.titles, judged.label, strict=True):
        name = LABELS[label]
        wrapped = config.constraint == "json-schema"
        answer = json.dumps({"label": name}, separators=(",", ":")) if wrapped else name
        chat = [*prompt.messages(query, title), {"role": "assistant", "content": answer}]
        yield {"messages": chat}


def _write_chats(path: Path, config: EndpointConfig, prompt: Prompt, judged: Judgements) -> int:
    """Write a file in the standard form; returns about how many tokens it is."""
    tokens = 0
    with atomic_file(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for chat in chats(config, prompt, judged):
            tokens += input_tokens(chat)
            file.write(json.dumps(chat, ensure_ascii=False) + "\n")
    return tokens


def _estimate(config: EndpointConfig, tokens: int) -> dict[str, float]:
    epochs = config.epochs or _USUAL_EPOCHS
    return {
        "tokens": tokens,
        "epochs": epochs,
        "cost": config.training_price * tokens * epochs / _MILLION,
    }


def _approve(expected: dict[str, float], *, yes: bool) -> None:
    """Say what the job will take, and have it approved."""
    price = f"cost {expected['cost']:,.2f}" if expected["cost"] else "no price is given"
    sentence = (
        f"about {expected['tokens']:,} tokens, {expected['epochs']} epochs of them at most, {price}"
    )
    say(f"the fine-tuning job: {sentence}")
    if yes:
        return
    if not (sys.stdin.isatty() and stderr.is_terminal):
        raise BadInputError(f"the fine-tuning job takes {sentence}; give --yes to start it")
    if stderr.input("start it? [y/N] ").strip().lower() not in _YES:
        raise BadInputError("not started")


def _read_job(output: Path) -> _Job | None:
    path = output / JOB
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return _Job(name=content["name"], files=tuple(content["files"]), id=content["id"])


def _note(output: Path, job: _Job) -> None:
    write_text(output / JOB, json.dumps(asdict(job), indent=2) + "\n")


def _start(config: EndpointConfig, jobs: Jobs, output: Path, job: _Job) -> _Job:
    """Hand in the files and create the job, as far as that is not done yet."""
    if not job.files:
        files = tuple(jobs.upload(output / f"{part}.jsonl", "fine-tune") for part in _PARTS)
        job = replace(job, files=files)
        _note(output, job)
    if not job.id:
        training, validation = job.files
        settings = {"n_epochs": config.epochs} if config.epochs else {}
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": settings}}
        created = jobs.start(
            job.name,
            lambda: jobs.client.fine_tuning.jobs.create(
                model=config.model,
                training_file=training,
                validation_file=validation,
                method=method,
                metadata={MARK: job.name},
            ),
            lambda: jobs.client.fine_tuning.jobs.list(limit=100),
        )
        job = replace(job, id=created.id)
        _note(output, job)
    return job


def _wait(config: EndpointConfig, jobs: Jobs, output: Path, job: _Job) -> Any:
    """Wait for a job's end, telling how it goes; returns its last state."""
    news = News()
    for _ in looks():
        state = jobs.call(lambda: jobs.client.fine_tuning.jobs.retrieve(job.id))
        events = jobs.call(lambda: jobs.client.fine_tuning.jobs.list_events(job.id, limit=1))
        last = f": {events.data[0].message}" if events.data else ""
        news.tell(f"job {job.id}: {state.status.replace('_', ' ')}{last}")
        if state.status == "succeeded":
            break
        if state.status in ("failed", "cancelled"):
            (output / JOB).unlink()
            why = f": {shown(state.error.message)}" if state.error and state.error.message else ""
            raise BadInputError(f"{base_url(config)}: job {job.id} {state.status}{why}")
    return state
