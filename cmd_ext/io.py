"""save() and load(): one safetensors file with the structure in its JSON metadata. Loading never runs code.

Tensors are stored under their state_dict names, those shared by several names once; the support of each S in the
smallest of the forms of support.py. The tensors take the bytes that `cost.stored_bytes` counts, the rest of the file is
its JSON header. The file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import forms, support
from .cost import compressed_layers, saved_tensors
from .decompose import Decomposition
from .modules import CMDConv2d, CMDLinear, replace
from .ops import csr_rows

FORMAT_VERSION = 2  # 1: supports as row_ptr (int32) and col_idx (uint16 or int32), the channel form only
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
    for name, layer in compressed_layers(model).items():
        if layer.activation is not None:
            raise ValueError(f"save: layer {name!r} must not be fused with a ReLU; save the network before fuse()")
    path = Path(path)
    tensors, layers, aliases = _content(model)
    content = {"version": FORMAT_VERSION, "layers": layers, "aliases": aliases}
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
    entries, tensors = _read(Path(path))
    modules = dict(model.named_modules(remove_duplicate=False))
    layers, made = {}, {}
    for name, entry in entries.items():
        key = id(modules.get(name)), *(id(tensors[_key(name, part)]) for part in _PARTS[:3])
        if key not in made:  # a layer that has several names, in the model and in the file, stays one
            made[key] = _layer(path, name, entry, tensors, modules.get(name))
        layers[name] = made[key]
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


def _content(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict], dict[str, str]]:
    """The tensors of a file, its compressed layers, and the other names of shared tensors."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"save: the state must hold tensors only, got {type(value).__name__} for {name!r}")
    shared, aliases = saved_tensors(model)
    # A copy of its own for each: safetensors refuses tensors that overlap in memory.
    tensors = {
        name: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, value in shared.items()
    }
    layers: dict[str, dict] = {}
    first: dict[int, str] = {}
    for name, module in compressed_layers(model).items():
        owner = first.setdefault(id(module), name)
        if owner == name:
            form, packed = support.pack(module.row_ptr, module.col_idx, module.matrix_shape[1])
            tensors.update({_key(name, part): tensor for part, tensor in packed.items()})
            kind = "conv2d" if isinstance(module, CMDConv2d) else "linear"
            layers[name] = {"kind": kind, "shape": [*module.matrix_shape], "groups": module.groups, "support": form}
            if module.form != "channel":
                layers[name]["form"] = module.form
        else:
            layers[name] = layers[owner]
            parts = support.FORMS[layers[owner]["support"]]
            aliases.update({_key(name, part): _key(owner, part) for part in parts})
    return tensors, layers, aliases


