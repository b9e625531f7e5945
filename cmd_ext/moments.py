"""What a layer's inputs look like: second moments H = E[x x^T] of the rows that meet its weight matrix.

With H the error of W ~ U V + S can be measured where it matters, in the layer's outputs: for D = W - U V - S it is
E ||D x||^2 = tr(D H D^T).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed
from .calibrate import batch_of, call, device_of, to_device
from .cost import CMD_LAYERS
from .windows import Moment, fits, sizes

POSITIONS = 256  # rows of an image: more changed neither H nor the accuracy of the networks it was tried on
MAX_FEATURES = 8192

_log = distributed.logger(__name__)


def second_moments(
    model: nn.Module,
    batches: Iterable,
    names: Iterable[str] | None = None,
    *,
    positions: int = POSITIONS,
    max_features: int = MAX_FEATURES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """H = E[x x^T] of the inputs of convolutions and linear layers, in one pass over the data.

    x is a row of the input as the weight matrix sees it: the unfolded window in the order (channel, kernel row, kernel
    column), per group. The model runs in eval mode; its modes, buffers and the random state stay as they were.

    Memory: 8 bytes for each entry of every H while they are summed, and about 200 MB for the rows at work. Rows are
    multiplied in the dtype of the inputs, float32 at least, in chunks that are short enough for it; the sums over
    chunks are float64, so that neither the number of images nor an offset of the inputs costs digits.

    With an initialised process group every rank must call it, with the same names and its own share of the data;
    all get the moments of all data. The batches of one rank may then be empty.

    Args:
        model: its nn.Conv2d, nn.Linear, CMDConv2d and CMDLinear layers are candidates.
        batches: iterable of inputs or (inputs, targets); read once.
        names: layers wanted, as in named_modules(); None: all.
        positions: at most this many rows of each image (leading index of the input), drawn from all over it. The
            choice depends on `seed` and the layer's name alone.
        max_features: a layer with groups * n * n > max_features ** 2 gets the diagonal of H only (and a log line).
        seed: of the choice of rows.

    Returns:
        name -> H in float32 (float64 where the layer is), on the model's device, in the order of the first calls:
        [n, n] or, with several groups, [groups, n, n]; [n] or [groups, n] where only the diagonal is kept. A layer
        that no batch reaches is missing, which the log tells.

    Raises:
        ValueError: no batch, a name that the model lacks, NaN or Inf in the inputs, an argument out of range.
        TypeError: a name of another kind of layer.
    """
    if positions < 1 or max_features < 1:
        raise ValueError(f"second_moments: positions and max_features must be >= 1, got {positions} and {max_features}")
    layers = {name: Moment(name, module, positions, max_features, seed) for name, module in _chosen(model, names)}
    return {moment.name: moment.result() for moment in _filled(layers, model, batches)}


@dataclass
class Paired:
    """Of a layer's inputs, x in a network whose earlier layers are compressed and y in the dense one.

    Attributes:
        moment: H = E[x x^T], as second_moments returns it.
        cross: C = E[y x^T] in the same form.
        energies: E (W y)^2 of each output [m] of the dense layer, without the bias.
    """

    moment: Tensor
    cross: Tensor
    energies: Tensor

    def target(self, weight: Tensor, groups: int, damping: float = 0.01) -> Tensor:
        """The weight that makes the best of x: W' = W (C + d I) (H + d I)^-1, with d = damping * mean(diag H).

        E ||W y - A x||^2 = tr((W' - A) H (W' - A)^T) + what no A can mend, for d = 0. The damping draws W' to W where
        there are few data. Where only diagonals are known, features count as uncorrelated.
        """
        w = weight.detach().double().reshape(groups, len(weight) // groups, -1)
        full = is_full(self.moment, groups)
        h, c = (t.double().reshape(groups, *t.shape[t.dim() - 1 - full :]) for t in (self.moment, self.cross))
        diagonal = h.diagonal(dim1=1, dim2=2) if full else h
        mean = diagonal.mean(1)[:, None]
        ridge = torch.where(mean > 0, damping * mean, 1.0)  # dead inputs: W' = W
        if not full:
            return (w * ((c + ridge) / (h + ridge))[:, None, :]).view_as(weight).to(weight)
        eye = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
        wanted = torch.bmm(w, c + ridge[:, :, None] * eye).mT
        return torch.linalg.solve(h + ridge[:, :, None] * eye, wanted).mT.reshape(weight.shape).to(weight)

    def output_error(self, weight: Tensor, approximation: Tensor, groups: int) -> float:
        """sqrt(E ||W y - A x||^2 / E ||W y||^2): what earlier layers did included; of W' x where H is a diagonal."""
        if not is_full(self.moment, groups):
            return output_error(self.target(weight, groups), approximation, self.moment, groups)
        w, a = (t.detach().double().reshape(groups, len(weight) // groups, -1) for t in (weight, approximation))
        h, c = (t.double().view(groups, *t.shape[-2:]) for t in (self.moment, self.cross))
        whole = self.energies.sum().item()
        left = whole + ((torch.bmm(a, h) - 2 * torch.bmm(w, c)) * a).sum().item()
        return math.sqrt(max(0.0, left) / whole) if whole > 0 else 0.0 if left <= 0 else math.inf


def paired_moments(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable,
    calls: dict[str, int],
    *,
    positions: int = POSITIONS,
    max_features: int = MAX_FEATURES,
    seed: int = 0,
) -> dict[str, Paired]:
    """Moments of layers in a partly compressed network, paired row by row with those in the dense one.

    Memory, ranks, errors and further arguments: as second_moments, with two matrices a layer. The rows are the same.

    Args:
        model: the partly compressed network.
        dense: the network that it came from, with layers of the same names; the two share no layer.
        calls: name -> number of calls a batch (see call_order). A call of the network ends with the last of them; where
            one is 0, which is unknown, it does not.

    Returns:
        name -> Paired.

    Source: Zhang et al., TPAMI 2016, asymmetric reconstruction.
    """
    chosen, twins = _chosen(model, calls), dict(dense.named_modules(remove_duplicate=False))
    layers = {name: Moment(name, module, positions, max_features, seed, twins[name].weight) for name, module in chosen}
    most = sum(calls.values()) if all(calls.values()) else 0
    filled = _filled(layers, model, batches, dense, most)
    return {moment.name: Paired(moment.result(), moment.result("cross"), moment.mean_energies()) for moment in filled}


def moment_bytes(module: nn.Module, max_features: int = MAX_FEATURES) -> int:
    """Memory that a layer's H takes while it is summed."""
    groups, features = sizes(module)
    return 8 * groups * features * (features if fits(groups, features, max_features) else 1)


def is_full(moment: Tensor, groups: int) -> bool:
    """Whether a moment is [n, n] or [groups, n, n], not the diagonal of it."""
    return moment.dim() == 2 + (groups > 1)


def output_error(weight: Tensor, approximation: Tensor, moment: Tensor, groups: int = 1) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)) with D = W - approximation: the relative error of the layer's outputs.

    Args:
        weight, approximation: [m, ...], flattened to [m, n].
        moment: H as second_moments returns it.
        groups: row groups of the weight.

    Returns:
        The error; 0 where the outputs are 0 and stay so, inf where they do not stay so.
    """
    wide = torch.promote_types(moment.dtype, torch.promote_types(weight.dtype, torch.float32))
    w = weight.detach().to(moment.device, wide).reshape(groups, len(weight) // groups, -1)
    d = w - approximation.detach().to(moment.device, wide).reshape(w.shape)
    full = is_full(moment, groups)
    h = moment.to(wide).reshape(groups, -1 if full else 1, w.shape[2])

    def energy(a: Tensor) -> float:
        product = torch.bmm(a, h) if full else a * h
        return max(0.0, (product * a).sum(dtype=torch.float64).item())

    left, whole = energy(d), energy(w)
    return math.sqrt(left / whole) if whole > 0 else 0.0 if left == 0 else math.inf


def row_energies(weight: Tensor, moment: Tensor, groups: int = 1) -> Tensor:
    """E (W x)^2 of each output [m]: the diagonal of W H W^T, in float64; arguments as of output_error."""
    wide = torch.promote_types(moment.dtype, torch.promote_types(weight.dtype, torch.float32))
    full = is_full(moment, groups)
    h = moment.to(wide).reshape(groups, -1 if full else 1, weight[0].numel())
    w = weight.detach().to(moment.device, wide).reshape(groups, len(weight) // groups, -1)
    return ((torch.bmm(w, h) if full else w * h) * w).sum(2, dtype=torch.float64).flatten().clamp_min(0)


def row_gains(energies: Tensor, approximation: Tensor, moment: Tensor, groups: int = 1) -> Tensor:
    """Factors [m] that give the outputs of an approximation the energy that those of the dense layer have.

    Args:
        energies: E (W x)^2 of the dense layer's outputs [m], as row_energies has them.
        approximation, moment, groups: as of output_error.

    Returns:
        sqrt(energies / E (A x)^2), between 1 / 1.5 and 1.5; 1 for rows without outputs.
    """
    ours = row_energies(approximation, moment, groups)
    wanted = energies.to(ours)
    ratio = torch.where((wanted > 0) & (ours > 0), wanted / ours.clamp_min(torch.finfo(ours.dtype).tiny), 1.0)
    return ratio.sqrt().clamp(1 / 1.5, 1.5)


def call_order(model: nn.Module, inputs: object, names: Iterable[str]) -> dict[str, int]:
    """name -> number of calls of the layers that a call of the model reaches, in the order of their first calls."""
    count: dict[str, int] = {}

    def hook(name: str):
        def note(*_) -> None:
            count[name] = count.get(name, 0) + 1

        return note

    with _untouched(model), _hooked({name: hook(name) for name in names}, model):
        call(model, to_device(inputs, device_of(model)))
    return count


def _chosen(model: nn.Module, names: Iterable[str] | None) -> list[tuple[str, nn.Module]]:
    kinds = (nn.Conv2d, nn.Linear, *CMD_LAYERS)
    if names is None:
        return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    modules = dict(model.named_modules(remove_duplicate=False))
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in modules:
            near = get_close_matches(name, modules, 1)
            raise ValueError(
                f"second_moments: names has no layer {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if not isinstance(modules[name], kinds):
            raise TypeError(
                f"second_moments: {name!r} must be a Conv2d, Linear, CMDConv2d or CMDLinear, "
                f"got {type(modules[name]).__name__}"
            )
    return [(name, modules[name]) for name in names]


def _filled(layers: dict[str, Moment], model: nn.Module, batches: Iterable, *twin) -> list[Moment]:
    """The layers that were reached on any rank, with the sums over all of them, in the order of the first calls."""
    failure, count = None, 0
    try:
        count = _collect(model, batches, layers, *twin)
    except Exception as error:
        failure = error
    _agree(failure, [*layers], count)
    for moment in layers.values():
        moment.reduce(device_of(model))
    unseen = [name for name, moment in layers.items() if not moment.rows]
    if unseen:
        _log.warning("second_moments: no batch reaches %s", ", ".join(unseen))
    return sorted((moment for moment in layers.values() if moment.rows), key=lambda moment: moment.first_call)


class _LastCall(Exception):
    """Ends a call of the model: what follows is not wanted."""


def _collect(
    model: nn.Module, batches: Iterable, layers: dict[str, Moment], dense: nn.Module | None = None, most: int = 0
) -> int:
    """Feeds the layers with what the calls of a model (and of its twin) bring; returns the number of batches.

    A call of the model ends after `most` calls of layers, if that is not 0.
    """
    finite: list[tuple[str, Tensor]] = []  # of this batch's calls; read once a batch, as reading waits for a GPU
    twins: dict[str, list[Tensor]] = {}  # of this batch, what the dense twin's layers got
    calls, here, count, device = 0, 0, 0, device_of(model)

    def counted() -> None:
        nonlocal here
        here += 1
        if here == most:
            raise _LastCall

    def hook(name: str):
        def note(_module: nn.Module, args: tuple, kwargs: dict, _output: object) -> None:
            nonlocal calls
            moment = layers[name]
            if moment.first_call is None:
                moment.first_call = calls
            calls += 1
            x = _input(args, kwargs)
            if x.numel():
                finite.append((name, torch.stack(x.aminmax()).isfinite().all()))  # one pass, which NaN and Inf survive
            with torch.autocast(x.device.type, enabled=False):
                moment.add(x, twins[name].pop(0) if dense else None)
            counted()

        return note

    def twin_hook(name: str):
        def keep(_module: nn.Module, args: tuple, kwargs: dict, _output: object) -> None:
            twins.setdefault(name, []).append(_input(args, kwargs).clone())
            counted()

        return keep

    def run(network: nn.Module, inputs: object) -> None:
        nonlocal here
        here = 0
        with suppress(_LastCall):
            call(network, inputs)

    with ExitStack() as stack:
        for network, kind in ((model, hook), (dense, twin_hook)):
            if network is not None:
                stack.enter_context(_untouched(network))
                stack.enter_context(_hooked({name: kind(name) for name in layers}, network))
        for count, item in enumerate(batches, 1):
            inputs = to_device(batch_of(item)[0], device)
            finite.clear()
            twins.clear()
            if dense is not None:
                run(dense, inputs)
            run(model, inputs)
            if finite and not (flags := torch.stack([flag for _, flag in finite]).cpu()).all():
                first = finite[int(flags.logical_not().nonzero()[0])][0]
                raise ValueError(
                    f"second_moments: inputs must be finite, got NaN or Inf in batch {count - 1}, "
                    f"first in the input of layer {first!r}"
                )
    return count


def _input(args: tuple, kwargs: dict) -> Tensor:
    """The input of a layer's call."""
    x = (args[0] if args else kwargs.get("input", kwargs.get("x"))).detach()
    return torch.cat(x.unbind()) if x.is_nested else x  # padded sequences on the fast path of nn.TransformerEncoder


def _agree(failure: Exception | None, names: list[str], count: int) -> None:
    """Raises on every rank what failed on one of them: a rank alone would leave the others waiting."""
    states = [(failure and f"{type(failure).__name__}: {failure}", names, count)]
    if distributed.world_size() > 1:
        states *= distributed.world_size()
        dist.all_gather_object(states, states[0])
    if failure is not None:
        raise failure
    for rank, (text, others, _) in enumerate(states):
        if text is not None:
            raise RuntimeError(f"second_moments: rank {rank} failed: {text}")
        if others != names:
            raise ValueError(f"second_moments: every rank must want the same layers, got others on rank {rank}")
    if not sum(batches for *_, batches in states):
        raise ValueError("second_moments: want an iterable of inputs or (inputs, targets), got an empty one")


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; then the modes, buffers and random states of before."""
    training = [module for module in model.modules() if module.training]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


@contextmanager
def _hooked(hooks: dict, model: nn.Module) -> Iterator[None]:
    """Forward hooks of modules by name, removed at the end whatever happens.

    They come after the layer's own checks of its input.
    """
    modules, handles = dict(model.named_modules(remove_duplicate=False)), []
    try:
        for name, hook in hooks.items():
            handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
