"""A run of ``train-dashclip``: from a dataset folder to a saved model.

::

    OUTPUT/
      config.json, model.safetensors, tokenizer files     the model, as transformers saves it
      training_queries.parquet                            what it was trained on, as hashes
      start/             the same model before training
      training.json      figures of both stages           training.toml  resolved configuration
      run.json           what the run was made of         checkpoint/    state of the training
      tensorboard/       scalars
"""

import json
import resource
import shutil
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from embeddings import distributed
from embeddings.alignment import Alignment
from embeddings.batching import quiet_transformers, torch_threads
from embeddings.catalog import RELEVANCE, Catalog, read_catalog
from embeddings.config import DashClipTraining, StageConfig
from embeddings.corpus import Corpus
from embeddings.cropping import TitleCrops
from embeddings.dashclip import DashClip
from embeddings.freezing import freeze
from embeddings.pretraining import Pretraining
from embeddings.relevance import (
    Relevance,
    held_out_queries,
    read_relevance,
    write_training_queries,
)
from embeddings.run_record import CONFIG, claim, copy_record
from embeddings.sampling import TupleSampler
from embeddings.stage import Progress, Stage, StageLoop, describe
from embeddings.starts import Start, fit_projections, load_start
from features.checkpoint import copy_into, load_state, save_state
from features.config_file import from_toml, to_toml
from features.console import say
from features.errors import BadInputError
from features.files import atomic_folder, write_text
from features.hardware import fast_precision, keep_freed_memory
from features.monitor import Monitor

FIGURES = "training.json"
START = "start"
_STAGE_1 = Path("checkpoint", "stage-1.safetensors")
_TITLE_CROPS = Path("checkpoint", "title-crops.safetensors")
_FEWEST = 2  # products, or titles, that can be contrasted


