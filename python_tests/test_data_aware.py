"""decompose() with moments, and decompose_path(): against closed forms in float64, bounds, edges, refusals."""

import os
import subprocess
import sys
from itertools import combinations, pairwise

import pytest
import torch

from cmd_ext import decompose, decompose_batch, decompose_path, decompose_path_batch
from cmd_ext.data_aware import DataAware
from cmd_ext.decompose import split_budget
from cmd_ext.metric import Metric

DOUBLE = {"dtype": torch.float64}


def weight(m: int, n: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(m, 2, generator=g, **DOUBLE) @ torch.randn(2, n, generator=g, **DOUBLE)
    tails = torch.randn(m, n, generator=g, **DOUBLE) * torch.randn(m, n, generator=g, **DOUBLE).abs()
    return (low + tails).to(dtype)


def moment(n: int, seed: int = 0, samples: int | None = None, dtype=torch.float64, fall: float = 1.0) -> torch.Tensor:
    """Of correlated inputs with a spectrum that falls like i^-2 fall; singular with fewer samples than n."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, **DOUBLE) / torch.arange(1, n + 1, **DOUBLE) ** fall
    x = torch.randn(samples or 4 * n, n, generator=g, **DOUBLE) @ mix.T
    return (x.T @ x / len(x)).to(dtype)


def root(h: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(h)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def output_error(w, dense, h, g=None) -> float:
    d, w, h = w.double() - dense.double(), w.double(), h.double()
    g = torch.eye(len(w), **DOUBLE) if g is None else g.double()
    return ((g @ d @ h * d).sum() / (g @ w @ h * w).sum()).clamp_min(0).sqrt().item()


@pytest.mark.parametrize(("m", "n"), [(12, 40), (40, 12), (20, 20)])
@pytest.mark.parametrize("samples", [None, 7])
def test_without_s_the_fit_is_the_whitened_optimum(m, n, samples):
    w, h = weight(m, n), moment(n, samples=samples)
    sigma = torch.linalg.svdvals(w @ root(h))
    fit = decompose(w, rank=4, second_moment=h)
    assert fit.output_error == pytest.approx((sigma[4:].norm() / sigma.norm()).item(), rel=1e-6)
    assert fit.output_error == pytest.approx(output_error(w, fit.to_dense(), h), rel=1e-9)
    assert fit.history == pytest.approx([fit.output_error])
    g = moment(m, 1)
    sigma = torch.linalg.svdvals(root(g) @ w @ root(h))
    fit = decompose(w, rank=4, second_moment=h, output_moment=g)
    assert output_error(w, fit.to_dense(), h, g) == pytest.approx((sigma[4:].norm() / sigma.norm()).item(), rel=1e-6)
    fit = decompose(w.float(), rank=4, second_moment=h.float())
    sigma = torch.linalg.svdvals(w @ root(h))
    assert fit.output_error == pytest.approx((sigma[4:].norm() / sigma.norm()).item(), rel=2e-3)


def test_an_identity_gives_at_least_the_quality_of_the_weight_only_fit():
    for m, n, sizes in [(24, 60, (3, 300)), (60, 24, (2, 400)), (30, 30, (0, 90))]:
        w = weight(m, n, 2)
        plain = decompose(w, rank=sizes[0], nnz=sizes[1])
        for scale in (1.0, 1e-12, 1e12):
            full = decompose(w, rank=sizes[0], nnz=sizes[1], second_moment=scale * torch.eye(n, **DOUBLE))
            assert full.relative_error <= 1.001 * plain.relative_error
            assert full.output_error == pytest.approx(full.relative_error)


def test_a_diagonal_scales_the_columns():
    w, d = weight(24, 60, 3), torch.rand(60, **DOUBLE) + 0.1
    fit = decompose(w, rank=3, nnz=200, second_moment=d, damping=0.0)
    scaled = decompose(w * d.sqrt(), rank=3, nnz=200)
    assert fit.output_error == pytest.approx(scaled.relative_error, rel=1e-6)
    torch.testing.assert_close(fit.to_dense() * d.sqrt(), scaled.to_dense())
    assert decompose(w, rank=3, nnz=200, second_moment=torch.diag(d)).output_error <= 1.001 * fit.output_error
    rows = torch.rand(24, **DOUBLE) + 0.1
    both = decompose(w, rank=3, nnz=200, second_moment=d, output_moment=rows, damping=0.0)
    assert output_error(w, both.to_dense(), d.diag(), rows.diag()) < output_error(
        w, fit.to_dense(), d.diag(), rows.diag()
    )


@pytest.mark.parametrize(
    ("m", "n", "rank", "nnz"), [(16, 48, 2, 150), (48, 16, 2, 150), (32, 64, 0, 400), (8, 90, 4, 60)]
)
def test_the_full_moment_beats_the_diagonal_and_no_data(m, n, rank, nnz):
    w, h = weight(m, n, 4), moment(n, 4)
    full = decompose(w, rank=rank, nnz=nnz, second_moment=h)
    diagonal = decompose(w, rank=rank, nnz=nnz, second_moment=h.diagonal())
    plain = decompose(w, rank=rank, nnz=nnz)
    assert (full.rank, full.nnz) == (rank, nnz)
    assert full.output_error == pytest.approx(output_error(w, full.to_dense(), h), rel=1e-9)
    assert full.output_error < 0.8 * output_error(w, diagonal.to_dense(), h)
    assert full.output_error < 0.8 * output_error(w, plain.to_dense(), h)
    g = moment(m, 5)
    weighted = decompose(w, rank=rank, nnz=nnz, second_moment=h, output_moment=g)
    assert output_error(w, weighted.to_dense(), h, g) < output_error(w, full.to_dense(), h, g)
    outputs_only = decompose(w, rank=rank, nnz=nnz, output_moment=g)
    assert outputs_only.output_error is None
    eye = torch.eye(n, **DOUBLE)
    assert output_error(w, outputs_only.to_dense(), eye, g) < output_error(w, plain.to_dense(), eye, g)
    same = decompose(w, rank=rank, nnz=nnz, second_moment=h, output_moment=3 * torch.eye(m, **DOUBLE))
    assert same.output_error == pytest.approx(full.output_error, rel=0.03)


def test_s_alone_comes_near_the_best_of_all_supports():
    """Brute force: the exact least-squares values of every support."""
    ratios = []
    for seed in range(12):
        w, h = weight(1, 9, seed), moment(9, seed)
        best = min(
            output_error(w, torch.zeros(1, 9, **DOUBLE).index_put((torch.tensor([0]), torch.tensor(list(s))), v), h)
            for s in combinations(range(9), 3)
            for v in [torch.linalg.solve(h[list(s)][:, list(s)], (w @ h)[0, list(s)])]
        )
        ratios.append(decompose(w, nnz=3, second_moment=h, damping=1e-6).output_error / best)
    assert all(ratio > 1 - 1e-6 for ratio in ratios)
    assert sum(ratios) / len(ratios) < 1.2  # by |W_ij| H_jj^1/2 alone it is 3.3


def test_the_values_of_s_solve_their_least_squares_problem():
    w, h = weight(12, 30, 6), moment(30, 6)
    fit = decompose(w, nnz=90, second_moment=h, damping=0.1)
    damped = h + 0.1 * h.diagonal().mean() * torch.eye(30, **DOUBLE)
    gradient = (w - fit.to_dense()) @ damped
    on = fit.to_dense() != 0
    assert on.sum() == 90
    assert gradient[on].abs().max() < 1e-3 * (w @ damped).abs().max()


def test_more_sweeps_and_the_history():
    w, h = weight(24, 60, 7), moment(60, 7)
    short, long = (decompose(w, rank=2, nnz=300, second_moment=h, n_iter=n) for n in (3, 40))
    assert long.output_error < short.output_error
    assert len(long.history) == 121
    assert long.history[-1] == pytest.approx(long.output_error)


def test_a_fit_that_data_cannot_improve_keeps_its_start(monkeypatch):
    w = torch.stack([weight(16, 40, 8), weight(16, 40, 9)])
    h = torch.stack([moment(40, 8), moment(40, 9)])
    good = decompose_batch(list(w), rank=2, nnz=100, second_moments=list(h))
    polish = DataAware.polish

    def spoilt(self, history, rounds, steps):
        fit = polish(self, history, rounds, steps)
        fit.u[1] = float("nan")
        return self._fit(fit.u, fit.v, fit.sparse, [])

    monkeypatch.setattr(DataAware, "polish", spoilt)
    kept = decompose_batch(list(w), rank=2, nnz=100, second_moments=list(h))
    start = decompose(w[1], rank=2, nnz=100, second_moment=h[1].diagonal())
    assert kept[0].output_error == pytest.approx(good[0].output_error)
    assert kept[1].output_error == pytest.approx(output_error(w[1], start.to_dense(), h[1]), rel=0.02)
    assert kept[1].output_error > good[1].output_error


def test_conjugate_gradients_never_raise_the_loss():
    for g in (None, moment(12, 2)[None]):
        w, h = weight(12, 30, 10)[None], moment(30, 10)[None]
        metric = Metric(w, h, g, 1, 1e-2)
        scaled = metric.rows * w * metric.columns
        aware = DataAware(metric, scaled, 1)
        mask = (torch.rand(1, 12, 30, generator=torch.Generator().manual_seed(0), **DOUBLE) < 0.3).double()
        s, losses = torch.zeros_like(mask), []
        for _ in range(12):
            s = aware._on_support(scaled, mask, s, 1)
            rest = scaled - s
            losses.append((metric.times_both(rest) * rest).sum().item())
        assert all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))
        assert losses[-1] < losses[0]


def degenerate(kind: str) -> torch.Tensor:
    h = moment(30, 11, dtype=torch.float32)
    if kind == "one sample":
        h = moment(30, 11, samples=1, dtype=torch.float32)
    elif kind == "zero":
        h = torch.zeros_like(h)
    elif kind == "dead":
        h[5] = h[:, 5] = h[20] = h[:, 20] = 0
    elif kind == "all dead but one":
        h = torch.zeros_like(h).index_put((torch.tensor([3]), torch.tensor([3])), torch.tensor(2.0))
    elif kind == "tiny":
        h = h * 1e-25
    else:
        h = torch.ones_like(h)
    return h


KINDS = ["one sample", "zero", "dead", "all dead but one", "tiny", "constant"]


@pytest.mark.parametrize("sizes", [{"rank": 3}, {"nnz": 50}, {"rank": 2, "nnz": 50}, {"rank": 12}, {"nnz": 360}])
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_moments(kind, sizes):
    w, h = weight(12, 30, 11, torch.float32), degenerate(kind)
    before = h.clone()
    for damping in (1e-2, 0.0):
        fit = decompose(w, second_moment=h, damping=damping, **sizes)
        assert fit.to_dense().isfinite().all()
        assert 0 <= fit.output_error <= 1
        assert fit.output_error == pytest.approx(output_error(w, fit.to_dense(), h) if kind != "zero" else 0, abs=2e-3)
        if kind in ("one sample", "all dead but one", "constant") and "nnz" not in sizes:
            assert fit.output_error < 2e-3
    if kind == "dead" and "nnz" in sizes and sizes["nnz"] < 360:
        assert not torch.isin(decompose(w, second_moment=h, **sizes).col_idx, torch.tensor([5, 20])).any()
    assert torch.equal(h, before)


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("chained", [True, False])
def test_degenerate_paths(kind, chained, monkeypatch):
    if chained:  # as for larger weights
        monkeypatch.setattr(sys.modules["cmd_ext.path"], "FEW", 0)
    w, h = weight(12, 30, 11, torch.float32), None if kind == "none" else degenerate(kind)
    points = [(3, 0), (0, 150), (0, 50), (2, 100), (2, 40), (1, 20), (12, 9), (0, 360), (0, 0), (5, 1)]
    for damping in (1e-2, 0.3, 0.0):
        fits = decompose_path(w, points, second_moment=h, damping=damping)
        assert [(fit.rank, fit.nnz) for fit in fits] == points
        assert all(fit.to_dense().isfinite().all() for fit in fits)
        if h is not None:
            assert all(0 <= fit.output_error <= 1 + 1e-5 for fit in fits)
    zero = decompose_path(torch.zeros_like(w), points, second_moment=h)
    assert all(fit.relative_error == 0 and not fit.to_dense().any() for fit in zero)
    column = decompose_path(w[:, :1], [(1, 2), (0, 3), (0, 1), (1, 0)], second_moment=None if h is None else h[:1, :1])
    assert all(fit.to_dense().isfinite().all() for fit in column)
    half = decompose_path(w.bfloat16(), points, second_moment=h)
    assert all(fit.u.dtype == torch.bfloat16 and fit.to_dense().isfinite().all() for fit in half)


def test_damping_draws_the_fit_to_that_of_the_weight():
    w, h = weight(16, 40, 8), moment(40, 8, samples=10)
    fits = [decompose(w, rank=2, nnz=100, second_moment=h, damping=damping) for damping in (0.0, 1e-2, 1.0, 100.0)]
    outputs, weights = [fit.output_error for fit in fits], [fit.relative_error for fit in fits]
    assert outputs == sorted(outputs)
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] == pytest.approx(decompose(w, rank=2, nnz=100).relative_error, rel=0.05)


def test_degenerate_weights_and_sizes():
    h = moment(9, 12)
    zero = decompose(torch.zeros(6, 9, **DOUBLE), rank=2, nnz=5, second_moment=h)
    assert (zero.output_error, zero.relative_error, zero.to_dense().abs().sum()) == (0, 0, 0)
    column = decompose(weight(7, 1), rank=1, nnz=2, second_moment=torch.ones(1, 1, **DOUBLE))
    assert column.output_error < 1e-9
    column = decompose(weight(7, 1), nnz=2, second_moment=torch.ones(1, 1, **DOUBLE))
    assert 0 < column.output_error < 1
    row = decompose(weight(1, 9), nnz=4, second_moment=h)
    assert row.output_error < decompose(weight(1, 9), nnz=3, second_moment=h).output_error
    nothing = decompose(weight(6, 9), rank=0, nnz=0, second_moment=h)
    assert nothing.output_error == pytest.approx(1)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, min\(m, n\)\] = \[0, 6\], got 7"):
        decompose(weight(6, 9), rank=7, second_moment=h)
    small, large = (
        decompose(scale * weight(16, 40, 13, torch.float32), rank=2, nnz=100, second_moment=moment(40, 13))
        for scale in (1e-18, 1e15)
    )
    assert small.output_error == pytest.approx(large.output_error, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_autocast(dtype):
    w, h = weight(24, 60, 14), moment(60, 14)
    want = decompose(w, rank=2, nnz=300, second_moment=h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit = decompose(w.to(dtype), rank=2, nnz=300, second_moment=h)
    assert fit.u.dtype == fit.v.dtype == fit.values.dtype == dtype
    assert fit.output_error == pytest.approx(want.output_error, rel=0.05)


def test_groups_have_a_moment_each():
    w = weight(12, 20, 15)
    h, g = torch.stack([moment(20, seed) for seed in range(3)]), moment(12, 16)
    fit = decompose(w, rank=2, second_moment=h, output_moment=g, groups=3)
    parts = [
        decompose(part, rank=2, second_moment=h[i], output_moment=g[4 * i : 4 * i + 4, 4 * i : 4 * i + 4])
        for i, part in enumerate(w.split(4))
    ]
    torch.testing.assert_close(fit.to_dense(), torch.cat([part.to_dense() for part in parts]))
    fit = decompose(w, rank=1, nnz=60, second_moment=h, groups=3)
    diagonal = decompose(w, rank=1, nnz=60, second_moment=h.diagonal(dim1=1, dim2=2), groups=3)
    blocks = torch.block_diag(*h)
    spread = [torch.block_diag(*of.to_dense().split(4)) for of in (fit, diagonal)]
    errors = [output_error(torch.block_diag(*w.split(4)), dense, blocks) for dense in spread]
    assert errors[0] == pytest.approx(fit.output_error)
    assert errors[0] < 0.9 * errors[1]
    with pytest.raises(ValueError, match=r"second_moment must be \[3, 20, 20\] or \[3, 20\], got \[20, 20\]"):
        decompose(w, rank=1, second_moment=h[0], groups=3)


def same(a, b) -> None:
    """The same fit, but for rounding."""
    assert [x.output_error or 0 for x in a] == pytest.approx([x.output_error or 0 for x in b], rel=1e-6)
    assert [x.relative_error for x in a] == pytest.approx([x.relative_error for x in b], rel=1e-6)
    assert [len(x.history) for x in a] == [len(x.history) for x in b]
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.to_dense(), y.to_dense(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("data", [True, False])
def test_a_fit_does_not_depend_on_its_batch(data):
    """Weights that need few and many passes, well- and ill-conditioned moments; one shape, so that they are batched."""
    weights = [weight(16, 40, seed) * 10.0**seed for seed in range(5)] + [torch.ones(16, 40, **DOUBLE)]
    moments = [moment(40, seed, fall=0.3 * seed, samples=20 if seed == 4 else None) for seed in range(6)]
    if not data:
        moments = [None] * 6
    for sizes in ({"rank": 2, "nnz": 100}, {"rank": 1, "nnz": 40}, {"nnz": 150}, {"rank": 3}):
        batch = decompose_batch(weights, **sizes, second_moments=moments, n_iter=30, tol=1e-3)
        alone = [
            decompose(w, **sizes, second_moment=h, n_iter=30, tol=1e-3) for w, h in zip(weights, moments, strict=True)
        ]
        same(batch, alone)
    if not data:
        assert len({len(fit.history) for fit in decompose_batch(weights, rank=2, nnz=100, n_iter=30, tol=1e-3)}) > 1


def test_batch_keeps_the_order():
    weights = [weight(16, 40, 1), weight(20, 30, 2), weight(16, 40, 3), weight(16, 40, 4), weight(16, 40, 5)]
    moments = [moment(40, 1), moment(30, 2), moment(40, 3).diagonal(), None, moment(40, 5)]
    batch = decompose_batch(weights, budget=0.4, second_moments=moments)
    alone = [decompose(w, budget=0.4, second_moment=h) for w, h in zip(weights, moments, strict=True)]
    same(batch, alone)
    assert [fit.output_error is None for fit in batch] == [h is None for h in moments]


def test_wide_layers_need_no_eigenbasis_and_lose_nothing(monkeypatch):
    w, h = weight(24, 1040, 3, torch.float32), moment(1040, 3, samples=3000, fall=0.3, dtype=torch.float32)
    for groups, sizes in (
        (1, {"rank": 3, "nnz": 4000}),
        (1, {"nnz": 2000}),
        (1, {"rank": 4}),
        (2, {"rank": 1, "nnz": 900}),
    ):
        moments = h if groups == 1 else torch.stack([h, h])
        wide = decompose(w, **sizes, groups=groups, second_moment=moments)
        monkeypatch.setattr(sys.modules["cmd_ext.decompose"], "WIDE", 4096)
        other = decompose(w, **sizes, groups=groups, second_moment=moments)
        monkeypatch.undo()
        assert (wide.rank, wide.nnz) == (other.rank, other.nnz)
        assert wide.output_error < 1.02 * other.output_error
        assert wide.history[-1] == pytest.approx(wide.output_error, rel=1e-4)
    with pytest.raises(ValueError, match="second_moment must be positive semidefinite"):
        decompose(w, nnz=5, second_moment=2 - torch.eye(1040))


MEMORY = """
import torch
from cmd_ext import decompose, decompose_path

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) << 10

