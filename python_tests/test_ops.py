"""Every operator on every device: values and gradients against cmd_ext.ref, dtypes, layouts, tracing.

The devices are the CPU, a GPU where there is one, and "simt": the CUDA path of every operator on the memory of CPU
tensors, its kernels run by the emulator of cpp_tests/simt.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from op_bounds import DTYPES, F32, F64, apply, check_gradients, check_value, fixed, is_float, layer, random
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cmd_ext import ops, ref
from cmd_ext.ops import Pattern

RAW = torch.ops.cmd_ext
LAST = torch.channels_last

pytestmark = pytest.mark.usefixtures("device")


def assert_all_close(got, want, **tolerance) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# Shapes: (batch sizes of x, m, n, rank, nnz). The batch selects the kernel's tile.
LINEAR = [
    ((), 7, 96, 3, 40),
    ((1,), 37, 53, 5, 300),
    ((3,), 37, 53, 5, 300),
    ((7,), 37, 53, 5, 300),
    ((9,), 37, 53, 5, 300),
    ((20,), 37, 53, 5, 300),
    ((40,), 37, 53, 5, 300),
    ((100,), 37, 53, 5, 300),
    ((2, 3), 7, 96, 4, 100),
    ((0,), 7, 96, 4, 100),
    ((0,), 7, 96, 0, 0),
    ((2, 0), 7, 96, 4, 0),
    ((4,), 7, 96, 4, 0),
    ((4,), 7, 96, 0, 100),
    ((4,), 7, 96, 0, 0),
    ((4,), 7, 40, 7, 280),
    ((5,), 1, 40, 1, 10),
    ((5,), 40, 1, 1, 10),
    ((33,), 520, 610, 6, 9000),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_lrs_linear_value(case, dtype):
    batch, m, n, rank, nnz = case
    weights, x, bias = layer(m, n, rank, nnz, dtype=dtype), random(*batch, n, dtype=dtype), random(m, dtype=dtype)
    assert check_value("lrs_linear", x, *weights, terms=n + rank).is_contiguous()
    check_value("lrs_linear", x, *weights, bias, terms=n + rank + 1)
    check_gradients("lrs_linear", x, *weights, bias, terms=m + n + x[..., 0].numel())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "nnz"), [(7, 96, 40, 50), (1, 9, 3, 4), (9, 1, 33, 4), (5, 6, 0, 7), (5, 6, 8, 0)]
)
def test_sddmm_value(m, n, k, nnz, dtype):
    *_, pattern = layer(m, n, 0, nnz)
    args = random(m, k, dtype=dtype), random(n, k, dtype=dtype), *pattern[:2]
    check_value("sddmm", *args, terms=k)
    check_gradients("sddmm", *args, terms=m + n)


# (x sizes, m, kernel, stride, padding, dilation, groups, rank, density)
CONV = {
    "one pixel": ((2, 6, 1, 1), 5, (1, 1), (1, 1), (0, 0), (1, 1), 1, 2, 0.3),
    "4x4 maps": ((33, 8, 4, 4), 20, (3, 3), (1, 1), (1, 1), (1, 1), 1, 3, 0.2),
    "7x7 maps": ((3, 8, 7, 7), 17, (3, 3), (1, 1), (1, 1), (1, 1), 1, 3, 0.2),
    "57x33 maps, all asymmetric": ((2, 6, 57, 33), 6, (3, 2), (2, 1), (1, 0), (2, 1), 2, 2, 0.3),
    "strips": ((1, 64, 80, 80), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, 2, 0.05),
    "strips, stride 2": ((2, 64, 83, 90), 4, (3, 3), (2, 2), (1, 1), (1, 1), 2, 2, 0.05),
    "stride > kernel": ((2, 4, 12, 9), 6, (2, 1), (3, 4), (1, 2), (1, 1), 1, 2, 0.5),
    "depthwise": ((2, 6, 15, 14), 12, (5, 5), (1, 2), (2, 2), (1, 1), 6, 1, 0.4),
    "1x1": ((2, 8, 9, 10), 6, (1, 1), (1, 1), (0, 0), (1, 1), 2, 2, 0.5),
    "1x7": ((2, 3, 5, 17), 4, (1, 7), (1, 1), (0, 3), (1, 1), 1, 2, 0.5),
    "kernel larger than the image": ((2, 3, 2, 2), 4, (5, 5), (1, 1), (2, 2), (1, 1), 1, 2, 0.3),
    "dilated": ((2, 3, 11, 12), 4, (3, 3), (1, 2), (3, 0), (3, 2), 1, 2, 0.3),
    "one channel in": ((2, 1, 9, 7), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 0.5),
    "one channel out": ((2, 3, 9, 7), 1, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 0.5),
    "batch 0": ((0, 4, 6, 6), 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, 2, 0.5),
    "nnz 0": ((2, 4, 6, 6), 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, 2, 0),
    "rank 0": ((2, 4, 6, 6), 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, 0, 0.5),
    "rank 0, nnz 0": ((2, 4, 6, 6), 6, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0, 0),
    "full rank, full nnz": ((2, 4, 6, 6), 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, 3, 1),
}


def conv_args(case: str, dtype: torch.dtype, memory_format=torch.contiguous_format) -> tuple:
    size, m, kernel, stride, padding, dilation, groups, rank, density = CONV[case]
    n = size[1] // groups * kernel[0] * kernel[1]
    weights = layer(m, n, rank, int(density * m * n), groups, dtype)
    x = random(*size, dtype=dtype).contiguous(memory_format=memory_format)
    return x, *weights, random(m, dtype=dtype), kernel, stride, padding, dilation, groups


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV)
def test_lrs_conv2d_value(case, dtype, memory_format):
    args = conv_args(case, dtype, memory_format)
    terms = args[2].shape[1] + args[1].shape[1]
    y = check_value("lrs_conv2d", *args, terms=terms)
    check_value("lrs_conv2d", *args[:5], None, *args[6:], terms=terms)
    contiguous = args[0].is_contiguous()  # also an image of one channel or pixel, whose two formats coincide
    assert y.is_contiguous(memory_format=torch.contiguous_format if contiguous else LAST)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV)
def test_lrs_conv2d_gradient_values(case, dtype):
    args = conv_args(case, dtype, LAST if "maps" in case else torch.contiguous_format)
    check_gradients("lrs_conv2d", *args, terms=args[0][:, 0].numel() + args[2].shape[1])


def test_channels_last_gradient_keeps_its_format():
    x, *rest = conv_args("7x7 maps", F32, LAST)
    x.requires_grad_()
    y = ops.lrs_conv2d(x, *rest)
    (gx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert not y.is_contiguous()
    assert gx.is_contiguous(memory_format=LAST)
    assert not gx.is_contiguous()


def test_conv_of_one_pixel_equals_linear():
    u, v, values, pattern = layer(12, 20, 3, 50)
    x, bias = random(5, 20), random(12)
    y = ops.lrs_conv2d(x[:, :, None, None], u, v, values, pattern, bias, (1, 1))
    torch.testing.assert_close(y[:, :, 0, 0], ops.lrs_linear(x, u, v, values, pattern, bias))


def matrices() -> dict[str, Tensor]:
    a = random(50, 70)
    special = a.clone()
    special[::7, ::3], special[1::9, ::4], special[2::9, 1::4] = torch.nan, torch.inf, -torch.inf
    signed_zeros = torch.where(a > 0, 0.0, -0.0)
    return {
        "random": a,
        "odd sizes": random(7, 96),
        "row": random(1, 40),
        "column": random(40, 1),
        "many ties": (a * 3).round(),
        "all equal": torch.full((50, 70), -2.0, dtype=F64),
        "zeros of both signs": signed_zeros,
        "NaN and infinities": special,
        "wide range": a * 10.0 ** torch.randint(-40, 40, (50, 70)),
        "several chunks": random(200, 331),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", matrices())
def test_topk_csr_value(name, dtype):
    a = matrices()[name].to(dtype)
    for nnz in (0, 1, a.numel() // 3, a.numel() - 1, a.numel()):
        got, want = ops.topk_csr(a, nnz), ref.topk_csr(a, nnz)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == w.dtype
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
        numbers = ~want[0].isnan()
        assert torch.equal(got[0][numbers].signbit(), want[0][numbers].signbit())


def test_topk_csr_of_nothing():
    for m, n in ((0, 5), (5, 0), (0, 0)):
        values, row_ptr, col_idx = ops.topk_csr(random(m, n), 0)
        assert (len(values), row_ptr.tolist(), len(col_idx)) == (0, [0] * (m + 1), 0)
    assert [t.shape for t in ops.topk_csr(random(0, 3, 4), 2)] == [(0, 2), (0, 4), (0, 2)]


def test_topk_csr_of_a_batch():
    a = random(3, 7, 11)
    for got, want in zip(ops.topk_csr(a, 20), ref.topk_csr(a, 20), strict=True):
        assert torch.equal(got, want)


# (batch, m, n, rank, groups, nnz)
RESIDUAL = [
    ((), 37, 53, 5, 1, 300),
    ((2,), 70, 68, 18, 1, 500),
    ((2,), 12, 9, 2, 3, 40),
    ((3,), 7, 96, 0, 1, 50),
    ((2,), 5, 6, 5, 1, 0),
    ((1,), 5, 6, 2, 5, 30),
    ((0,), 5, 6, 2, 1, 3),
    ((2,), 0, 6, 0, 1, 0),
    ((2,), 6, 0, 2, 3, 0),
]


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("case", RESIDUAL, ids=str)
def test_residual_topk_csr_value(case, dtype):
    batch, m, n, rank, groups, nnz = case
    args = [random(*batch, *size, dtype=dtype) for size in ((m, n), (m, rank), (groups * rank, n))]
    residual, *kept = ops.residual_topk_csr(*args, nnz)
    want, *_ = ref.residual_topk_csr(*map(Tensor.double, args), nnz)
    w, *factors = (a.double().abs() for a in args)
    magnitude, *_ = ref.residual_topk_csr(-w, *factors, nnz)
    assert ((residual.double() - want).abs() <= 2 * (rank + 1) * torch.finfo(dtype).eps * magnitude.abs()).all()
    for got, same in zip(kept, ref.topk_csr(residual, nnz), strict=True):
        assert torch.equal(got, same)
    assert all(t.is_contiguous() for t in (residual, *kept))


def with_spectrum(m: int, n: int, spectrum: list[float], dtype: torch.dtype = F64) -> Tensor:
    """A random matrix with the given singular values, the rest 0."""
    s = torch.tensor(spectrum, dtype=F64)
    u, v = torch.linalg.qr(random(m, len(s)))[0], torch.linalg.qr(random(n, len(s)))[0]
    return ((u * s) @ v.T).to(dtype)


def check_orthonormal(u: Tensor, s: Tensor, vh: Tensor) -> None:
    identity = torch.eye(s.shape[-1], dtype=u.dtype).expand(*s.shape[:-1], -1, -1)
    tolerance = 20 * torch.finfo(u.dtype).eps * max(u.shape[-2], vh.shape[-1], 1)
    torch.testing.assert_close(u.mT @ u, identity, rtol=0, atol=tolerance)
    torch.testing.assert_close(vh @ vh.mT, identity, rtol=0, atol=tolerance)
    assert (s.diff() <= 0).all()
    assert (s >= 0).all()
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True)) if u.numel() else u
    assert (largest >= 0).all()


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [(7, 96, 3), (96, 7, 7), (40, 40, 5), (1, 9, 1), (9, 1, 1), (6, 8, 0), (30, 20, 20), (70, 90, 6), (90, 70, 4)],
)
def test_truncated_svd_value(m, n, rank, dtype):
    spectrum = [2.0**-i for i in range(min(m, n, 16))]
    a = torch.stack([with_spectrum(m, n, spectrum, dtype) for _ in range(3)])
    basis = random(3, n, min(rank + 8, m, n), dtype=dtype)
    got = ops.truncated_svd(a, rank, n_iter=12, basis=basis)
    want = ref.truncated_svd(a.double(), rank)
    check_orthonormal(*got)
    tolerance = 20 * torch.finfo(dtype).eps * max(m, n)
    well_separated = [s for s in spectrum[:rank] if s > 1e-3]
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=tolerance)
    low_rank = [(u[..., :rank] * s[..., None, :]) @ vh for u, s, vh in (map(Tensor.double, got), want)]
    torch.testing.assert_close(*low_rank, rtol=0, atol=tolerance)
    k = len(well_separated)
    torch.testing.assert_close(got[0][..., :k].double(), want[0][..., :k], rtol=0, atol=1000 * tolerance)
    torch.testing.assert_close(got[2][:, :k].double(), want[2][:, :k], rtol=0, atol=1000 * tolerance)
    for i in range(3):
        u, s, vh = ops.truncated_svd(a[i], rank, n_iter=12, basis=basis[i])
        assert_all_close((u[:, :k], s, vh[:k]), (got[0][i, :, :k], got[1][i], got[2][i, :k]), rtol=0, atol=tolerance)
    assert all(t.is_contiguous() for t in got)


@pytest.mark.parametrize("spectrum", [[3, 3, 3, 1, 1], [2, 1, 0.5], [0], [5] * 12], ids=str)
@pytest.mark.parametrize(("m", "n"), [(20, 12), (66, 80)])  # by a full SVD and by iteration where that is a choice
def test_truncated_svd_of_repeated_and_missing_singular_values(spectrum, m, n):
    rank = 5
    u, s, vh = ops.truncated_svd(with_spectrum(m, n, spectrum), rank)
    check_orthonormal(u, s, vh)
    want = torch.tensor([*spectrum, *[0] * rank][:rank], dtype=F64)
    torch.testing.assert_close(s, want, rtol=0, atol=1e-13)


def test_truncated_svd_of_a_wide_basis():
    a, basis = with_spectrum(150, 140, [4.0, 3, 2, 1, 0.5], F32), random(140, 131, dtype=F32)
    u, s, vh = ops.truncated_svd(a, 7, n_iter=0, basis=basis)
    check_orthonormal(u, s, vh)
    torch.testing.assert_close(s, torch.tensor([4, 3, 2, 1, 0.5, 0, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close((u * s) @ vh, a, rtol=0, atol=1e-5)


def test_truncated_svd_starts():
    a = with_spectrum(30, 20, [2.0**-i for i in range(20)])
    exact = ref.truncated_svd(a, 4)
    warm = ops.truncated_svd(a, 4, n_iter=0, basis=exact[2].T)
    for got, want in zip(warm, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    one, same = (ops.truncated_svd(a, 4, generator=torch.Generator(a.device).manual_seed(5)) for _ in range(2))
    assert all(map(torch.equal, one, same))
    assert [t.shape for t in ops.truncated_svd(a.expand(0, -1, -1), 4)] == [(0, 30, 4), (0, 4), (0, 4, 20)]


PATTERNS = [(6, 5, 1, 13), (6, 5, 3, 20), (4, 7, 2, 0), (0, 3, 1, 0), (3, 4, 3, 12), (5, 0, 1, 0), (60, 70, 4, 900)]


@pytest.mark.parametrize(("m", "n", "groups", "nnz"), PATTERNS)
def test_csr_transpose(m, n, groups, nnz):
    _, row_ptr, col_idx = ref.topk_csr(random(m, n), nnz)
    args = row_ptr, col_idx, n, groups
    for got, want in zip(ops.csr_transpose(*args), ref.csr_transpose(*args), strict=True):
        assert torch.equal(got, want)
        assert got.dtype == torch.int32
    odd = spaced(row_ptr), spaced(col_idx), n, groups
    assert all(map(torch.equal, ops.csr_transpose(*odd), ref.csr_transpose(*args)))
    torch.library.opcheck(RAW.csr_transpose.default, odd)
    compiled = torch.compile(RAW.csr_transpose, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*args), ref.csr_transpose(*args)))


@pytest.mark.parametrize(("m", "n", "groups", "nnz"), PATTERNS)
def test_pattern_lists_the_transpose(m, n, groups, nnz):
    _, row_ptr, col_idx = ref.topk_csr(random(m, n), nnz)
    pattern = Pattern.from_csr(row_ptr.long(), col_idx.long(), n, groups)
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in pattern)
    values = torch.arange(1.0, nnz + 1)
    blocks = ref.csr_to_dense(values, row_ptr, col_idx, n).view(groups, m // groups, n)
    by_columns = ref.csr_to_dense(values[pattern.perm], pattern.col_ptr, pattern.row_idx, m)
    assert torch.equal(by_columns, torch.cat([_columns_of_group(blocks, g) for g in range(groups)]))
    if groups == 1:
        assert all(map(torch.equal, pattern.transpose().transpose(), pattern))
        assert torch.equal(values[pattern.perm][pattern.transpose().perm], values)
    rows = ops.csr_rows(row_ptr, col_idx, n)
    assert rows.tolist() == [i for i in range(m) for _ in range(row_ptr[i], row_ptr[i + 1])]


def _columns_of_group(blocks: Tensor, group: int) -> Tensor:
    """The columns of one row group [n, m], zero in the rows of other groups."""
    alone = torch.zeros_like(blocks)
    alone[group] = blocks[group]
    return alone.flatten(0, 1).T


GEOMETRY = ((2, 3), (2, 1), (1, 2), (1, 2), 2)


def sample(name: str) -> list:
    """Small arguments of an op as the dispatcher takes them; tensors that it differentiates require a gradient."""

    def leaf(*size: int) -> Tensor:
        return random(*size).requires_grad_()

    if name == "truncated_svd":
        return [leaf(2, 4, 5), random(2, 5, 4), 2, 1]  # as many columns as rows: no error of the iteration
    if name == "topk_csr":
        return [leaf(2, 5, 6), 7]
    if name == "csr_transpose":
        return [*layer(4, 6, 0, 9)[3][:2], 6, 2]
    if name == "residual_topk_csr":
        return [leaf(2, 4, 6), leaf(2, 4, 3), leaf(2, 6, 6), 7]
    if name == "lrs_linear":
        u, v, values, pattern = layer(5, 6, 2, 9)
        return [leaf(3, 6), *apply(Tensor.requires_grad_, (u, v, values)), *pattern, leaf(5)]
    if name == "sddmm":
        *_, pattern = layer(5, 6, 2, 9)
        return [leaf(5, 4), leaf(6, 4), *pattern[:2]]
    u, v, values, pattern = layer(4, 12, 2, 20, groups=2)
    weights, grad = [*apply(Tensor.requires_grad_, (u, v, values)), *pattern], leaf(2, 4, 2, 3)
    if name == "lrs_conv2d":
        return [leaf(2, 4, 3, 3), *weights, leaf(4), *GEOMETRY]
    if name == "_lrs_conv2d_grad_input":
        return [grad, *weights, (3, 3), *GEOMETRY]
    return [grad, leaf(2, 4, 3, 3), *pattern[:2], *GEOMETRY]


OPS = (
    "truncated_svd",
    "topk_csr",
    "residual_topk_csr",
    "lrs_linear",
    "sddmm",
    "lrs_conv2d",
    "_lrs_conv2d_grad_input",
    "_lrs_conv2d_grad_values",
)
every_op = pytest.mark.parametrize("name", OPS)


def outputs(name: str, args) -> list[Tensor]:
    out = getattr(RAW, name)(*args)
    return [out] if isinstance(out, Tensor) else list(out)


def results(op, args) -> list[Tensor]:
    """The outputs of a call and, for every argument that requires one, the gradient of a fixed weighted sum of them."""
    out = op(*args)
    out = [out] if isinstance(out, Tensor) else list(out)
    total = sum((o * fixed(o.shape)).sum() for o in out if o.requires_grad)
    return [*out, *torch.autograd.grad(total, [a for a in args if is_float(a) and a.requires_grad])]


@every_op
def test_gradcheck(name):
    op, args = getattr(RAW, name), sample(name)
    assert gradcheck(op, args)
    assert gradgradcheck(op, args, fast_mode=True)


@pytest.mark.parametrize(("m", "n", "rank"), [(9, 6, 3), (5, 5, 5), (6, 4, 4), (1, 5, 1), (4, 7, 1)])
def test_gradcheck_of_other_svd_shapes(m, n, rank):
    a, basis = random(m, n).requires_grad_(), random(n, min(m, n))
    assert gradcheck(lambda a: ops.truncated_svd(a, rank, basis=basis, n_iter=1), [a])


def spaced(t: Tensor) -> Tensor:
    """The tensor as every second entry of a larger buffer, at an offset; the rest of the buffer is poison."""
    buffer = t.new_full([2 * s + 1 for s in t.shape], torch.nan if t.is_floating_point() else 1 << 30)
    view = buffer[(slice(1, None, 2),) * t.dim()]
    return view.copy_(t)


def reversed_dims(t: Tensor) -> Tensor:
    dims = [*range(t.dim())][::-1]
    return t.permute(dims).contiguous().permute(dims)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t) if t.is_floating_point() else t


@pytest.mark.parametrize("arrange", [spaced, reversed_dims, expanded])
@every_op
def test_any_strides(name, arrange):
    args = sample(name)
    odd = [arrange(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
    plain = apply(lambda a: a.detach().contiguous().requires_grad_(a.requires_grad), odd)
    op = getattr(RAW, name)
    assert_all_close(results(op, odd), results(op, plain), rtol=1e-9, atol=1e-9)
    if arrange is spaced:
        torch.library.opcheck(op.default, odd)


@every_op
def test_gradient_of_any_strides(name):
    args = sample(name)
    leaves = [a for a in args if is_float(a) and a.requires_grad]

    def grads(arrange):
        out = [o for o in outputs(name, args) if o.requires_grad]
        return torch.autograd.grad(out, leaves, [arrange(torch.ones_like(o)) for o in out])

    want = grads(Tensor.clone)
    for arrange in (spaced, reversed_dims, lambda ones: torch.ones((), dtype=F64).expand_as(ones)):
        assert_all_close(grads(arrange), want)


@pytest.mark.parametrize("name", OPS[2:])
def test_every_subset_of_gradients(name):
    op, args = getattr(RAW, name), sample(name)
    where = [i for i, a in enumerate(args) if is_float(a)]
    full = dict(zip(where, results(op, args)[-len(where) :], strict=True))
    for count in range(1, len(where)):
        for chosen in itertools.combinations(where, count):
            some = [a.detach().requires_grad_(i in chosen) if is_float(a) else a for i, a in enumerate(args)]
            assert_all_close(results(op, some)[-count:], [full[i] for i in chosen])


@every_op
def test_opcheck(name):
    torch.library.opcheck(getattr(RAW, name).default, sample(name))


def degenerate(name: str, which: str) -> list:
    args = sample(name)
    m, n = args[1].shape[0], args[2].shape[1]
    if which == "no bias":
        args[9] = None
    if which in ("batch 0", "all 0"):
        args[0] = args[0][:0]
    if which in ("rank 0", "all 0"):
        args[1:3] = args[1][:, :0], args[2][:0]
    if which in ("nnz 0", "all 0"):
        none = torch.zeros(m + 1, dtype=torch.int32)
        args[3:9] = args[3][:0], *Pattern.from_csr(none, none[:0], n, 2 if "conv" in name else 1)
    return apply(lambda a: a.detach().requires_grad_(), args)


@pytest.mark.parametrize("which", ["no bias", "batch 0", "rank 0", "nnz 0", "all 0"])
@pytest.mark.parametrize("name", ["lrs_linear", "lrs_conv2d"])
def test_degenerate_sizes(name, which):
    op, args = getattr(RAW, name), degenerate(name, which)
    assert gradcheck(op, args, fast_mode=True)
    torch.library.opcheck(op.default, args)


def test_degenerate_sizes_of_the_value_gradients():
    grad, x, row_ptr, col_idx, *geometry = sample("_lrs_conv2d_grad_values")
    assert RAW._lrs_conv2d_grad_values(grad, x, row_ptr * 0, col_idx[:0], *geometry).shape == (0,)
    assert not RAW._lrs_conv2d_grad_values(grad[:0], x[:0], row_ptr, col_idx, *geometry).any()
    _, _, row_ptr, col_idx = sample("sddmm")
    assert not RAW.sddmm(random(5, 0), random(6, 0), row_ptr, col_idx).any()


@pytest.mark.parametrize("name", ["lrs_conv2d", "_lrs_conv2d_grad_input", "_lrs_conv2d_grad_values"])
def test_opcheck_of_channels_last(name):
    args = apply(lambda a: a.detach().to(F32), sample(name))
    args = [a.contiguous(memory_format=LAST) if is_float(a) and a.dim() == 4 else a for a in args]
    torch.library.opcheck(getattr(RAW, name).default, apply(Tensor.requires_grad_, args))


@pytest.mark.parametrize("case", ["one channel in", "one pixel"])
def test_opcheck_of_an_image_in_both_formats(case):
    x, u, v, values, pattern, *rest = conv_args(case, F32)
    torch.library.opcheck(RAW.lrs_conv2d.default, [x, u, v, values, *pattern, *rest], test_utils="test_faketensor")


@every_op
def test_compile(name):
    torch._dynamo.reset()
    op, args = getattr(RAW, name), sample(name)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_all_close(results(compiled, args), results(op, args))


class Net(torch.nn.Module):
    """A convolution and a linear layer, as a model calls them."""

    def __init__(self):
        super().__init__()
        *conv, conv_pattern = layer(8, 27, 2, 40, dtype=F32)
        *linear, linear_pattern = layer(5, 8, 2, 10, dtype=F32)
        self.weights = torch.nn.ParameterList([*conv, *linear])
        for name, pattern in (("conv", conv_pattern), ("linear", linear_pattern)):
            for field, tensor in pattern._asdict().items():
                self.register_buffer(f"{name}_{field}", tensor)

    def pattern(self, name: str) -> Pattern:
        return Pattern(*(getattr(self, f"{name}_{field}") for field in Pattern._fields))

    def forward(self, x: Tensor) -> Tensor:
        x = ops.lrs_conv2d(x, *self.weights[:3], self.pattern("conv"), None, (3, 3), padding=(1, 1))
        return ops.lrs_linear(x.relu().mean((2, 3)), *self.weights[3:], self.pattern("linear"))


def test_inductor():
    torch._dynamo.reset()
    net, x = Net(), random(3, 3, 8, 8, dtype=F32)
    want = results(net, [x.requires_grad_()])
    assert_all_close(results(torch.compile(net, fullgraph=True), [x]), want)


def test_compile_under_autocast():
    torch._dynamo.reset()
    net, x = Net(), random(3, 3, 8, 8, dtype=F32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got, want = compiled(x), net(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_export():
    net = Net()
    program = torch.export.export(net, (random(3, 3, 8, 8, dtype=F32),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    x = random(5, 3, 8, 8, dtype=F32)
    torch.testing.assert_close(program.module()(x), net(x))


def public_args(name: str, dtype: torch.dtype) -> list:
    """Arguments of lrs_linear or lrs_conv2d as the public function takes them."""
    args = apply(lambda a: a.detach().to(dtype), sample(name))
    return [*args[:4], Pattern(*args[4:9]), *args[9:]]


@pytest.mark.parametrize("name", ["lrs_linear", "lrs_conv2d"])
def test_autocast_casts_like_the_layers_of_torch(name):
    op, args = getattr(ops, name), apply(Tensor.requires_grad_, public_args(name, F32))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = op(*args)
        assert op(*public_args(name, F64)).dtype == F64
    assert torch.equal(y, op(*apply(Tensor.bfloat16, args)))
    leaves = [a for a in args if is_float(a)]
    assert all(g.dtype == F32 for g in torch.autograd.grad(y.float().sum(), leaves))


@every_op
def test_autocast_leaves_the_inside_of_an_op_alone(name):
    args = apply(lambda a: a.detach().to(F32), sample(name))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = outputs(name, args)
    assert all(map(torch.equal, got, outputs(name, args)))


@every_op
def test_inference_mode(name):
    args = sample(name)
    with torch.inference_mode():
        got = outputs(name, apply(Tensor.clone, args))
    assert_all_close(got, outputs(name, apply(Tensor.detach, args)))
