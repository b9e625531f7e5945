"""What a network costs: parameters, bytes as stored, multiply-accumulates and measured milliseconds, layer by layer."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from . import forms, report, support
from .calibrate import call, device_of, to_device
from .modules import CMDConv2d, CMDLinear

CMD_LAYERS = (CMDConv2d, CMDLinear)
SUPPORT = ("row_ptr", "col_idx")  # buffers that files hold in a form of their own, see support.py


def kept_parameters(m: int, n: int, groups: int, rank: int, nnz: int, taps: int = 1) -> int:
    """rank * (m * taps + groups * n / taps) + nnz; a sparse entry counts as one. taps: kernel_h in the spatial form."""
    return rank * (m * taps + groups * n // taps) + nnz


def kept_bytes(m: int, n: int, groups: int, rank: int, nnz: int, element: int, taps: int = 1) -> int:
    """Bytes of U, V and S in a file, with the support of S; `element` bytes a value."""
    return kept_parameters(m, n, groups, rank, nnz, taps) * element + support.size(m, n, nnz)


def kept_macs(m: int, n: int, groups: int, rank: int, nnz: int, positions: int, taps: int = 1, between: int = 0) -> int:
    """Multiply-adds at `positions` pixels of y; in the spatial form V has `between` pixels."""
    if taps == 1:
        return positions * kept_parameters(m, n, groups, rank, nnz)
    return positions * (rank * m * taps + nnz) + between * rank * groups * (n // taps)


def layer_bytes(module: nn.Module) -> int:
    """Bytes of a module's own parameters and saved buffers as `save` writes them."""
    own = {
        **module._parameters,
        **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set},
    }
    if isinstance(module, CMD_LAYERS):
        own = {name: tensor for name, tensor in own.items() if name not in SUPPORT}
    return sum(_bytes(tensor) for tensor in own.values() if tensor is not None) + _support_bytes(module)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _support_bytes(module: nn.Module) -> int:
    return support.size(*module.matrix_shape, module.nnz) if isinstance(module, CMD_LAYERS) else 0


