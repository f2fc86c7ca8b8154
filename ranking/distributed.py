"""Several processes as one run of the ranker: how they join, take turns and end together.

``torchrun`` starts the processes. The first of them alone prints and writes; what it made alone it
hands to the others with `from_first`. A process that fails ends at once, without waiting for the
others, whose next exchange then fails too: one of them all, the first to fail, says why.
"""

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from embeddings.distributed import rank, world
from features import console
from features.errors import BadInputError

__all__ = [
    "begin_sum",
    "from_first",
    "gather_to_first",
    "greatest",
    "is_first",
    "no_warnings",
    "own_threads",
    "process_group",
    "rank",
    "reading_group",
    "world",
]

Result = TypeVar("Result")
Loss = TypeVar("Loss", float, Tensor)

# The most that a process may lag behind the others in training. A process that ends is noticed at
# once. A host that vanishes without a word (power, network) is noticed after this time, or once the
# kernel gives up on what was sent to it (`net.ipv4.tcp_retries2`), where something was under way:
# neither gloo's connections nor torch's store have a heartbeat or a keep-alive of their own.
_BEHIND = timedelta(minutes=5)
# The most that the first may work alone while the others wait: building features, fitting
# transforms, making a report. They wait in a group of their own; the time above is nothing to it.
_ALONE = timedelta(days=2)
_TELL_SECONDS = 3.0  # to find out who tells of a failure
_TOLD = "ranker/told"
_LOST = (
    "another process of this run ended, or this one was told to; give the same command again to "
    "carry on from the last checkpoint"
)
# How gloo and NCCL say that nobody answers; they raise plain RuntimeErrors.
_SIGNS_OF_LOSS = (
    *("connection closed", "connection reset", "connection refused", "broken pipe"),
    *("timed out", "timeout", "pair closure", "remote process exited"),
)
_EXIT_LOST = 1
_groups: dict[str, dist.ProcessGroup] = {}


class _ToldToEndError(BaseException):
    """Raised where SIGTERM finds the process, as from ``torchrun`` after another one failed."""


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, if it did, for as long as the block lasts.

    The processes talk through gloo, about tensors on a GPU through nccl. Where the block fails and
    there are several processes, the process ends here, and exactly one sentence is printed: by the
    first that failed. A block within another one changes nothing.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    _handle_sigterm()
    store = None
    try:
        store, number, size = next(iter(rendezvous("env://", timeout=_BEHIND)))
        _join(store, number, size)
        yield
    except BaseException as error:
        _end(error, store)
    dist.destroy_process_group()
    _groups.clear()
    console.stderr.quiet = False
    signal.signal(signal.SIGTERM, before)


def _join(store: dist.Store, number: int, size: int) -> None:
    _quieten()
    console.stderr.quiet = number > 0
    backend = "gloo"
    own_gpu = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.device_count() > own_gpu:
        torch.cuda.set_device(own_gpu)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=_BEHIND)
    _groups["alone"] = dist.new_group(backend="gloo", timeout=_ALONE)
    _groups["reading"] = dist.new_group(backend="gloo", timeout=_BEHIND)


def _quieten() -> None:
    """Leave out what torchrec says of its own use of torch; none of it is the user's to mend."""
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    for message in ("is deprecated", "are deprecating", "an autograd kernel was not registered"):
        warnings.filterwarnings("ignore", message=f"(?s).*{message}", module="torch")


@contextmanager
def no_warnings() -> Iterator[None]:
    """Drop warnings that are logged in the block, by the root logger too."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _handle_sigterm() -> None:
    def raise_once(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _ToldToEndError

    signal.signal(signal.SIGTERM, raise_once)


def _end(error: BaseException, store: dist.Store | None) -> NoReturn:
    """Say why, where no other process has, and end without waiting for anybody."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    status = _EXIT_LOST
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, BadInputError):
        sentence, status = str(error), console.EXIT_BAD_INPUT
    elif isinstance(error, KeyboardInterrupt):
        sentence, status = "interrupted; give the same command again to go on", 130
    elif isinstance(error, _ToldToEndError) or _means_loss(error):
        sentence = _LOST
    else:
        sentence = "".join(traceback.format_exception(error)).rstrip()
    if _tells(store):
        sys.stderr.write(f"train-ranker: {sentence}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _means_loss(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistNetworkError | dist.DistStoreError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_LOSS)
    )


def _tells(store: dist.Store | None) -> bool:
    """Whether this process is the first that fails, or cannot know; takes a few seconds at most."""
    if store is None:
        return True
    found: list[int] = []

    def ask() -> None:
        try:
            found.append(store.add(_TOLD, 1))
        except RuntimeError:  # the store was on the host that is gone
            found.append(1)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_TELL_SECONDS)
    return not found or found[0] == 1


def is_first() -> bool:
    """Whether this is the process that prints and writes; one process alone is."""
    return rank() == 0


def own_threads(threads: int) -> int:
    """Return this process's share of the ``threads`` of its machine, at least 1."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1
    return max(1, threads // here)


def from_first(work: Callable[[], Result]) -> Result:
    """Let the first process work while the others wait; returns what it made in all of them."""
    if world() == 1:
        return work()
    box = [work() if is_first() else None]
    dist.broadcast_object_list(box, src=0, group=_groups["alone"])
    return box[0]  # type: ignore[return-value]


def gather_to_first(part: Result) -> list[Result]:
    """Return every process's ``part`` in the first process, in their order; elsewhere nothing."""
    if world() == 1:
        return [part]
    parts: list[Any] | None = [None] * world() if is_first() else None
    dist.gather_object(part, parts, dst=0, group=_groups["alone"])
    return parts or []


def reading_group() -> dist.ProcessGroup:
    """Return the group of all processes for the threads that read, beside those that train."""
    return _groups["reading"]


def greatest(number: int) -> int:
    """Return the greatest of all processes' numbers."""
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def begin_sum(parameters: list[nn.Parameter], loss: Loss) -> Callable[[], Loss]:
    """Begin to sum all processes' gradients and losses; the function returned ends it.

    Args:
        parameters: their gradients become the sums.
        loss: this process's part, a number or, where the gradients are, a tensor of no dimension.

    Returns:
        Waits, sets the gradients and returns the sum of the losses, as ``loss`` is given; a GPU's
        stream is made to wait, not this process.
    """
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    own = loss.reshape(1) if isinstance(loss, Tensor) else torch.tensor([loss])
    flat = torch.cat([g.reshape(-1) for g in gradients] + [own])
    work = dist.all_reduce(flat, async_op=True)

    def end() -> Any:
        work.wait()
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, flat[:-1].split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[-1] if isinstance(loss, Tensor) else flat[-1].item()

    return end
