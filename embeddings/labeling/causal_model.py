"""Loading a causal language model, its tokenizer and LoRA weights with transformers and peft."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from embeddings.batching import quiet_transformers
from features.errors import BadInputError
from features.files import fingerprint
from features.hardware import Precision, fast_precision

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def find_model(name: str, folder: Path) -> str:
    """Return the folder or hub name that a configuration in ``folder`` means by ``name``.

    Raises:
        BadInputError: it is neither.
    """
    if (folder / name).is_dir():
        return str(folder / name)
    if not _HUB_NAME.fullmatch(name):
        raise BadInputError(f"{folder / name}: no such model folder")
    return name


def model_fingerprint(source: str) -> str:
    """Return what tells a model from all others.

    Args:
        source: a folder, whose content counts, or a hub name, whose name and commit do.

    Raises:
        BadInputError: the hub's model cannot be had.
    """
    if Path(source).is_dir():
        # The folder's own name does not count.
        files = sorted(path for path in Path(source).rglob("*") if path.is_file())
        names = [path.relative_to(source).as_posix() for path in files]
        said = "\n".join([*names, fingerprint(*files)])
        return hashlib.sha256(said.encode()).hexdigest()
    from transformers.utils import cached_file, extract_commit_hash

    with _readable(source, "model"):
        file = cached_file(source, "config.json")
    return f"{source}@{extract_commit_hash(file, None)}"


def choose_precision(device: torch.device) -> Precision:
    """Return bfloat16 where the device multiplies it natively, else float32."""
    return "bfloat16" if device.type == "cuda" else fast_precision()


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer of a model.

    Raises:
        BadInputError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    with _readable(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source)


def load_causal(
    source: str, *, adapter: Path | None, precision: Precision, device: torch.device
) -> Any:
    """Return a causal language model, in evaluation mode.

    Args:
        source: folder or hub name.
        adapter: folder of LoRA weights, which are folded into the model's.
        precision: of the weights.
        device: where they lie.

    Raises:
        BadInputError: it cannot be had, is no causal language model, or lacks weights; the adapter
            does not fit, or peft is missing.
    """
    from transformers import AutoModelForCausalLM

    _check_causal(source)
    with _readable(source, "causal language model"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, precision), output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise BadInputError(f"{source}: the weights lack '{missing[0]}'")
    if adapter is not None:
        model = load_adapter(model, adapter).merge_and_unload()
    return model.to(device).eval()


def load_adapter(model: Any, adapter: Path, *, trainable: bool = False) -> Any:
    """Return a model with LoRA weights of a folder.

    Raises:
        BadInputError: they do not fit, or peft is missing.
    """
    if not adapter.is_dir():
        raise BadInputError(f"{adapter}: no such folder of LoRA weights")
    peft = import_peft()
    with quiet_peft(), _readable(str(adapter), "LoRA adapter of this model"):
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def import_peft() -> Any:
    """Return the library of LoRA.

    Raises:
        BadInputError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise BadInputError(
            "LoRA needs the package peft: run `pip install 'dashclip-ranker[labeling]'`"
        ) from error
    return peft


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep peft from warning of what it still calls by transformers' old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def positions(model: Any, max_tokens: int) -> int:
    """Return how many tokens a chat may have: as asked, or as many as the model can read."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(max_tokens, limit) if isinstance(limit, int) and limit > 0 else max_tokens


def relative(source: str, folder: Path) -> str:
    """Return how a configuration in ``folder`` names what `find_model` found."""
    if not Path(source).is_dir():
        return source
    return os.path.relpath(Path(source).resolve(), folder.resolve())


def _config(source: str) -> Any:
    from transformers import AutoConfig

    with _readable(source, "model"):
        return AutoConfig.from_pretrained(source)


def _check_causal(source: str) -> None:
    """Raise where a configuration is not that of a causal language model.

    transformers alone would read an encoder as one, and warn.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = _config(source)
    causal = CAUSAL.get(config.model_type)
    made_as = config.architectures or []
    if causal is None or (made_as and causal not in made_as):
        found = ", ".join(made_as) or config.model_type
        raise BadInputError(f"{source}: is no causal language model but a {found}")


@contextmanager
def _readable(source: str, what: str) -> Iterator[None]:
    """Turn the errors of loading into a `BadInputError`."""
    from safetensors import SafetensorError

    kinds = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
    with quiet_transformers():
        try:
            yield
        except BadInputError:
            raise
        except kinds as error:
            reason = str(error).strip().partition("\n")[0]
            where = "" if Path(source).is_dir() else " in this folder or at the hub"
            raise BadInputError(f"{source}: not a readable {what}{where}: {reason}") from error
