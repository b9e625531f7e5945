"""CMDLinear and CMDConv2d: drop-in layers whose weight is U V + S."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _C, dispatch, forms, ops
from .decompose import Decomposition, decompose

BACKENDS = ("auto", "fused", "lowrank", "dense")
MOST_KEPT = 8  # input sizes whose plans a convolution keeps

_kept_call, _is_dynamo_compiling = _C.kept_call, torch.compiler.is_dynamo_compiling  # a look-up takes as long as a call
# What keeps a call from what the layer has kept, or at least from the short way to it: functions without arguments.
_OBSTACLES = (
    torch._C._is_tracing,  # sizes may be symbols
    torch.is_grad_enabled,
    torch._C._is_any_autocast_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._functorch.maybe_current_level,
)


class _LowRankSparse(nn.Module):
    """Parameters and bookkeeping of a weight matrix [m, n] held as U V + S, in `groups` row groups.

    Parameters u [m * taps, r], v [groups * r, n / taps], values [nnz] and bias [m]; taps is 1 but for the spatial form
    of a convolution. Buffers row_ptr, col_idx (saved) and the transposed support (rebuilt). The support is fixed while
    training; loading a state_dict may change it.
    """

    _is_convolution = False
    _activation: str | None = None
    form, _taps = "channel", 1

    def __init__(self, m: int, n: int, groups: int, rank: int, density: float, bias: bool, device, dtype) -> None:
        super().__init__()
        name, taps = type(self).__name__, self._taps
        full = min(m * taps // groups, n // taps)
        if not 0 <= rank <= full:
            raise ValueError(f"{name}: rank must lie in [0, min({forms.sides(taps)})] = [0, {full}], got {rank}")
        if not 0 <= density <= 1:
            raise ValueError(f"{name}: density must lie in [0, 1], got {density}")
        self.groups, self._backend = groups, "auto"
        self._noted, self._tokens, self._inputs_per_token = None, dispatch.TOKENS, float(n)  # of the latest call
        # For calls without derivatives: the state of the parameters, calls by input size, and what these share.
        self._kept: tuple[tuple, dict, dict] | None = None
        factory = {"device": device, "dtype": dtype}
        nnz = round(density * m * n)
        self.u = nn.Parameter(torch.empty(m * taps, rank, **factory))
        self.v = nn.Parameter(torch.empty(groups * rank, n // taps, **factory))
        self.values = nn.Parameter(torch.empty(nnz, **factory))
        # Registered, not assigned, where it is None: kept_call (csrc/kept_call.h) looks for it among the parameters.
        self.register_parameter("bias", nn.Parameter(torch.empty(m, **factory)) if bias else None)
        self._set_pattern(_random_pattern(m, n, nnz, groups, self.u.device))
        self.reset_parameters()

    def _set_pattern(self, pattern: ops.Pattern) -> None:
        for name, tensor in pattern._asdict().items():
            self.register_buffer(name, tensor, persistent=name in ("row_ptr", "col_idx"))

    def reset_parameters(self) -> None:
        """The variance of nn.Linear's and nn.Conv2d's own initialisation, shared between the branches by parameters."""
        n, r, nnz, factors = self.matrix_shape[1], self.rank, self.nnz, self.u.numel() + self.v.numel()
        bound, share = 1 / math.sqrt(n), factors / max(1, factors + nnz)
        with torch.no_grad():
            if r > 0:  # var(U V) = r var(u) var(v)
                factor = math.sqrt(3) * (share * bound**2 / 3 / r) ** 0.25
                self.u.uniform_(-factor, factor)
                self.v.uniform_(-factor, factor)
            if nnz > 0:
                limit = bound * math.sqrt((1 - share) / self.density)
                self.values.uniform_(-limit, limit)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of the weight matrix."""
        return self.u.shape[0] // self._taps, self.v.shape[1] * self._taps

    @property
    def rank(self) -> int:
        """Columns of U (per group)."""
        return self.u.shape[1]

    @property
    def nnz(self) -> int:
        """Stored entries of S."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """nnz / (m * n)."""
        m, n = self.matrix_shape
        return self.nnz / (m * n)

    @property
    def pattern(self) -> ops.Pattern:
        """Support of S in both orientations."""
        return ops.Pattern(self.row_ptr, self.col_idx, self.col_ptr, self.row_idx, self.perm)

    @property
    def backend(self) -> str:
        """What computes this layer: "fused" (the sparse kernels), "lowrank" (S is empty) or "dense" (W rebuilt).

        Assign one of these to override the choice, "auto" to return to it. The automatic choice is what `dispatch`
        predicts to be fastest for the device, the dtype and the size of the latest call; "dense" where U V and S
        together would take longer than W, and on devices without our kernels. On the CPU, calls without gradients time
        the candidates once for each input size where these are short or close, and take "dense" where the others gain
        less than 5 % (CMD_EXT_AUTOTUNE=0 leaves it at the prediction).
        A rebuilt W is kept until a parameter changes, but for calls that record gradients, which rebuild it each time;
        so are, on the CPU, the packed weights of the fused kernels, for each of the latest input sizes.
        """
        if self._backend != "auto":
            return self._backend
        kept, rebuild = self._kept, self._records_gradients()
        if kept is not None and not rebuild and self._noted in kept[2] and _is_state(kept[0], self._sources()):
            return kept[2][self._noted]
        return dispatch.choose(self._work(), self.u.device, rebuild)

    @backend.setter
    def backend(self, choice: str) -> None:
        if choice not in BACKENDS:
            raise ValueError(f"{type(self).__name__}: backend must be one of {', '.join(BACKENDS)}, got {choice!r}")
        if choice == "lowrank" and self.nnz > 0:
            raise ValueError(f"{type(self).__name__}: backend 'lowrank' needs an empty S, got nnz = {self.nnz}")
        self._backend, self._kept = choice, None

    @property
    def activation(self) -> str | None:
        """None, or "relu": the outputs are max(y, 0), for free in the fused convolution. `fuse` assigns it."""
        return self._activation

    @activation.setter
    def activation(self, name: str | None) -> None:
        if name not in (None, "relu"):
            raise ValueError(f"{type(self).__name__}: activation must be None or 'relu', got {name!r}")
        self._activation, self._kept = name, None

    def _activated(self, y: Tensor) -> Tensor:
        return y if self._activation is None else F.relu(y)

    def _activated_(self, y: Tensor) -> Tensor:
        return y if self._activation is None else y.relu_()

    @property
    def predicted_ms(self) -> dict[str, float]:
        """Predicted milliseconds of the latest call's size by backend; empty on devices without a model."""
        times = dispatch.predicted(self._work(), self.u.device, self._records_gradients())
        return {backend: 1e3 * seconds for backend, seconds in times.items()}

    def _work(self) -> dispatch.Work:
        u, v, values, *_ = self._sources()
        (rows, rank), taps, tokens = u.shape, self._taps, self._tokens
        m, n = rows // taps, v.shape[1] * taps
        inputs = int(tokens * self._inputs_per_token)
        return dispatch.Work(
            m, n, self.groups, rank, values.shape[0], tokens, inputs, tokens * m, u.dtype, self._is_convolution
        )

    def _note_size(self, x: Tensor) -> None:
        """Remembers the size of a call for the choice of the backend."""
        tokens = self._tokens_of(x)
        if tokens > 0:
            self._noted, self._tokens, self._inputs_per_token = x.shape, tokens, x.numel() / tokens

    def _records_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(_requires_grad(t) for t in self._sources())

    def _sources(self) -> tuple[Tensor | None, ...]:
        """The tensors of U V + S and the bias, past Module.__getattr__ where possible: it takes long."""
        p, b = self._parameters, self._buffers
        try:
            return p["u"], p["v"], p["values"], p["bias"], b["row_ptr"], b["col_idx"]
        except KeyError:  # parametrized, pruned or a replica of DataParallel
            return self.u, self.v, self.values, self.bias, self.row_ptr, self.col_idx

    def forward(self, x: Tensor) -> Tensor:
        if not _is_dynamo_compiling():
            call = _kept_call(self.__dict__, x, _OBSTACLES)
            if call is not None:
                return call(self, x)
            if not (torch.compiler.is_compiling() or torch._C._is_tracing()):
                return self._forward(x)
        return self._activated(self._compute(x))  # sizes may be symbols

    def _forward(self, x: Tensor) -> Tensor:
        if (shape := x.shape) != self._noted:
            self._note_size(x)
        sources = self._sources()
        if torch.is_grad_enabled() and any(_requires_grad(t) for t in (x, *sources)):
            return self._activated(self._compute(x))
        if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None:
            return self._activated(self._compute(x))
        kept = self._kept
        if kept is None or not _is_state(kept[0], sources):
            if any(t is not None and t.is_inference() for t in sources):  # these have no version
                return self._activated(self._compute(x))
            kept = self._kept = _state(sources), {}, {}
        _, calls, shared = kept
        dtype = torch.get_autocast_dtype(x.device.type) if torch._C._is_any_autocast_enabled() else x.dtype
        call = calls.get((dtype, shape))
        if call is None:  # two threads may both build it: the same
            if len(calls) >= MOST_KEPT:
                calls.clear()
            with torch.no_grad():
                call = calls[dtype, shape] = self._prepare(x, shared)
        return call(self, x)

    def _prepare(self, x: Tensor, shared: dict):
        """A function of (layer, x) for inputs like x, without gradients; `shared` tells the choice for their size."""
        if self._backend != "auto":
            return self._prepare_by(self._backend, x, shared)
        ways, had_matrix = dispatch.candidates(self._work(), x.device), "matrix" in shared
        calls = {way: self._prepare_by(way, x, shared) for way in ways}
        shared[x.shape] = way = ways[0] if len(ways) == 1 else dispatch.fastest(calls, self, x)
        if way != "dense" and not had_matrix:
            shared.pop("matrix", None)  # built to be timed
        return calls[way]

    def _prepare_by(self, backend: str, x: Tensor, shared: dict):
        """A function of (layer, x) for inputs like x, without gradients.

        It holds what depends on the weights alone: W for the dense backend, the plan of the fused kernels. What serves
        several sizes is left in `shared`.
        """
        if backend == "dense":
            matrix = shared.get("matrix")
            if matrix is None:
                matrix = shared["matrix"] = self._matrix()
            return self._dense_call(matrix)
        return lambda layer, x: layer._activated_(layer._compute(x, backend))

    def _dense_call(self, matrix: Tensor):
        return lambda layer, x: layer._activated_(layer._dense(x, matrix))

    def _apply(self, fn, recurse=True):
        self._kept = None  # an empty tensor's dtype and device are no part of the state
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}

    def _matrix(self) -> Tensor:
        """U V + S as [m, n], differentiable."""
        return ops.dense_weight(self.u, self.v, self.values, self.pattern, self.groups)

    @property
    def weight(self) -> Tensor:
        """The dense weight, rebuilt; for code that reads `.weight` of a layer."""
        return self.dense_weight()

    def _assign(self, fit: Decomposition, like: nn.Module) -> None:
        """Takes over a decomposition and the rest (bias, dtype, mode, requires_grad) of the dense layer `like`."""
        weight = like.weight
        for name in ("u", "v", "values"):
            setattr(self, name, nn.Parameter(getattr(fit, name).to(weight), requires_grad=weight.requires_grad))
        pattern = ops.Pattern.from_csr(fit.row_ptr, fit.col_idx, self.matrix_shape[1], self.groups)
        self._set_pattern(ops.Pattern(*(t.to(weight.device) for t in pattern)))
        if like.bias is not None:
            self.bias = nn.Parameter(like.bias.detach().clone(), requires_grad=like.bias.requires_grad)
        self.train(like.training)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Adopts the rank, the support and the form of the checkpoint, then loads as usual."""
        names = ("u", "v", "values", "row_ptr", "col_idx")
        saved = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if len(saved) == len(names):
            try:
                form, pattern = self._form_of(saved), self._pattern_of(saved)
            except ValueError as error:
                errors.append(f"{prefix[:-1] or type(self).__name__}: {error}")
                return
            for name in ("u", "v", "values"):
                parameter = getattr(self, name)
                if parameter.shape != saved[name].shape:
                    parameter.data = parameter.new_empty(saved[name].shape)
                    parameter.grad = None
            self._set_pattern(ops.Pattern(*(t.to(self.u.device) for t in pattern)))
            self._set_form(form)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _taps_by_form(self) -> dict[str, int]:
        """Of the forms that the layer can have, its own first."""
        return {self.form: self._taps}

    def _set_form(self, form: str) -> None:
        self.form, self._taps = form, self._taps_by_form()[form]

    def _form_of(self, saved: dict[str, Tensor]) -> str:
        """The form of the factors in a checkpoint, by their shapes."""
        (m, n), g, u, v = self.matrix_shape, self.groups, saved["u"], saved["v"]
        r = u.shape[1] if u.dim() == 2 else -1
        wanted = {form: ((m * taps, r), (g * r, n // taps)) for form, taps in self._taps_by_form().items()}
        for form, shapes in wanted.items():
            if (u.shape, v.shape) == shapes:
                return form
        told = " or ".join(f"[{rows}, r] and [{g} * r, {columns}]" for (rows, _), (_, columns) in wanted.values())
        raise ValueError(f"u and v must be {told}, got {[*u.shape]} and {[*v.shape]}")

    def _pattern_of(self, saved: dict[str, Tensor]) -> ops.Pattern:
        """The support in a checkpoint, checked against this layer's m and n."""
        (m, n), g = self.matrix_shape, self.groups
        _, _, values, row_ptr, col_idx = saved.values()
        if row_ptr.shape != (m + 1,) or values.shape != col_idx.shape:
            got = f"{[*row_ptr.shape]}, {[*values.shape]} and {[*col_idx.shape]}"
            raise ValueError(f"row_ptr, values and col_idx must be [{m + 1}], [nnz] and [nnz], got {got}")
        return ops.Pattern.from_csr(row_ptr, col_idx, n, g)

    def _v(self) -> Tensor:
        """V for the low-rank path; the empty `values` join in (as + 0) so that DDP finds a gradient for all."""
        return self.v + self.values.sum() if torch.is_grad_enabled() else self.v

    def _extra(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        activation = "" if self._activation is None else f", activation={self._activation}"
        return f"{bias}, rank={self.rank}, nnz={self.nnz}, density={self.density:.4g}{activation}"


def _requires_grad(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


def _state(sources: tuple[Tensor | None, ...]) -> tuple:
    """What tells whether a source was replaced or changed in place; csrc/kept_call.h compares the same.

    These are the versions of all but the bias, which calls read anew, and the addresses of u, v and values. The aliases
    at the end keep the memory, so that no other data of a source can come to lie at its address.
    """
    u, v, s, _, r, c = sources
    versions, addresses = (u._version, v._version, s._version, r._version, c._version), _addresses(u, v, s)
    return sources, versions, addresses, [t.detach() for t in sources if t is not None]


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


def _is_state(state: tuple, sources: tuple[Tensor | None, ...]) -> bool:
    """Whether these are the sources of a state, unchanged."""
    (u, v, s, b, r, c), versions, addresses, _ = state
    x, y, z, bias, p, q = sources
    return (
        u is x and v is y and s is z and b is bias and r is p and c is q
        and (u._version, v._version, s._version, r._version, c._version) == versions
        and _addresses(u, v, s) == addresses
    )  # fmt: skip


def _random_pattern(m: int, n: int, nnz: int, groups: int, device: torch.device) -> ops.Pattern:
    """One random position in each of nnz equal strata of [m, n]: uniform density, sorted, in O(nnz)."""
    if device.type == "meta":
        sizes = (m + 1, nnz, groups * n + 1, nnz, nnz)
        return ops.Pattern(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))
    start = torch.arange(nnz + 1, device=device) * (m * n) // max(nnz, 1)
    linear = start[:-1] + (torch.rand(nnz, device=device, dtype=torch.float64) * start.diff()).long()
    row_ptr = torch.searchsorted(linear, torch.arange(m + 1, device=device) * n)
    return ops.Pattern.from_csr(row_ptr, linear % n, n, groups)


class CMDLinear(_LowRankSparse):
    """nn.Linear with the weight U V + S.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        rank: columns of U, 0 to min(out_features, in_features).
        density: nnz of S / (out_features * in_features), 0 to 1; the support is drawn at random.

    Shape: [..., in_features] -> [..., out_features].

    Raises:
        ValueError: rank or density out of range.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, rank, density) -> None:
        self.in_features, self.out_features = in_features, out_features
        super().__init__(out_features, in_features, 1, rank, density, bias, device, dtype)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, *, rank=None, density=None, budget=None, sparse_coefficient=None, **fit
    ) -> CMDLinear:
        """Decomposes a trained layer, by (rank, density) or by (budget, sparse_coefficient).

        Further arguments go to `decompose`, whose errors it raises.
        """
        return cls._from_fit(linear, _fit(linear, rank, density, budget, sparse_coefficient, **fit))

    @classmethod
    def _from_fit(cls, linear: nn.Linear, fit: Decomposition) -> CMDLinear:
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", rank=0, density=0)
        layer._assign(fit, linear)
        return layer

    def _compute(self, x: Tensor, backend: str | None = None) -> Tensor:
        backend = backend or self.backend
        if backend == "fused":
            return ops.lrs_linear(x, self.u, self.v, self.values, self.pattern, self.bias)
        if backend == "lowrank":
            return F.linear(F.linear(x, self._v()), self.u, self.bias)
        return self._dense(x, self._matrix())

    def _dense(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix, self.bias)

    def _dense_call(self, matrix: Tensor):
        if self._activation is not None:
            return super()._dense_call(matrix)
        linear, bias = F.linear, self.bias
        return lambda layer, x: linear(x, matrix, bias)

    def _prepare_by(self, backend: str, x: Tensor, shared: dict):
        if backend == "lowrank":
            return lambda layer, x: layer._activated_(F.linear(F.linear(x, layer.v), layer.u, layer.bias))
        if backend != "fused" or x.device.type != "cpu" or x.dtype != self.u.dtype or x.numel() == 0:
            return super()._prepare_by(backend, x, shared)
        few = x.numel() <= ops.FEW_SAMPLES * self.in_features
        key = few, torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        plan = shared.get(key)
        if plan is None:
            plan = shared[key] = ops.plan_lrs_linear(self.values, self.pattern, self.in_features, few)
        return lambda layer, x: layer._activated_(ops.planned_lrs_linear(x, layer.u, layer.v, plan, layer.bias))

    def _tokens_of(self, x: Tensor) -> int:
        return x.numel() // max(self.in_features, 1)

    def dense_weight(self) -> Tensor:
        """U V + S as [out_features, in_features], differentiable."""
        return self._matrix()

    def to_dense(self) -> nn.Linear:
        """An nn.Linear with the same outputs (to rounding), followed by an nn.ReLU where `activation` says so."""
        options = {"device": self.u.device, "dtype": self.u.dtype}
        return _densify(self, nn.Linear(self.in_features, self.out_features, self.bias is not None, **options))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}{self._extra()}"


class CMDConv2d(_LowRankSparse):
    """nn.Conv2d with the kernel U V + S, as a matrix [out_channels, in_channels / groups * kernel_h * kernel_w].

    Args:
        in_channels .. dtype: as in nn.Conv2d (every padding, padding_mode, dilation and groups).
        rank: columns of U, 0 to min(out_channels / groups, in_channels / groups * kernel_h * kernel_w), per group; in
            the spatial form to min(out_channels * kernel_h / groups, in_channels / groups * kernel_w).
        density: nnz of S / entries of the kernel, 0 to 1; the support is drawn at random.
        form: of U V: "channel", a kernel_h x kernel_w convolution and a 1 x 1 one, or "spatial", a 1 x kernel_w and a
            kernel_h x 1 one (forms.py): U is [out_channels * kernel_h, rank], V [groups * rank, in_channels / groups *
            kernel_w]. The spatial form runs as two dense convolutions beside the kernel of S.

    Shape: [batch, in_channels, height, width] or [in_channels, height, width], as nn.Conv2d.

    Raises:
        ValueError: an argument out of range.
    """

    _is_convolution = True

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        rank,
        density,
        form="channel",
    ) -> None:
        # nn.Conv2d checks these arguments and settles `padding`; on the meta device it costs nothing.
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode, "meta"
        )
        forms.check_form("CMDConv2d", form, conv.kernel_size)
        m, n = out_channels, conv.weight[0].numel()
        self.form, self._taps = form, forms.taps_of(form, conv.kernel_size)
        super().__init__(m, n, groups, rank, density, bias, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, padding_mode
        self._pad = forms.padding_ahead(conv)
        self._inner_padding = tuple(conv._reversed_padding_repeated_twice[::-2]) if self._pad is None else (0, 0)

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        *,
        rank=None,
        density=None,
        budget=None,
        sparse_coefficient=None,
        form="channel",
        **fit,
    ) -> CMDConv2d:
        """Decomposes a trained layer, by (rank, density) or by (budget, sparse_coefficient).

        The form is "channel", "spatial" or "auto": the one with the lower error at the budget, "channel" where there is
        only one, or a second moment. Further arguments go to `decompose`, whose errors it raises.
        """
        sizes = rank, density, budget, sparse_coefficient
        return cls._from_fit(conv, _fit(conv, *sizes, form=form, groups=conv.groups, **fit))

    @classmethod
    def _from_fit(cls, conv: nn.Conv2d, fit: Decomposition) -> CMDConv2d:
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        has_bias = conv.bias is not None
        options = {"device": "meta", "rank": 0, "density": 0, "form": fit.form}
        layer = cls(conv.in_channels, conv.out_channels, *geometry, has_bias, conv.padding_mode, **options)
        layer._assign(fit, conv)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if self._pad is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._pad, mode=mode)
        return super().forward(x)

    @property
    def _geometry(self) -> tuple:
        return self.stride, self._inner_padding, self.dilation, self.groups

    def _compute(self, x: Tensor, backend: str | None = None) -> Tensor:
        backend, kernel = backend or self.backend, self.kernel_size
        if self._taps > 1 and backend != "dense":
            return self._compute_spatial(x)
        if backend == "fused":
            return ops.lrs_conv2d(x, self.u, self.v, self.values, self.pattern, self.bias, kernel, *self._geometry)
        if backend == "lowrank" and self.rank > 0:
            z = F.conv2d(x, self._v().view(-1, self.in_channels // self.groups, *kernel), None, *self._geometry)
            return F.conv2d(z, self.u.view(*self.u.shape, 1, 1), self.bias, groups=self.groups)
        return self._dense(x, self._matrix())

    def _compute_spatial(self, x: Tensor) -> Tensor:
        """The spatial form: two thin dense convolutions beside the sparse kernel of S."""
        if self.nnz == 0 and self.rank > 0:
            return self._thin(x, self._v(), self.bias)
        geometry = self.bias, self.kernel_size, *self._geometry
        y = ops.lrs_conv2d(x, *self._no_factors(), self.values, self.pattern, *geometry)
        return y + self._thin(x, self.v, None) if self.rank > 0 else y

    def _thin(self, x: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        kernels = forms.thin_kernels(self.u, v, self.kernel_size)
        return forms.thin_convolutions(x, *kernels, bias, *self._geometry)

    def _no_factors(self) -> tuple[Tensor, Tensor]:
        """U and V of rank 0 in the channel form; where the rank is 0, the parameters, so that they get gradients."""
        m, n = self.matrix_shape
        u, v = (self.u, self.v) if self.rank == 0 else (self.u.detach()[:, :0], self.v.detach()[:0])
        return u.reshape(m, 0), v.reshape(0, n)

    def _dense(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.conv2d(x, matrix.view(self.out_channels, -1, *self.kernel_size), self.bias, *self._geometry)

    def _dense_call(self, matrix: Tensor):
        if self._activation is not None:
            return super()._dense_call(matrix)
        arguments = matrix.view(self.out_channels, -1, *self.kernel_size), self.bias, *self._geometry
        return lambda layer, x: F.conv2d(x, *arguments)

    def _prepare_by(self, backend: str, x: Tensor, shared: dict):
        ours = backend == "fused" or (self._taps > 1 and backend == "lowrank")
        if not ours or x.device.type != "cpu" or x.shape[0] == 0 or x.dtype != self.u.dtype:
            return super()._prepare_by(backend, x, shared)
        if self._taps > 1:
            return self._prepare_spatial(x, shared)
        plan_for = self._plans(self.u, self.v, self.values, self.pattern)
        plan_for(x)
        return lambda layer, x: ops.planned_lrs_conv2d(x, plan_for(x), layer.bias, layer._activation is not None)

    def _plans(self, *weights):
        """A function of x: the plan for its memory format, made when it is first met."""
        plans, geometry = {}, (self.kernel_size, *self._geometry)

        def plan_for(x: Tensor) -> Tensor:
            contiguous = x.is_contiguous()
            plan = plans.get(contiguous)
            if plan is None:
                with torch.no_grad():
                    plan = plans[contiguous] = ops.plan_lrs_conv2d(*weights, x.shape, not contiguous, *geometry)
            return plan

        return plan_for

    def _prepare_spatial(self, x: Tensor, shared: dict):
        kernels, geometry = shared.get("kernels"), self._geometry
        if kernels is None:
            kernels = shared["kernels"] = forms.thin_kernels(self.u, self.v, self.kernel_size)
        if self.nnz == 0 and self.rank > 0:
            return lambda layer, x: layer._activated_(forms.thin_convolutions(x, *kernels, layer.bias, *geometry))
        plan_for = self._plans(*self._no_factors(), self.values, self.pattern)
        plan_for(x)
        if self.rank == 0:
            return lambda layer, x: ops.planned_lrs_conv2d(x, plan_for(x), layer.bias, layer._activation is not None)

        def call(layer: CMDConv2d, x: Tensor) -> Tensor:
            y = ops.planned_lrs_conv2d(x, plan_for(x), layer.bias)
            return layer._activated_(y.add_(forms.thin_convolutions(x, *kernels, None, *geometry)))

        return call

    def _matrix(self) -> Tensor:
        if self._taps == 1:
            return super()._matrix()
        return forms.spatial_weight(self.u, self.v, self.values, self.pattern, self.kernel_size, self.groups)

    def _taps_by_form(self) -> dict[str, int]:
        taps = {form: forms.taps_of(form, self.kernel_size) for form in forms.FORMS}
        return {self.form: self._taps} | (taps if forms.has_two_forms(self.kernel_size) else {})

    def _work(self) -> dispatch.Work:
        work = super()._work()
        if self._taps == 1 or work.rank == 0:
            return work
        between = work.tokens
        if self._noted is not None:
            batch, _, rows, columns = self._noted
            between = batch * rows * self._out_size(columns, 1)
        return dataclasses.replace(work, taps=self._taps, between=between)

    def _tokens_of(self, x: Tensor) -> int:
        """Pixels of the output, over the batch."""
        return x.shape[0] * self._out_size(x.shape[2], 0) * self._out_size(x.shape[3], 1)

    def _out_size(self, size: int, axis: int) -> int:
        span = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (size + 2 * self._inner_padding[axis] - span) // self.stride[axis] + 1

    def dense_weight(self) -> Tensor:
        """U V + S as [out_channels, in_channels / groups, kernel_h, kernel_w], differentiable."""
        return self._matrix().view(self.out_channels, -1, *self.kernel_size)

    def to_dense(self) -> nn.Conv2d:
        """An nn.Conv2d with the same outputs (to rounding), followed by an nn.ReLU where `activation` says so."""
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        options = {"device": self.u.device, "dtype": self.u.dtype}
        has_bias = self.bias is not None
        conv = nn.Conv2d(self.in_channels, self.out_channels, *geometry, has_bias, self.padding_mode, **options)
        return _densify(self, conv)

    def extra_repr(self) -> str:
        parts = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                parts += f", {name}={getattr(self, name)!r}"
        parts += f", form={self.form!r}" if self.form != "channel" else ""
        return parts + self._extra()


def replace(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Puts `layer` in the place `name` of the model, in place; returns the model (or the layer, for the name "")."""
    if not name:
        return layer
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], layer)
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its inference fast path reads the weights and never calls the layers, and the encoder's feeds it nested
        # tensors; these flags are what switches the two off.
        parent.activation_relu_or_gelu = 0
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
    return model