def train_dashclip(
    data: Path,
    output: Path,
    *,
    labels: Path | None = None,
    config: DashClipTraining | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train DashCLIP on a dataset folder; returns the content of ``training.json``.

    Stage 1 runs where products have both an image and a title, stage 2 where the dataset has
    relevance labels. A run that was stopped carries on; one that is complete is not repeated.

    Args:
        data: dataset folder: the catalog and, if there, the relevance labels.
        output: the model's folder.
        labels: folder of ``label-relevance label``, whose labels stage 2 reads beside the
            dataset's; ``config.alignment.labels`` says which of them count.
        config: of start, stages and data.
        command: the command line, for the record.

    Raises:
        BadInputError: an input breaks a rule, there is nothing to train on, or ``output`` holds
            something else.
    """
    config = config or DashClipTraining()
    with distributed.process_group(), torch_threads(max(1, config.threads // distributed.world())):
        keep_freed_memory()
        return _Run(data, output, labels, config, command).execute()


def begin_at_stage_2(
    source: Path, output: Path, config: DashClipTraining, *, labels: Path | None = None
) -> None:
    """Begin a run on the data of another with what that one had before stage 2.

    `train_dashclip` then goes on in ``output`` and gives what it would have given from the start.
    Where ``output`` exists, nothing happens.

    Args:
        source: folder of the other run, which has finished.
        output: the new model's folder.
        config: differs from that of the other run in stage 2 only.
        labels: folder of labels that the new run reads; the other may have read another, or none.

    Raises:
        BadInputError: it differs elsewhere.
    """
    if output.exists():
        return
    found = from_toml(source / CONFIG, DashClipTraining)
    if replace(config, alignment=found.alignment) != found:
        raise BadInputError(f"{source}: its configuration differs in more than stage 2")
    with atomic_folder(output) as folder:
        shutil.copytree(source / START, folder / START)
        for name in (_STAGE_1, _TITLE_CROPS):
            if (source / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(source / name, folder / name)
        copy_record(source, folder, labels, config=to_toml(config))


class _Run:
    """One run and its folder."""

    def __init__(
        self,
        data: Path,
        output: Path,
        labels: Path | None,
        config: DashClipTraining,
        command: str,
    ) -> None:
        self.data = data
        self.output = output
        self.labels = labels
        self.config = config
        self.command = command or f"train_dashclip into {output.name}"
        precision = config.precision
        if precision == "auto":
            cuda = distributed.device().type == "cuda"
            precision = "bfloat16" if cuda else fast_precision()
        self.bfloat16 = precision == "bfloat16"
        self.lead = distributed.rank() == 0

    def execute(self) -> dict[str, Any]:
        catalog = read_catalog(self.data)
        relevance = None
        if self.labels or (self.data / RELEVANCE).exists():
            source = self.config.alignment.labels
            relevance = read_relevance(self.data, catalog, labels=self.labels, source=source)
        claim(
            self.output,
            self.data,
            self.labels,
            config=to_toml(self.config),
            command=self.command,
        )
        finished = self.output / FIGURES
        if finished.exists():
            say(f"{self.output}: this model is trained already; its figures:")
            return dict(json.loads(finished.read_text(encoding="utf-8")))
        start = self._start(catalog)
        model = start.model.to(distributed.device())
        if self.config.gradient_checkpointing:
            _checkpoint_gradients(model)
        training: Relevance | None = None
        known: list[str] = []
        if relevance is not None:
            held = held_out_queries(relevance, held_out=self.config.held_out_queries)
            training = relevance.take(~held[relevance.query])
            # Those without a pair of the chosen source too: the others may have trained a grader.
            known = [query for query, out in zip(relevance.queries, held, strict=True) if not out]
        corpus = Corpus(catalog, start, self.config, self.output / "work", self.bfloat16)
        first = self._pretrain if model.config.reads_images else self._crop
        stages = [first(model, corpus), self._align(model, corpus, training)]
        done = [stage for stage in stages if stage is not None]
        if not done:
            raise BadInputError(
                f"{self.data}: nothing to train on: neither products with both image and title "
                "nor relevance labels"
            )
        return self._write(start, training, known, corpus, done)

    def _start(self, catalog: Catalog) -> Start:
        """Return the untrained model; it is kept beside the trained one."""
        folder = self.output / START
        if not folder.is_dir() and self.lead:
            start = load_start(
                self.config.start, reads_images=catalog.any_image(), seed=self.config.seed
            )
            if start.new_projections:
                fit_projections(start, catalog.titles.unique().drop_null().to_pylist())
            with quiet_transformers(), atomic_folder(folder) as scratch:
                start.model.save_pretrained(scratch)
                start.tokenizer.save_pretrained(scratch)
        distributed.barrier()
        return load_start(
            self.config.start.at(folder), reads_images=catalog.any_image(), seed=self.config.seed
        )

    def _pretrain(self, model: DashClip, corpus: Corpus) -> dict[str, Any] | None:
        """Run stage 1, if there is anything to run it on."""
        stage_config = self.config.pretraining
        if not stage_config.epochs:
            return None
        after = self.output / _STAGE_1
        depth = freeze(model, stage_config.frozen_layers, Pretraining.name)
        if (header := _restored(after, model)) is not None:
            corpus.images_read, corpus.faults.broken = header["images_read"], header["broken"]
            return dict(header["figures"])
        model.eval()
        products = corpus.products(model, depth)
        train, held_out = corpus.pairs(stage_config.held_out)
        if len(train) < _FEWEST:
            say("stage 1: hardly a product has both image and title; left out")
            return None
        stage = Pretraining(model, stage_config, products, train, held_out, seed=self.config.seed)
        # What is stopped on tells nothing where it is not trained.
        patience = stage_config.patience if stage_config.matching else 0
        progress = self._loop(stage, stage_config, model, patience)
        figures = _figures(stage, progress)
        read = {"images_read": corpus.images_read, "broken": corpus.faults.broken}
        self._keep(after, model, {"figures": figures, **read})
        return figures

    def _crop(self, model: DashClip, corpus: Corpus) -> dict[str, Any] | None:
        """Run what takes the place of stage 1 on a catalog without images."""
        stage_config = self.config.cropping
        if not stage_config.epochs:
            return None
        after = self.output / _TITLE_CROPS
        depth = freeze(model, stage_config.frozen_layers, TitleCrops.name)
        if (figures := _restored(after, model)) is not None:
            return dict(figures["figures"])
        model.eval()
        rows, titles = corpus.distinct_titles()
        if len(rows) < _FEWEST:
            return None
        stage = TitleCrops(
            model,
            stage_config,
            corpus.products(model, depth),
            rows,
            titles,
            corpus.tokenize,
            seed=self.config.seed,
        )
        figures = _figures(stage, self._loop(stage, stage_config, model, 0))
        self._keep(after, model, {"figures": figures})
        return figures

    def _keep(self, after: Path, model: DashClip, header: dict[str, Any]) -> None:
        """Save what a finished stage trained."""
        if self.lead:
            state = {n: p for n, p in model.named_parameters() if p.requires_grad}
            save_state(after, state, header)
        distributed.barrier()

    def _align(
        self, model: DashClip, corpus: Corpus, relevance: Relevance | None
    ) -> dict[str, Any] | None:
        """Run stage 2, if there are labels."""
        stage_config = self.config.alignment
        if relevance is None or not stage_config.epochs:
            return None
        depth = freeze(model, stage_config.frozen_layers, Alignment.name)
        model.eval()
        sampler = TupleSampler(
            relevance, corpus.catalog.aisles(), stage_config.sampling, seed=self.config.seed
        )
        products = corpus.products(model, depth)
        queries = corpus.queries(model, depth, relevance.queries)
        stage = Alignment(
            model,
            stage_config,
            products,
            queries,
            sampler,
            seed=self.config.seed,
            bfloat16=self.bfloat16,
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        progress = self._loop(stage, stage_config, model, 0)
        cropping = self.config.cropping
        if cropping.epochs and cropping.keep and not model.config.reads_images:
            with torch.no_grad():
                torch._foreach_lerp_(trained, before, cropping.keep)
        return _figures(stage, progress)

    def _loop(self, stage: Stage, config: StageConfig, model: DashClip, patience: int) -> Progress:
        loop = StageLoop(
            stage,
            model,
            checkpoint=self.output / "checkpoint" / "state.safetensors",
            seconds=self.config.checkpoint_seconds,
            patience=patience,
            bfloat16=self.bfloat16,
            seed=self.config.seed,
        )
        say(
            f"{stage.name}: {stage.examples:,} examples an epoch, {config.epochs} epochs of "
            f"{loop.steps} steps of {loop.batch}"
        )
        if not self.lead:
            return loop.run()
        board = self.output / "tensorboard" / stage.name.replace(" ", "-")
        with closing(Monitor(stage.name, loop.total, "pairs", board)) as monitor:

            def note(progress: Progress, figures: dict[str, float]) -> None:
                monitor.step(done=progress.examples, seconds=progress.seconds, figures=figures)

            def tell(epoch: int, found: dict[str, float]) -> None:
                monitor.evaluated(epoch, found)
                if found:
                    when = f"after epoch {epoch}" if epoch else "before training"
                    say(f"{stage.name}, {when}: {describe(found)}")

            return loop.run(note, tell)

    def _write(
        self,
        start: Start,
        training: Relevance | None,
        known: list[str],
        corpus: Corpus,
        stages: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """Save the model; ``training.json`` comes last and says that it is whole."""
        figures = {
            "command": self.command,
            "start": self.config.start.checkpoint or "packaged MiniLM",
            "seed": self.config.seed,
            "processes": distributed.world(),
            "precision": "bfloat16" if self.bfloat16 else "float32",
            "products": len(corpus.catalog),
            "products_with_image": corpus.images_read,
            "broken_images": corpus.faults.broken,
            "training_queries": len(training.judged_queries()) if training else 0,
            "training_pairs": len(training) if training else 0,
            "stages": stages,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if self.lead:
            scratch = self.output / "work" / "model"
            with quiet_transformers():
                start.model.save_pretrained(scratch)
                start.tokenizer.save_pretrained(scratch)
            write_training_queries(scratch, known)
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(self.output / path.name)
            corpus.close()
            write_text(self.output / FIGURES, json.dumps(figures, indent=2) + "\n")
        distributed.barrier()
        return figures


def _restored(after: Path, model: DashClip) -> dict[str, Any] | None:
    """Give the model what a finished stage trained; returns its header, None if there is none."""
    if not after.exists():
        return None
    tensors, header = load_state(after)
    state = {n: p for n, p in model.named_parameters() if p.requires_grad}
    copy_into(state, tensors, str(after))
    return header


def _figures(stage: Stage, progress: Progress) -> dict[str, Any]:
    """Return what ``training.json`` tells of a stage."""
    return {
        "name": stage.name,
        "examples_an_epoch": stage.examples,
        **{k: v for k, v in asdict(progress).items() if k not in ("step", "unnoted", "done")},
        "pairs_per_second": progress.examples / max(progress.seconds, 1e-9),
    }


def _checkpoint_gradients(model: DashClip) -> None:
    """Have trained layers compute their activations again in the backward pass."""
    # The public way to do it has two names over the versions of transformers, and makes frozen
    # embeddings take part in the backward pass.
    model._set_gradient_checkpointing(
        gradient_checkpointing_func=partial(checkpoint, use_reentrant=False)
    )
