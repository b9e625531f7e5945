"""Random layers, and how far the operators may be from cmd_ext.ref in float64: each rounding counted once."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from cmd_ext import ops, ref
from cmd_ext.ops import Pattern

F32, F64, HALVES = torch.float32, torch.float64, (torch.bfloat16, torch.float16)
DTYPES = (F64, F32, *HALVES)

# Whether 16-bit types round the branches of a layer too: the CUDA path multiplies them natively. Set by the fixture
# `device`.
branches_are_rounded = False


def random(*size: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(size, dtype=F64).to(dtype)


def fixed(size) -> Tensor:
    """The same random numbers at every call and on every device."""
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randn(size, dtype=F64, device="cpu", generator=generator).to(torch.get_default_device())


def layer(m: int, n: int, rank: int, nnz: int, groups: int = 1, dtype: torch.dtype = F64):
    """u, v, values and pattern of a random layer."""
    values, row_ptr, col_idx = ref.topk_csr(random(m, n), nnz)
    pattern = Pattern.from_csr(row_ptr, col_idx, n, groups)
    return random(m, rank, dtype=dtype), random(groups * rank, n, dtype=dtype), values.to(dtype), pattern


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def apply(change, args) -> list:
    """The arguments with `change` applied to the floating tensors."""
    return [change(a) if is_float(a) else a for a in args]


def accumulator_eps(dtype: torch.dtype) -> float:
    return torch.finfo(F64 if dtype == F64 else F32).eps


def check_value(name: str, *args, terms: int) -> Tensor:
    """The op is within one rounding to its dtype, and `terms` roundings of its accumulator, of the exact result.

    The second part is relative to the sum of the magnitudes; an accumulator of 16 bits would exceed it many times.
    Where the branches are rounded, x V^T and its product with U^T add half a unit of it each.
    """
    got, reference = getattr(ops, name)(*args), getattr(ref, name)
    want = reference(*apply(Tensor.double, args))
    magnitude = reference(*apply(lambda a: a.double().abs(), args))
    info = torch.finfo(got.dtype)
    bound = 0.51 * info.eps * want.abs() + 2 * terms * accumulator_eps(got.dtype) * magnitude + info.tiny * info.eps
    if branches_are_rounded and got.dtype in HALVES:
        bound = bound + 1.01 * info.eps * magnitude
    assert got.shape == want.shape
    assert got.dtype == args[0].dtype
    excess = (got.double() - want).abs() - bound
    assert (excess <= 0).all(), f"{name}: error exceeds the bound by {excess.max().item()}"
    return got


def output_gradient(size, dtype: torch.dtype) -> Tensor:
    """The fixed gradient of an output: random numbers of `dtype`."""
    return fixed(size).to(dtype)


def gradients(function, args, change=Tensor.clone) -> list[Tensor]:
    """Gradients for all floating arguments after `change`."""
    leaves = apply(lambda a: change(a).detach().requires_grad_(), args)
    y = function(*leaves)
    dy = change(output_gradient(y.shape, args[0].dtype))
    return torch.autograd.grad(y, [a for a in leaves if is_float(a)], dy)


def branch_gradients(function, images, weight, dy) -> tuple[Tensor, Tensor]:
    leaves = images.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(function(*leaves), leaves, dy)


def conv_roundings(dy, x, u, v, kernel, stride, padding, dilation, groups) -> tuple:
    """The magnitudes that a convolution rounds on the way to its gradients for x, u and v.

    They are those of the inner products z = V * x and dz = U^T dy, and of the sums that torch's own convolution may
    keep in 16 bits on the CPU: dz * V tap by tap, where the branches are rounded, and a weight's gradient image by
    image.
    """
    m, r = u.shape
    if r == 0 or x.numel() == 0:
        return 0, 0, 0

    def inner(x, v):
        return F.conv2d(x, v.view(groups * r, -1, *kernel), None, stride, padding, dilation, groups)

    def outer(z, u):
        return F.conv2d(z, u.view(m, r, 1, 1), groups=groups)

    def image_by_image(function, images, weight, dy) -> Tensor:
        pairs = zip(images.split(1), dy.split(1), strict=True)
        each = torch.stack([branch_gradients(function, image, weight, part)[1] for image, part in pairs])
        return each.cumsum(0)[:-1].abs().sum(0)

    def tap_by_tap(dz) -> Tensor:
        taps = kernel[0] * kernel[1]
        of_taps = torch.eye(taps, dtype=F64).repeat(1, v.shape[1] // taps)
        each = torch.stack([branch_gradients(inner, x, v * of_tap, dz)[0] for of_tap in of_taps])
        return each.abs().sum(0) + each.cumsum(0).abs().sum(0)

    z = inner(x, v)
    dz, _ = branch_gradients(outer, z, u, dy)
    from_dz, _ = branch_gradients(inner, x, v.abs(), dz.abs())
    _, from_z = branch_gradients(outer, z.abs(), u, dy.abs())
    _, from_both = branch_gradients(inner, x.abs(), v, dz.abs())
    return (
        from_dz + tap_by_tap(dz) if branches_are_rounded else 0,
        from_z + image_by_image(outer, z, u, dy),
        from_both + image_by_image(inner, x, v, dz),
    )


def roundings(name: str, args) -> tuple:
    """For x, u and v: the magnitudes that a layer rounds on the way to a gradient, besides the gradient itself."""
    if name == "sddmm":
        return 0, 0
    x, u, v, *_ = exact = apply(Tensor.double, args)
    dy = output_gradient(getattr(ref, name)(*exact).shape, args[0].dtype).double()
    if name == "lrs_conv2d":
        return conv_roundings(dy, x, u, v, *args[6:])

    def image(t):  # tokens [..., n] as the pixels of one image [1, n, tokens, 1]
        return t.reshape(-1, t.shape[-1]).t()[None, ..., None]

    in_x, in_u, in_v = conv_roundings(image(dy), image(x), u, v, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    return in_x if isinstance(in_x, int) else in_x[0, ..., 0].t().reshape(x.shape), in_u, in_v


def check_gradients(name: str, *args, terms: int) -> None:
    """Gradients are within their roundings to 16 bits, and `terms` roundings of the accumulator, of the exact ones.

    Each rounding is off by half a unit at most. The accumulator's are relative to the root of the sum of the squared
    products: that is at least the sum of the magnitudes by sqrt(terms), so that the bound is the statistical one of
    Higham and Mary, SIAM J. Sci. Comput. 2019.
    """
    got = gradients(getattr(ops, name), args)
    want = gradients(getattr(ref, name), args, Tensor.double)
    spread = gradients(getattr(ref, name), args, lambda a: a.double().square())
    between = roundings(name, args) if args[0].dtype in HALVES else ()
    for a, b, c, rounded in itertools.zip_longest(got, want, spread, between, fillvalue=0):
        info = torch.finfo(a.dtype)
        bound = 0.51 * info.eps * (b.abs() + rounded) + terms * accumulator_eps(a.dtype) * c.sqrt()
        excess = (a.double() - b).abs() - bound - info.tiny * info.eps
        assert (excess <= 0).all(), f"{name}: a gradient of {[*a.shape]} exceeds its bound by {excess.max().item()}"
