"""save() and load(): one safetensors file with the structure in its JSON metadata. Loading never runs code.

Tensors are stored under their state_dict names. The column indices of S are stored in 16 bits where they fit, and
tensors shared by several names once. The file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .cost import CMD_LAYERS, index_dtype
from .decompose import Decomposition
from .modules import CMDConv2d, CMDLinear, replace
from .ops import Pattern

FORMAT_VERSION = 1
_KINDS = {"conv2d": (CMDConv2d, nn.Conv2d), "linear": (CMDLinear, nn.Linear)}
_PARTS = ("u", "v", "values", "row_ptr", "col_idx")


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes a compressed (or dense) network to a safetensors file, atomically.

    Args:
        model: any module; wrappers of DistributedDataParallel and torch.compile are looked through.
        path: the file; an existing one is replaced.

    Raises:
        OSError: the folder does not exist or cannot be written.
        TypeError: the state holds something else than tensors.
        ValueError: the network was fused for inference, so that no fresh model could load it.
    """
    model = _unwrapped(model)
    for name, module in model.named_modules():
        if isinstance(module, CMD_LAYERS) and module.activation is not None:
            raise ValueError(f"save: layer {name!r} must not be fused with a ReLU; save the network before fuse()")
    path = Path(path)
    tensors, aliases = _tensors(model)
    content = {"version": FORMAT_VERSION, "layers": _structure(model), "aliases": aliases}
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OSError(f"save: cannot write to {path}: {error.strerror}") from None
    os.close(handle)
    try:
        save_file(tensors, temporary, {"cmd_ext": json.dumps(content)})
        os.chmod(temporary, 0o666 & ~_umask())
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"save: cannot write to {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Turns a fresh model of the original class into the saved one, in place.

    Args:
        path: what `save` wrote.
        model: a model with the structure of the one that was compressed, dense or compressed.

    Returns:
        model (or its replacement, where the model itself is one layer).

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, foreign, or not of this model; the message names what was wanted. The model is then
            unchanged.
    """
    content, tensors = _read(Path(path))
    layers = {name: _layer(path, name, entry, tensors, model) for name, entry in content["layers"].items()}
    _check_names(path, model, layers, tensors)
    for name, layer in layers.items():
        model = replace(model, name, layer)
    model.load_state_dict(tensors)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    return _unwrapped(model._orig_mod) if hasattr(model, "_orig_mod") else model


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _structure(model: nn.Module) -> dict[str, dict]:
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, CMD_LAYERS):
            kind = "conv2d" if isinstance(module, CMDConv2d) else "linear"
            layers[name] = {"kind": kind, "shape": list(module.matrix_shape), "groups": module.groups}
    return layers


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state as contiguous tensors, each storage once, and the other names of shared ones."""
    narrow = {
        f"{name}.col_idx".lstrip("."): index_dtype(module.matrix_shape[1])
        for name, module in model.named_modules()
        if isinstance(module, CMD_LAYERS)
    }
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"save: the state must hold tensors only, got {type(value).__name__} for {name!r}")
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        # A copy of its own for each: safetensors refuses tensors that overlap in memory.
        tensors[name] = (
            value.detach().to("cpu", narrow.get(name, value.dtype)).clone(memory_format=torch.contiguous_format)
        )
    return tensors, aliases


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"load: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load: {path} is no complete safetensors file ({error})") from None
    if "cmd_ext" not in metadata:
        raise ValueError(f"load: {path} was not written by cmd_ext.save (no 'cmd_ext' in its metadata)")
    try:
        content = json.loads(metadata["cmd_ext"])
        version, aliases = content["version"], content["aliases"]
        if version != FORMAT_VERSION:
            raise ValueError(f"load: {path} has format version {version!r}, this cmd_ext reads {FORMAT_VERSION}")
        tensors.update({name: tensors[source] for name, source in aliases.items()})
        for name in content["layers"]:
            index = f"{name}.col_idx".lstrip(".")
            tensors[index] = tensors[index].to(torch.int32)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"load: the structure in {path} is damaged ({error!r})") from None
    return content, tensors


def _layer(path, name: str, entry: dict, tensors: dict[str, Tensor], model: nn.Module) -> nn.Module:
    """The compressed layer of a file, built from the geometry of the model's own layer."""
    kind, shape, groups = (entry.get(key) for key in ("kind", "shape", "groups"))
    module = dict(model.named_modules()).get(name)
    if kind not in _KINDS:
        raise ValueError(f"load: the structure in {path} is damaged (kind {kind!r} of layer {name!r})")
    compressed, dense = _KINDS[kind]
    if not isinstance(module, (compressed, dense)):
        got = "none" if module is None else type(module).__name__
        raise ValueError(f"load: {path} wants a {dense.__name__} named {name!r} in the model, got {got}")
    if isinstance(module, compressed):
        m, n = module.matrix_shape
    else:
        m, n = len(module.weight), module.weight[0].numel()
    if [m, n, getattr(module, "groups", 1)] != [*shape, groups]:
        got = f"[{m}, {n}] with {getattr(module, 'groups', 1)} groups"
        raise ValueError(f"load: {path} wants layer {name!r} to be {shape} with {groups} groups, got {got}")
    prefix = f"{name}." if name else ""
    try:
        parts = [tensors[prefix + part] for part in _PARTS]
        Pattern.from_csr(parts[3], parts[4], n, groups)
    except (KeyError, ValueError) as error:
        raise ValueError(f"load: layer {name!r} in {path} is damaged ({error})") from None
    source = module.to_dense() if isinstance(module, compressed) else module
    return compressed._from_fit(source, Decomposition(*parts, 0.0, [], groups))


def _check_names(path, model: nn.Module, layers: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """Names and shapes of the file against those of the model once `layers` are in place."""
    wanted = {}
    prefixes = tuple(f"{name}." if name else "" for name in layers)
    for key, value in model.state_dict().items():
        if not key.startswith(prefixes) or not prefixes:
            wanted[key] = value.shape
    for name, layer in layers.items():
        wanted.update({f"{name}.{key}".lstrip("."): value.shape for key, value in layer.state_dict().items()})
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    misshapen = [key for key in wanted.keys() & tensors.keys() if wanted[key] != tensors[key].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        told = "; ".join(f"{what}: {', '.join(sorted(keys)[:3])}" for what, keys in problems.items() if keys)
        raise ValueError(f"load: {path} is not of this model ({told})")