def _key(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part


def _read(path: Path) -> tuple[dict[str, _Entry], dict[str, Tensor]]:
    """The compressed layers and the state in a file, with row_ptr and col_idx in the place of packed supports."""
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
        version = content["version"]
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(f"load: {path} has format version {version!r}, this cmd_ext reads 1 to {FORMAT_VERSION}")
        tensors.update({name: tensors[source] for name, source in content["aliases"].items()})
        entries = {name: _Entry(**entry) for name, entry in content["layers"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"load: the structure in {path} is damaged ({error!r})") from None
    for name, entry in entries.items():
        try:
            _unpack(name, entry, tensors)
        except KeyError as error:
            raise ValueError(f"load: layer {name!r} in {path} is damaged (no tensor {error})") from None
        except ValueError as error:
            raise ValueError(f"load: layer {name!r} in {path} is damaged ({error})") from None
    return entries, tensors


@dataclass
class _Entry:
    """A compressed layer in the metadata of a file."""

    kind: str
    shape: list[int]
    groups: int
    support: str | None = None  # None: row_ptr and col_idx themselves, as in version 1
    form: str = "channel"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise TypeError(f"kind {self.kind!r}")
        sizes = [*self.shape, self.groups]
        if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise TypeError(f"shape {self.shape!r} with groups {self.groups!r}")
        if self.form not in forms.FORMS:
            raise TypeError(f"form must be one of {', '.join(forms.FORMS)}, got {self.form!r}")
        if not isinstance(self.support, (str, type(None))):
            raise TypeError(f"support {self.support!r}")


def _unpack(name: str, entry: _Entry, tensors: dict[str, Tensor]) -> None:
    """Puts row_ptr and col_idx of a layer in the place of its packed support, all parts checked."""
    (m, n), groups = entry.shape, entry.groups
    u, v, values = (tensors[_key(name, part)] for part in ("u", "v", "values"))
    for part, tensor, dims in (("u", u, 2), ("v", v, 2), ("values", values, 1)):
        if tensor.dim() != dims or not tensor.is_floating_point():
            raise ValueError(f"{part} must have {dims} dimensions of floats, got {[*tensor.shape]} of {tensor.dtype}")
    taps = u.shape[0] // m if entry.form == "spatial" else 1  # that it is the kernel's height is seen beside the model
    if u.shape[0] != m * taps or v.shape != (groups * u.shape[1], n // taps):
        got = f"{[*u.shape]} and {[*v.shape]}"
        raise ValueError(f"u and v must be [{m * taps}, r] and [{groups} * r, {n // taps}], got {got}")
    if entry.support is None:
        row_ptr, col_idx = (tensors[_key(name, part)].to(torch.int32) for part in ("row_ptr", "col_idx"))
    else:
        keys = {part: _key(name, part) for part in support.FORMS.get(entry.support, ())}
        packed = {part: tensors[key] for part, key in keys.items()}
        row_ptr, col_idx = support.unpack(entry.support, packed, m, n, len(values))
        for key in keys.values():
            del tensors[key]
    if row_ptr.shape != (m + 1,) or col_idx.shape != values.shape:
        got = f"{[*row_ptr.shape]} and {[*col_idx.shape]}"
        raise ValueError(f"row_ptr and col_idx must be [{m + 1}] and [{len(values)}], got {got}")
    csr_rows(row_ptr, col_idx, n)
    tensors[_key(name, "row_ptr")], tensors[_key(name, "col_idx")] = row_ptr, col_idx


def _layer(path, name: str, entry: _Entry, tensors: dict[str, Tensor], module: nn.Module | None) -> nn.Module:
    """The compressed layer of a file, built from the geometry of the model's own layer."""
    compressed, dense = _KINDS[entry.kind]
    if not isinstance(module, (compressed, dense)):
        got = "none" if module is None else type(module).__name__
        raise ValueError(f"load: {path} wants a {dense.__name__} named {name!r} in the model, got {got}")
    if isinstance(module, compressed):
        m, n = module.matrix_shape
    else:
        m, n = len(module.weight), module.weight[0].numel()
    if [m, n, getattr(module, "groups", 1)] != [*entry.shape, entry.groups]:
        got = f"[{m}, {n}] with {getattr(module, 'groups', 1)} groups"
        raise ValueError(f"load: {path} wants layer {name!r} to be {entry.shape} with {entry.groups} groups, got {got}")
    try:
        forms.check_form("the structure", entry.form, getattr(module, "kernel_size", ()))
        taps, rows = forms.taps_of(entry.form, getattr(module, "kernel_size", ())), tensors[_key(name, "u")].shape[0]
        if rows != m * taps:
            raise ValueError(f"u must be [{m * taps}, r], got {rows} rows")
    except ValueError as error:
        raise ValueError(f"load: layer {name!r} in {path} is damaged ({error})") from None
    parts = [tensors[_key(name, part)] for part in _PARTS]
    source = module.to_dense() if isinstance(module, compressed) else module
    fit = Decomposition(*parts, 0.0, [], entry.groups, entry.form, getattr(source, "kernel_size", (1, 1)))
    return compressed._from_fit(source, fit)


def _check_names(path, model: nn.Module, layers: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """Names, shapes and kinds of number of the file against those of the model once `layers` are in place."""
    wanted: dict[str, Tensor] = {}
    prefixes = tuple(f"{name}." if name else "" for name in layers)
    for key, value in model.state_dict().items():
        if not key.startswith(prefixes) or not prefixes:
            wanted[key] = value
    for name, layer in layers.items():
        wanted.update({_key(name, key): value for key, value in layer.state_dict().items()})
    both = wanted.keys() & tensors.keys()
    problems = {
        "missing": wanted.keys() - tensors.keys(),
        "unexpected": tensors.keys() - wanted.keys(),
        "of another shape": [key for key in both if wanted[key].shape != tensors[key].shape],
        "of other numbers": [
            key for key in both if wanted[key].is_floating_point() != tensors[key].is_floating_point()
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {', '.join(sorted(keys)[:3])}" for what, keys in problems.items() if keys)
        raise ValueError(f"load: {path} is not of this model ({told})")