m, n = 240, 2400
g = torch.Generator().manual_seed(0)
w, x = torch.randn(m, n, generator=g), torch.randn(n + 100, n, generator=g)
h = x.T @ x / len(x)
del x
torch.set_num_threads(1)
small = h[:64, :64].contiguous()
for fit in (lambda w, h: decompose(w, rank=2, nnz=w.numel() // 5, second_moment=h, n_iter=2),
            lambda w, h: decompose(w, rank=2, second_moment=h),
            lambda w, h: decompose_path(w, [(r, w.numel() * k // 10) for r in (0, 1) for k in (5, 3, 0)],
                                        second_moment=h, n_iter=2)):
    fit(w[:, :64].contiguous(), small)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    fit(w, h)
    print((status("VmHWM") - before - 4 * h.numel()) / (4 * w.numel()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
def test_a_fit_takes_little_memory_beside_its_moment():
    """One more of its size and up to ten of the weight's."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is gone at once
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=env)
    used = [float(line) for line in run.stdout.split()]
    assert len(used) == 3
    assert max(used) < 12, used


@pytest.mark.parametrize(
    ("moments", "error", "message"),
    [
        ({"second_moment": torch.full((6, 6), torch.nan)}, ValueError, "second_moment must be finite, got 36 NaN"),
        ({"second_moment": torch.ones(5, 5)}, ValueError, r"second_moment must be \[6, 6\] or \[6\], got \[5, 5\]"),
        ({"second_moment": torch.ones(6, 6).triu()}, ValueError, "second_moment must be symmetric, got .* by 1"),
        ({"second_moment": -torch.ones(6)}, ValueError, "second_moment must have a diagonal >= 0, got -1"),
        ({"second_moment": 2 - torch.eye(6)}, ValueError, "second_moment must be positive semidefinite"),
        ({"second_moment": torch.ones(6).int()}, TypeError, "second_moment must be float32.*got torch.int32"),
        ({"output_moment": torch.ones(3, 3)}, ValueError, r"output_moment must be \[4, 4\] or \[4\], got \[3, 3\]"),
        ({"output_moment": torch.full((4,), torch.inf)}, ValueError, "output_moment must be finite, got 4"),
        ({"output_moment": 2 - torch.eye(4)}, ValueError, "output_moment must be positive semidefinite"),
        ({"second_moment": torch.eye(6), "damping": -1}, ValueError, "damping must be >= 0, got -1"),
    ],
)
def test_bad_moments_are_named(moments, error, message):
    for call in (
        lambda: decompose(torch.ones(4, 6), rank=1, nnz=3, **moments),
        lambda: decompose_path(torch.ones(4, 6), [(1, 3)], **moments),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_moment_per_weight():
    with pytest.raises(ValueError, match="second_moments must be one per weight = 1, got 2"):
        decompose_batch([torch.ones(4, 6)], rank=1, second_moments=[None, None])


# decompose_path -----------------------------------------------------------------------------------------------------

POINTS = [split_budget(24, 72, b, c) for b in (0.1, 0.2, 0.4) for c in (1.0, 0.7, 0.0)]


def ratios(w, points, groups=1, **given) -> list[float]:
    """Errors of a path over those of single fits."""
    found = []
    fits = decompose_path(w, points, groups=groups, **given)
    assert [(fit.rank, fit.nnz) for fit in fits] == points
    for (rank, nnz), fit in zip(points, fits, strict=True):
        single = decompose(w, rank=rank, nnz=nnz, groups=groups, **given)
        ours, theirs = ((f.relative_error if f.output_error is None else f.output_error) for f in (fit, single))
        if theirs < 1e-9:
            assert ours == pytest.approx(theirs, abs=1e-9)
        else:
            found.append(ours / theirs)
    return found


@pytest.mark.parametrize("groups", [1, 2])
def test_a_path_of_sparse_fits_alone(groups):
    w, h = weight(24, 72, 17), torch.stack([moment(72, 17 + i, fall=0.5) for i in range(groups)])
    assert max(ratios(w, [(0, 300), (0, 100)], groups=groups, second_moment=h[0] if groups == 1 else h)) < 1.1


@pytest.mark.parametrize("moments", ["none", "diagonal", "full", "output", "both"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_path_gives_every_point_about_its_single_fit(moments, groups):
    w, h, g = weight(24, 72, 17), torch.stack([moment(72, 17 + i, fall=0.5) for i in range(groups)]), moment(24, 18)
    given = {
        "none": {},
        "diagonal": {"second_moment": h.diagonal(dim1=1, dim2=2)},
        "full": {"second_moment": h},
        "output": {"output_moment": g},
        "both": {"second_moment": h, "output_moment": g},
    }[moments]
    points = [*POINTS[::-1], POINTS[1], (24 // groups, 7), (0, w.numel()), (0, 0)]
    found = ratios(w, points, groups, **given)
    assert sum(found) / len(found) < 1.05
    assert max(found) < 1.2


def head(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear layer whose inputs are few rows of a rectified activation."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 32, generator=g, **DOUBLE).relu()
    return torch.randn(64, 32, generator=g, **DOUBLE), x.T @ x / rows


@pytest.mark.parametrize(
    ("w", "h"),
    [
        pytest.param(*head(32), id="head of 32 rows"),
        pytest.param(*head(20), id="head of 20 rows"),
        pytest.param(weight(24, 72, 17), moment(72, 17, fall=1.0), id="ill-conditioned"),
        pytest.param(weight(24, 72, 17), moment(72, 17, fall=2.0), id="very ill-conditioned"),
        pytest.param(weight(32, 288, 5), moment(288, 5, fall=0.3), id="in chains"),
        pytest.param(weight(32, 288, 5), moment(288, 5, fall=1.0), id="in chains, ill-conditioned"),
    ],
)
def test_a_path_keeps_up_with_single_fits_whatever_the_moment(w, h):
    pairs = [(b, c) for b in (0.05, 0.08, 0.12, 0.16, 0.2, 0.3, 0.4, 0.5) for c in (1.0, 0.85, 0.7, 0.5)]
    points = [*dict.fromkeys(split_budget(*w.shape, *pair) for pair in pairs)]
    found = ratios(w, points, second_moment=h)
    assert sum(found) / len(found) < 1.05
    assert max(found) < 1.25


def test_a_path_of_a_batch_and_its_refusals():
    weights, moments = (
        [weight(24, 72, 1), weight(24, 72, 2), weight(24, 80, 3)],
        [moment(72, 1), moment(72, 2), moment(80, 3)],
    )
    batch = decompose_path_batch(weights, POINTS, second_moments=moments)
    for w, h, fits in zip(weights, moments, batch, strict=True):
        alone = decompose_path(w, POINTS, second_moment=h)
        assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(fits, alone, strict=True))
    assert decompose_path(weights[0], []) == []
    half = decompose_path(weights[0].bfloat16(), POINTS[:2], second_moment=moments[0])
    assert half[0].u.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"nnz must lie in \[0, m \* n\] = \[0, 1728\], got 1729"):
        decompose_path(weights[0], [(1, 5), (0, 1729)])
    with pytest.raises(ValueError, match="n_iter must be >= 1, got 0"):
        decompose_path(weights[0], POINTS, n_iter=0)
