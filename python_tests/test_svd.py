"""truncated_svd on the CPU against float64 SVDs: exact by the Gram matrix, warm passes, subspace iteration."""

import pytest
import torch
from torch import Tensor

from cmd_ext import ops, ref

F32, F64 = torch.float32, torch.float64


def random(*size: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def with_spectrum(m: int, n: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """A random matrix with the given singular values, the rest 0."""
    s = spectrum.double()
    u = torch.linalg.qr(random(m, len(s), seed=seed))[0]
    v = torch.linalg.qr(random(n, len(s), seed=seed + 1))[0]
    return (u * s) @ v.T


def check_exact(a: Tensor, rank: int, got: tuple[Tensor, Tensor, Tensor], factor: float = 1.0) -> None:
    """Orthonormal factors, descending s, and what every best rank-r approximation has in common."""
    u, s, vh = (t.double() for t in got)
    want = torch.linalg.svdvals(a.double())
    tolerance = 20 * factor * torch.finfo(a.dtype).eps * max(a.shape[-2:])
    identity = torch.eye(rank, dtype=F64).expand(*s.shape[:-1], -1, -1)
    torch.testing.assert_close(u.mT @ u, identity, rtol=0, atol=tolerance)
    torch.testing.assert_close(vh @ vh.mT, identity, rtol=0, atol=tolerance)
    assert (s >= 0).all()
    assert (s.diff() <= 0).all()
    scale = want[..., :1].clamp_min(torch.finfo(F64).tiny)
    torch.testing.assert_close(s / scale, want[..., :rank] / scale, rtol=0, atol=tolerance)
    left = torch.linalg.matrix_norm(a.double() - (u * s[..., None, :]) @ vh) / scale[..., 0]
    best = want[..., rank:].norm(dim=-1) / scale[..., 0]
    torch.testing.assert_close(left, best, rtol=0, atol=tolerance * rank**0.5)
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    assert (largest >= 0).all()


SPECTRA = {
    "flat": torch.ones(40),
    "clustered": torch.cat([1 + 1e-6 * torch.arange(20.0), 0.1 + 1e-7 * torch.arange(20.0)]),
    "repeated": torch.tensor([3.0] * 10 + [1.0] * 10 + [0.25] * 20),
    "geometric": 2.0 ** -torch.arange(40.0),
    "hilbert-like": 10.0 ** (-0.5 * torch.arange(40.0)),
    "small tail": torch.tensor([1.0] * 3 + [1e-3] * 7 + [1e-5] * 30),
    "rank 4": torch.tensor([4.0, 3, 2, 1]),
    "rank 1": torch.tensor([2.0]),
}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("rank", [1, 9, 40])
@pytest.mark.parametrize(("m", "n"), [(40, 90), (90, 40), (140, 130)])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_exact_whatever_the_spectrum(spectrum, m, n, rank, dtype):
    a = with_spectrum(m, n, spectrum).to(dtype)
    check_exact(a, rank, ops.truncated_svd(a, rank))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 50), (50, 1), (2, 3), (129, 300), (300, 257)])
def test_exact_whatever_the_shape(m, n, dtype):
    a = random(m, n, dtype=dtype)
    for rank in {1, (min(m, n) + 1) // 2, min(m, n)}:
        check_exact(a, rank, ops.truncated_svd(a, rank))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("rank", [5, 30])
def test_any_scale(scale, rank, dtype):
    a = (random(70, 200) * scale).to(dtype)
    check_exact(a, rank, ops.truncated_svd(a, rank))
    warm = torch.linalg.svd(a.double())[2][:rank].T.to(dtype)
    check_exact(a, rank, ops.truncated_svd(a, rank, n_iter=0, basis=warm), factor=5)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "a",
    [
        torch.zeros(70, 90, dtype=F64),
        torch.ones(70, 90, dtype=F64),
        torch.eye(90, dtype=F64)[:70],
        random(7, 90).repeat(10, 1),  # repeated rows
        random(70, 9).repeat(1, 10),  # repeated columns
        torch.nn.functional.pad(random(1, 1), (0, 89, 0, 69)),
        1 / (1 + torch.arange(70.0, dtype=F64)[:, None] + torch.arange(90.0, dtype=F64)),  # Hilbert
    ],
    ids=["zero", "ones", "identity", "rows", "columns", "one entry", "hilbert"],
)
def test_degenerate_matrices(a, dtype):
    a = a.to(dtype)
    check_exact(a, 12, ops.truncated_svd(a, 12))
    check_exact(a.T, 12, ops.truncated_svd(a.T, 12))
    if torch.linalg.matrix_rank(a) <= 12:  # any basis that does not miss the row space is a warm one
        check_exact(a, 12, ops.truncated_svd(a, 12, n_iter=0, basis=random(90, 20, seed=3, dtype=dtype)), factor=50)
    for basis in (torch.zeros(90, 12, dtype=dtype), torch.ones(90, 12, dtype=dtype)):
        u, s, vh = ops.truncated_svd(a, 12, n_iter=0, basis=basis)
        identity = torch.eye(12, dtype=dtype)
        torch.testing.assert_close(u.T @ u, identity, rtol=0, atol=2000 * torch.finfo(dtype).eps)
        torch.testing.assert_close(vh @ vh.T, identity, rtol=0, atol=2000 * torch.finfo(dtype).eps)
        assert s.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_an_ill_conditioned_matrix_does_not_touch_its_batch(dtype):
    good, bad = random(80, 120, dtype=dtype), with_spectrum(80, 120, SPECTRA["hilbert-like"]).to(dtype)
    batch = torch.stack([good, bad, torch.zeros_like(good), good * 1e-25])
    u, s, vh = ops.truncated_svd(batch, 20)
    check_exact(batch[:3], 20, (u[:3], s[:3], vh[:3]))
    for i, a in enumerate(batch):
        alone = ops.truncated_svd(a, 20)
        assert all(torch.equal(t[i], single) for t, single in zip((u, s, vh), alone, strict=True))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n_iter", [0, 3])
