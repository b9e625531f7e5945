"""Ranks of a torchrun launch: joining, sharding a loader, acting on the first rank for all."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

_T = TypeVar("_T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def logger(name: str) -> logging.Logger:
    """A logger of which the first rank alone is heard, except for warnings."""
    log = logging.getLogger(name)
    log.addFilter(lambda record: rank() == 0 or record.levelno >= logging.WARNING)
    return log


def training_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    chosen = next(model.parameters()).device if device is None else torch.device(device)
    if chosen.type == "cuda" and (device is None or chosen.index is None) and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return chosen


def start(device: torch.device) -> None:
    """Join the other ranks if torchrun started this process; the group stays for later calls until exit."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def first_rank_does(call: Callable[[], _T]) -> _T:
    """The result of `call`, made on rank 0 only, on all ranks; if it fails there it fails on all."""
    if world_size() == 1:
        return call()
    outcome: list[Any] = [None, None]
    failure = None
    if rank() == 0:
        try:
            outcome[0] = call()
        except Exception as error:
            failure = error
            outcome[1] = f"rank 0: {type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(outcome[1])
    return outcome[0]


def all_ranks_say(value: _T) -> list[_T]:
    """The values of all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def copy_from_first_rank(model: nn.Module) -> None:
    """Batch-norm statistics differ between ranks after an epoch."""
    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            dense = value.contiguous()
            dist.broadcast(dense, 0)
            value.copy_(dense)


def sampler_of(loader: Any) -> Any:
    return getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))


def shard(loader: Any, seed: int | None) -> Any:
    """The loader of this rank's share of the data."""
    sampler = sampler_of(loader)
    if world_size() == 1 or isinstance(sampler, DistributedSampler):
        return loader
    if not isinstance(loader, DataLoader) or type(sampler) not in (RandomSampler, SequentialSampler):
        raise TypeError(
            "finetune: with several ranks train_loader must be a DataLoader with a DistributedSampler, or with the "
            f"order that shuffle=True or False gives, got {type(loader).__name__} with {type(sampler).__name__}"
        )
    shuffle = isinstance(sampler, RandomSampler)
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=DistributedSampler(loader.dataset, shuffle=shuffle, seed=seed or 0, drop_last=loader.drop_last),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
