"""Which layers of a network may be compressed, why the others may not, and without which of them it still works."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import outputs
from .cost import CMD_LAYERS
from .modules import CMDConv2d, CMDLinear

SAMPLES = 8  # that tell whether outputs still depend on inputs
SPREAD = 1e-3  # of the dense network's outputs; less is rounding
MIN_SIZE = 1024  # weights below which a layer is left alone: nothing to gain
LAYER_OF = {nn.Conv2d: CMDConv2d, nn.Linear: CMDLinear}


def candidates(
    model: nn.Module,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    overrides: dict | None = None,
    min_size: int = MIN_SIZE,
) -> tuple[list[str], dict[str, str]]:
    """The names of the layers that may be compressed, and the reason of every other layer with a weight."""
    overrides = overrides or {}
    names = {name for name, _ in model.named_modules()}
    for name in overrides:
        if name not in names:
            near = get_close_matches(name, names, 1)
            raise ValueError(
                f"compress: overrides names no layer {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    chosen, skipped, owners = [], {}, _owners(model)
    for name, module in model.named_modules():
        reason = _reason(name, module, owners, filter_fn, overrides.get(name), min_size)
        if reason is None:
            chosen.append(name)
        elif reason:
            skipped[name] = reason
    return chosen, skipped


def bypassed(model: nn.Module, names: list[str], inputs: Any) -> set[str]:
    """The layers that something leads past, such as a shortcut: without U V + S, outputs still tell inputs apart.

    Args:
        model: its weights are changed meanwhile, and restored.
        inputs: one call's; of a tensor a few samples are used. A single one tells nothing, so that there are none.
    """
    few = inputs[:SAMPLES] if isinstance(inputs, Tensor) else inputs

    def spread() -> float:
        (y,) = outputs(model, [(few, None)])
        y = y.double()
        return (y - y[:1]).norm().item() if y.dim() > 0 else 0.0

    whole, found = spread(), set()
    for name in names:
        weight = model.get_submodule(name).weight
        dense = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.zero_()
            if spread() > SPREAD * whole:
                found.add(name)
        finally:
            with torch.no_grad():
                weight.copy_(dense)
    return found


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Every place that holds each parameter."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _reason(name, module, owners, filter_fn, override, min_size) -> str | None:
    """Why a layer stays dense; None if it may be compressed, "" if it is no weight layer at all."""
    weight = module._parameters.get("weight")
    if isinstance(module, CMD_LAYERS):
        return "is compressed already"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution"
    if isinstance(module, (nn.Conv1d, nn.Conv3d)):
        return f"{type(module).__name__} has no compressed form"
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return ""
    if type(module) not in LAYER_OF:
        base = "nn.Conv2d" if isinstance(module, nn.Conv2d) else "nn.Linear"
        return f"{type(module).__name__} is a subclass of {base}; its owner may use the weight itself"
    if weight is None:
        return "weight is parametrised"
    if len(owners[id(weight)]) > 1:
        other = next((o for o in owners[id(weight)] if o != name), name)
        return f"shared weight (also {other})"
    if override == "dense":
        return "dense by overrides"
    if override is not None:
        return None
    if filter_fn is not None and not filter_fn(name, module):
        return "excluded by filter_fn"
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.groups > 1:
        return f"depthwise convolution, {weight[0].numel()} weights a channel"
    if weight.numel() < min_size:
        return f"too small: {weight.numel()} weights, fewer than min_size = {min_size}"
    return None
