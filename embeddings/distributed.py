"""Several processes as one: what torchrun starts, gathered and summed.

Every process holds the whole model, takes its slice of each batch, and steps with the sum of all
gradients. One process alone needs no process group: everything here is then the identity.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from features import console


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, if it did, for as long as the block lasts.

    Only the first of them prints. A block within another one changes nothing.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    console.stderr.quiet = dist.get_rank() > 0
    try:
        yield
    finally:
        dist.destroy_process_group()
        console.stderr.quiet = False


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def own_slice(rows: int) -> slice:
    """Return which of ``rows`` are this process's; ``rows`` is a multiple of `world`."""
    assert rows % world() == 0, (rows, world())
    share = rows // world()
    return slice(rank() * share, (rank() + 1) * share)


def device() -> torch.device:
    """Return where this process computes."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else (torch.device("cpu"))
    )


class _Gather(torch.autograd.Function):
    """All processes' rows; the gradient of each row sums what every process made of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in their order, with gradients to where they came from."""
    if world() == 1:
        return rows
    result: Tensor = _Gather.apply(rows)
    return result


def total(value: Tensor) -> Tensor:
    """Return the sum over all processes of a tensor without gradient."""
    if world() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def patient_group() -> dist.ProcessGroup:
    """Return a group of all processes, on their CPUs, that wait for each other for days."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def count(number: int, group: dist.ProcessGroup) -> int:
    """Return the sum of what each process counted, once the last one has."""
    value = torch.tensor(number)
    dist.all_reduce(value, group=group)
    return int(value)


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes.

    A parameter that no process used keeps none, as in one process alone.
    """
    if world() == 1:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=device())
    for parameter, uses in zip(parameters, total(used).tolist(), strict=True):
        if uses and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))