def _macs(module: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(module, CMD_LAYERS):
        m, n = module.matrix_shape
        sizes = m, n, module.groups, module.rank, module.nnz, y.numel() // max(m, 1)
        return kept_macs(*sizes, module._taps, _between(module, x, y) if module._taps > 1 else 0)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return x.numel() * module.weight[0].numel()
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return y.numel() * module.weight[0].numel()
    return 0


def _between(conv: nn.Conv2d | CMDConv2d, x: Tensor, y: Tensor) -> int:
    """Pixels of a map with the rows of x, padded ahead of the convolution or not, and the columns of y."""
    pad = forms.padding_ahead(conv) if isinstance(conv, nn.Conv2d) else conv._pad
    batch, (rows, columns) = x.shape[:-3].numel(), (x.shape[-2], y.shape[-1])
    return batch * (rows + (pad[2] + pad[3] if pad else 0)) * columns


def _shape(module: nn.Module) -> str:
    if isinstance(module, CMD_LAYERS):
        return "x".join(map(str, module.matrix_shape)) + (" spatial" if module._taps > 1 else "")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return "-"
    return f"{weight.shape[0]}x{weight[0].numel()}" if weight.dim() > 1 else str(len(weight))


@dataclass
class LayerCost:
    """One layer: kind, matrix shape, rank and nnz (None if dense), own parameters, bytes, MACs and ms of one call."""

    name: str
    kind: str
    shape: str
    rank: int | None
    nnz: int | None
    params: int
    bytes: int
    macs: int
    ms: float | None
    positions: int = field(default=0, repr=False)  # multiply-accumulates per weight
    between: int = field(default=0, repr=False)  # of V, in the spatial form
    inputs: int = field(default=0, repr=False)  # elements of x


@dataclass
class Profile:
    """Costs of every layer that holds parameters, and of the whole network for one call on the example inputs.

    `ms` of a layer is the median over calls of its own time; `total.ms` is the whole forward pass, in calls of its own:
    timing the layers takes time.
    """

    rows: list[LayerCost]
    total: LayerCost

    def __iter__(self):
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> LayerCost:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        def cells(row: LayerCost) -> list[str]:
            sizes = ["-" if v is None else str(v) for v in (row.rank, row.nnz)]
            costs = [report.count(v) for v in (row.params, row.bytes, row.macs)]
            return [row.name, row.kind, row.shape, *sizes, *costs, report.milliseconds(row.ms)]

        header = ("layer", "kind", "shape", "rank", "nnz", "params", "bytes", "MACs", "ms")
        return report.table(header, [cells(row) for row in self.rows], [cells(self.total)])


def profile(model: nn.Module, example_inputs: Any, *, repeats: int = 5) -> Profile:
    """Measures a network, dense or compressed, in eval mode.

    Args:
        model: any module; unchanged.
        example_inputs: one call's inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        repeats: timed calls of the network, and as many in which its layers are timed, after a warm-up; medians are
            reported.

    Returns:
        A Profile; printing it gives the table.
    """
    return profile_together([model], example_inputs, repeats=repeats)[0]


def profile_together(models: list[nn.Module], example_inputs: Any, *, repeats: int = 5) -> list[Profile]:
    """`profile` of several models with their calls interleaved, so that the machine's drift hits all alike."""
    probes = [_Probe(model, to_device(example_inputs, device_of(model))) for model in models]
    for _ in range(repeats + 1):
        for probe in probes:
            probe.run()
    return [probe.profile() for probe in probes]


class _Probe:
    """Times the calls of a network and, by forward hooks in further calls, its layers with parameters of their own."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.device = device_of(model)
        self.times: list[dict[nn.Module, float]] = []
        self.total: list[float] = []
        self.macs: dict[nn.Module, int] = {}
        self.between: dict[nn.Module, int] = {}
        self.elements: dict[nn.Module, int] = {}  # of the inputs
        self.started: dict[nn.Module, float] = {}
        self.layers = {
            m: name for name, m in model.named_modules() if any(p is not None for p in m._parameters.values())
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _before(self, module: nn.Module, _inputs) -> None:
        self.started[module] = self._now()

    def _after(self, module: nn.Module, inputs, output) -> None:
        times = self.times[-1]
        times[module] = times.get(module, 0.0) + self._now() - self.started[module]
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self.macs[module] = self.macs.get(module, 0) + _macs(module, inputs[0], output)
            self.elements[module] = self.elements.get(module, 0) + inputs[0].numel()
            if type(module) is nn.Conv2d:
                self.between[module] = self.between.get(module, 0) + _between(module, inputs[0], output)

    def run(self) -> None:
        """One call as it is, and one with hooks."""
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        with torch.no_grad():
            start = self._now()
            call(self.model, self.inputs)
            self.total.append(self._now() - start)
            self._time_layers()
        for module in training:
            module.training = True

    def _time_layers(self) -> None:
        self.times.append({})
        self.macs.clear()
        self.between.clear()
        self.elements.clear()
        handles = [module.register_forward_pre_hook(self._before) for module in self.layers]
        handles += [module.register_forward_hook(self._after) for module in self.layers]
        try:
            call(self.model, self.inputs)
        finally:
            for handle in handles:
                handle.remove()

    def profile(self) -> Profile:
        rows = []
        for module, name in self.layers.items():
            runs = [times[module] for times in self.times[1:] if module in times]
            params = sum(p.numel() for p in module._parameters.values() if p is not None)
            weights = math.prod(module.weight.shape) if type(module) in (nn.Linear, nn.Conv2d) else 0
            compressed = isinstance(module, CMD_LAYERS)
            macs = self.macs.get(module, 0)
            rows.append(
                LayerCost(
                    name or type(module).__name__,
                    type(module).__name__,
                    _shape(module),
                    module.rank if compressed else None,
                    module.nnz if compressed else None,
                    params,
                    layer_bytes(module),
                    macs,
                    1e3 * median(runs) if runs else None,
                    macs // weights if weights else 0,
                    self.between.get(module, 0),
                    self.elements.get(module, 0),
                )
            )
        total = LayerCost(
            "total",
            "",
            "",
            None,
            None,
            sum(p.numel() for p in self.model.parameters()),
            stored_bytes(self.model),
            sum(row.macs for row in rows),
            1e3 * median(self.total[1:]),
        )
        return Profile(rows, total)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors in the file that `save` writes: parameters, saved buffers and supports, shared ones once."""
    tensors, _ = saved_tensors(model)
    return sum(map(_bytes, tensors.values())) + sum(map(_support_bytes, model.modules()))


def saved_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state without the supports of S, each memory once, and the other names of shared ones."""
    separate = {f"{name}.{part}".lstrip(".") for name in compressed_layers(model) for part in SUPPORT}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in separate or not isinstance(value, Tensor):
            continue
        memory = id(value)
        if value.numel() and not value.is_meta:
            memory = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if memory in seen:
            aliases[name] = seen[memory]
        else:
            seen[memory], tensors[name] = name, value
    return tensors, aliases


def compressed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The CMD layers under every name that they have."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, CMD_LAYERS)}