def _fit(
    layer: nn.Module, rank, density, budget, sparse_coefficient, form="channel", second_moment=None, **options
) -> Decomposition:
    """Decomposes a layer's weight in the form of least error; a density becomes nnz."""
    kernel_size = layer.weight.shape[2:]
    forms.check_form("from_dense", form, kernel_size, second_moment, (*forms.FORMS, "auto"))
    if form == "auto" and rank and budget is None:
        raise ValueError(f"from_dense: form 'auto' needs a budget to compare the forms at, got rank = {rank}")
    several = form == "auto" and budget is not None and second_moment is None and forms.has_two_forms(kernel_size)
    nnz = None
    if density is not None:
        if not 0 <= density <= 1:
            raise ValueError(f"from_dense: density must lie in [0, 1], got {density}")
        nnz = round(density * layer.weight.numel())
    options |= {"rank": rank, "nnz": nnz, "budget": budget, "sparse_coefficient": sparse_coefficient}
    if second_moment is not None:
        options["second_moment"] = second_moment
    kinds = forms.FORMS if several else ("channel",) if form == "auto" else (form,)
    return min((decompose(layer.weight, form=kind, **options) for kind in kinds), key=lambda fit: fit.relative_error)


def _densify(layer: _LowRankSparse, dense: nn.Module) -> nn.Module:
    with torch.no_grad():
        dense.weight.copy_(layer.dense_weight())
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    dense.weight.requires_grad_(layer.values.requires_grad)
    dense.train(layer.training)
    return dense if layer.activation is None else nn.Sequential(dense, nn.ReLU())