def test_a_batch_equals_a_loop(n_iter, dtype):
    a = random(5, 100, 130, dtype=dtype)
    basis = torch.linalg.svd(a + 0.01 * random(5, 100, 130, seed=1, dtype=dtype))[2][:, :12].mT
    tolerance = 1000 * torch.finfo(dtype).eps
    for start in (None, basis):
        together = ops.truncated_svd(a, 12, n_iter=n_iter, basis=start)
        for i in range(len(a)):
            u, s, vh = ops.truncated_svd(a[i], 12, n_iter=n_iter, basis=None if start is None else start[i])
            torch.testing.assert_close(s, together[1][i], rtol=0, atol=tolerance)
            low_rank = (together[0][i] * together[1][i]) @ together[2][i]
            torch.testing.assert_close((u * s) @ vh, low_rank, rtol=0, atol=tolerance)


def _excess(a: Tensor, got: tuple[Tensor, Tensor, Tensor], rank: int) -> float:
    u, s, vh = (t.double() for t in got)
    best = torch.linalg.svdvals(a.double())[rank:].norm()
    return ((a.double() - (u * s) @ vh).norm() / best - 1).item()


@pytest.mark.parametrize("kind", ["gaussian", "powers"])
@pytest.mark.parametrize(
    ("m", "n", "rank", "excess"), [(128, 1152, 15, 3.2e-5), (256, 1152, 30, 3.2e-5), (300, 280, 60, 1.5e-4)]
)
def test_one_pass_follows_a_matrix_that_moved(m, n, rank, excess, kind):
    spectrum = (1.0 + torch.arange(min(m, n))) ** -0.6
    a = (random(m, n) if kind == "gaussian" else with_spectrum(m, n, spectrum)).float()
    assert abs(_excess(a, ops.truncated_svd(a, rank), rank)) < 1e-8
    step = random(m, n, seed=5, dtype=F32)
    before = a + 0.02 * a.norm() / step.norm() * step
    basis = ref.truncated_svd(before, rank)[2].T
    warm = ops.truncated_svd(a, rank, n_iter=0, basis=basis)
    assert _excess(a, warm, rank) <= excess
    assert _excess(a, ops.truncated_svd(a, rank, n_iter=1, basis=basis), rank) < _excess(a, warm, rank)


def test_iterates_beyond_the_gram_side():
    a = (with_spectrum(800, 820, 2.0 ** -torch.arange(30.0)) + 1e-6 * random(800, 820)).float()
    u, s, vh = ops.truncated_svd(a, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(s.double(), 2.0 ** -torch.arange(12.0, dtype=F64), rtol=0, atol=2e-5)
    identity = torch.eye(12)
    torch.testing.assert_close(u.T @ u, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.T, identity, rtol=0, atol=1e-5)
    exact = ops.truncated_svd(a, 12, oversample=800)
    check_exact(a, 12, exact)


@pytest.mark.parametrize("n_iter", [0, 4])
def test_same_bits_from_call_to_call_and_any_layout(n_iter):
    a, basis = random(2, 90, 200, dtype=F32), random(2, 200, 20, dtype=F32)
    first, again = (ops.truncated_svd(a, 12, n_iter=n_iter, basis=basis) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert all(t.is_contiguous() for t in first)
    spaced = torch.stack([a, a * torch.nan], dim=3)[..., 0]
    got = ops.truncated_svd(spaced, 12, n_iter=n_iter, basis=basis.mT.contiguous().mT)
    for t, want in zip(got, first, strict=True):
        torch.testing.assert_close(t, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (70, 90), (90, 70)])
def test_nan_and_infinity_are_refused(shape, dtype, bad):
    a = random(*shape, dtype=dtype)
    a[2, 3] = bad
    for start in (None, random(shape[1], 4, dtype=dtype)):
        with pytest.raises(ValueError, match="a must be free of NaN and infinity"):
            ops.truncated_svd(a, 2, n_iter=0, basis=start)


@pytest.mark.parametrize(("m", "n"), [(66, 80), (80, 66), (6, 9)])
def test_opcheck_and_gradient(m, n):
    a = with_spectrum(m, n, torch.linspace(3, 1, min(m, n)))[None].requires_grad_()
    everything = a.new_zeros(1, n, 1).expand(1, n, min(m, n)).detach()
    torch.library.opcheck(torch.ops.cmd_ext.truncated_svd.default, (a, everything, 2, 1))

    def low_rank(x: Tensor) -> Tensor:
        u, s, vh = ops.truncated_svd(x, 2)
        return (u * s[..., None, :]) @ vh

    assert torch.autograd.gradcheck(low_rank, a, fast_mode=True)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_dependent_rows_do_not_touch_the_batch_of_a_warm_pass(dtype):
    a = random(3, 80, 120, dtype=dtype)
    a[0], a[1, 40:] = 0, 0
    basis = torch.linalg.svd(a)[2][:, :20].mT
    check_exact(a, 20, ops.truncated_svd(a, 20, n_iter=0, basis=basis), factor=5)
