"""decompose(): accuracy against the textbook alternation, exact ends, sizes, refusals."""

import time
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from cmd_ext import CMDConv2d, decompose, decompose_batch, ref, save
from cmd_ext.cost import kept_bytes
from cmd_ext.decompose import split_budget


def structured(m: int, n: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    """Low rank, plus noise with heavy tails: what trained weights look like."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, n, generator=g) * torch.randn(m, n, generator=g).abs()
    rank = max(1, min(m, n) // 20)
    low = torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
    return (noise + 0.3 * low).to(dtype)


@pytest.mark.parametrize(("m", "n"), [(384, 384), (384, 1536)])
@pytest.mark.parametrize("kind", ["structured", "gaussian"])
def test_reaches_a_hundred_passes_of_full_svds_in_a_tenth_of_the_cpu_time(m, n, kind):
    w = structured(m, n, 0) if kind == "structured" else torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    rank, nnz = split_budget(m, n, 0.5, 0.5)
    start = time.process_time()
    fit = decompose(w, budget=0.5, sparse_coefficient=0.5)
    ours = time.process_time() - start
    start = time.process_time()
    passes = 100 if kind == "structured" and n == 384 else 20
    theirs_error = ref.alternation(w, rank, nnz, passes)
    theirs = (time.process_time() - start) * 100 / passes  # every pass costs the same
    assert (fit.rank, fit.nnz) == (rank, nnz)
    # The alternation gains less than 1 % between 20 and 100 passes, so 20 are a strict enough stand-in.
    assert fit.relative_error <= theirs_error * (1.005 if passes == 100 else 0.995)
    assert ours < theirs / 10


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (7, 96), (1, 5), (5, 1), (30, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_or_full_s_reproduces_the_weight(shape, dtype):
    w = structured(*shape, 1, dtype)
    tolerance = 20 * torch.finfo(dtype).eps
    for sizes in ({"rank": min(shape)}, {"nnz": w.numel()}, {"rank": min(shape), "nnz": w.numel()}):
        fit = decompose(w, **sizes)
        assert fit.relative_error < tolerance
        torch.testing.assert_close(fit.to_dense(), w, rtol=0, atol=tolerance * w.abs().max().item())


def test_pure_branches_are_optimal():
    w = structured(48, 80, 2, torch.float64)
    sigma = torch.linalg.svdvals(w)
    assert decompose(w, rank=5).relative_error == pytest.approx((sigma[5:].norm() / sigma.norm()).item(), rel=1e-9)
    kept = w.abs().flatten().sort(descending=True).values
    assert decompose(w, nnz=99).relative_error == pytest.approx((kept[99:].norm() / kept.norm()).item(), rel=1e-12)


def test_the_second_half_of_the_passes_never_raises_the_error():
    fit = decompose(structured(64, 200, 3, torch.float64), budget=0.4, sparse_coefficient=0.6, n_iter=40, tol=0.0)
    assert len(fit.history) == 40
    last = fit.history[20:]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(last))
    assert fit.history[-1] == pytest.approx(fit.relative_error, rel=1e-6)
    assert fit.relative_error == pytest.approx(
        (
            (fit.to_dense() - structured(64, 200, 3, torch.float64)).norm()
            / structured(64, 200, 3, torch.float64).norm()
        ).item()
    )


def test_more_passes_and_tol():
    w = structured(64, 200, 4)
    short, long = (decompose(w, budget=0.3, n_iter=n, tol=0.0) for n in (4, 40))
    assert long.relative_error < short.relative_error
    stopped = decompose(w, budget=0.3, n_iter=400, tol=1e-3)
    assert len(stopped.history) < 400


def test_batch_equals_single_and_keeps_the_order():
    weights = [
        structured(20, 30, 1),
        structured(12, 18, 2),
        structured(20, 30, 3),
        structured(4, 8, 4).view(4, 2, 2, 2),
    ]
    batch = decompose_batch(weights, budget=0.5, tol=0.0)
    for w, fit in zip(weights, batch, strict=True):
        alone = decompose(w, budget=0.5, tol=0.0)
        assert fit.to_dense().shape == (w.shape[0], w[0].numel())
        assert fit.relative_error == pytest.approx(alone.relative_error, rel=1e-3)
        assert (fit.rank, fit.nnz) == (alone.rank, alone.nnz)


def test_groups_have_a_low_rank_part_each():
    w = structured(12, 20, 5, torch.float64)
    fit = decompose(w, rank=2, groups=3)
    blocks = [decompose(block, rank=2).to_dense() for block in w.split(4)]
    torch.testing.assert_close(fit.to_dense(), torch.cat(blocks))
    assert fit.v.shape == (6, 20)


def test_degenerate_weights():
    zero = decompose(torch.zeros(6, 9), rank=2, nnz=5)
    assert zero.relative_error == 0.0
    assert zero.to_dense().abs().sum() == 0
    ones = decompose(torch.ones(30, 20), rank=3, nnz=10)
    assert ones.relative_error < 1e-5
    identity = decompose(torch.eye(16), rank=4, nnz=12)  # 16 equal singular values
    assert identity.relative_error < 0.51
    tiny, huge = structured(16, 24, 6) * 1e-20, structured(16, 24, 6) * 1e15
    assert decompose(tiny, budget=0.5).relative_error == pytest.approx(
        decompose(huge, budget=0.5).relative_error, rel=0.05
    )


def test_large_short_side_uses_the_subspace_start_and_is_reproducible():
    w = structured(1100, 1150, 7)
    fits = [decompose(w, rank=60, nnz=1000, n_iter=2) for _ in range(2)]
    assert torch.equal(fits[0].to_dense(), fits[1].to_dense())
    exact = torch.linalg.svdvals(w)
    assert fits[0].relative_error < 1.02 * (exact[60:].norm() / exact.norm()).item()


def test_works_under_autocast_without_gradients_and_in_half():
    w = structured(32, 48, 8).requires_grad_()
    want = decompose(w, budget=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = decompose(w, budget=0.5)
    assert torch.equal(want.to_dense(), got.to_dense())
    assert not got.u.requires_grad
    half = decompose(w.detach().bfloat16(), budget=0.5)
    assert half.u.dtype == half.values.dtype == torch.bfloat16
    assert half.relative_error < want.relative_error + 0.01


@pytest.mark.parametrize(
    ("weight", "sizes", "error", "message"),
    [
        (torch.ones(4, 6), {"rank": 5}, ValueError, r"rank must lie in \[0, min\(m, n\)\] = \[0, 4\], got 5"),
        (torch.ones(4, 6), {"nnz": 25}, ValueError, r"nnz must lie in \[0, m \* n\] = \[0, 24\], got 25"),
        (torch.ones(4, 6), {"rank": -1}, ValueError, "rank must lie in .*got -1"),
        (torch.ones(4, 6), {"budget": 1.2}, ValueError, r"budget must lie in \[0, 1\], got 1.2"),
        (
            torch.ones(4, 6),
            {"budget": 0.5, "sparse_coefficient": 2},
            ValueError,
            "sparse_coefficient must lie in .*got 2",
        ),
        (torch.ones(4, 6), {"rank": 1, "sparse_coefficient": 0.5}, ValueError, "sparse_coefficient divides a budget"),
        (torch.ones(4, 6), {"rank": 1, "budget": 0.5}, ValueError, "got both"),
        (torch.ones(4, 6), {}, ValueError, "got none of them"),
        (
            torch.ones(4, 6),
            {"budget": 0.5, "budget_unit": "words"},
            ValueError,
            "budget_unit must be one of params, bytes, got 'words'",
        ),
        (torch.ones(4, 6), {"rank": 1, "budget_unit": "bytes"}, ValueError, "got 'bytes' without one"),
        (torch.ones(4, 6), {"rank": 1, "n_iter": 0}, ValueError, "n_iter must be >= 1, got 0"),
        (torch.ones(4, 6), {"rank": 1, "groups": 3}, ValueError, "groups must divide the 4 rows, got 3"),
        (torch.ones(4), {"rank": 1}, ValueError, r"weight must be a non-empty \[m, n\].*got \[4\]"),
        (torch.ones(0, 4), {"rank": 0}, ValueError, r"non-empty.*got \[0, 4\]"),
        (torch.ones(4, 6).int(), {"rank": 1}, TypeError, "weight must be float32.*got torch.int32"),
        (
            torch.tensor([[1.0, float("nan")]]),
            {"rank": 1},
            ValueError,
            "weight must be finite, got 1 NaN or Inf among 2",
        ),
        (torch.tensor([[1.0, float("inf")]]), {"nnz": 1}, ValueError, "weight must be finite"),
    ],
)
def test_bad_arguments_are_named(weight, sizes, error, message):
    with pytest.raises(error, match=message):
        decompose(weight, **sizes)


def test_split_budget_counts_exactly():
    assert split_budget(10, 10, 0.3, 1.0) == (0, 30)
    assert split_budget(10, 10, 0.4, 0.0) == (2, 0)
    assert split_budget(8, 18, 1.0, 0.0, groups=8) == (0, 0)  # a depthwise kernel has no room for a factor
    assert split_budget(4, 100, 1.0, 0.0)[0] == 3


@pytest.mark.parametrize(
    ("m", "n", "groups"), [(1, 1, 1), (1, 9, 1), (9, 1, 1), (6, 10, 1), (6, 10, 3), (5, 300, 1), (40, 12, 2)]
)
@pytest.mark.parametrize("element", [2, 4, 8])
@pytest.mark.parametrize("coefficient", [0.0, 0.4, 0.7, 1.0])
def test_a_budget_in_bytes_is_used_up_and_grows_monotonically(m, n, groups, element, coefficient):
    last = 0, 0
    for step in range(41):
        budget = step / 40
        limit = budget * m * n * element
        rank, nnz = split_budget(m, n, budget, coefficient, groups, "bytes", element)
        fits = [k for k in range(m * n + 1) if kept_bytes(m, n, groups, 0, k, element) <= coefficient * limit + 1e-6]
        ranks = range(min(m // groups, n) + 1)
        fit = [r for r in ranks if kept_bytes(m, n, groups, r, 0, element) <= (1 - coefficient) * limit + 1e-6]
        assert (rank, nnz) == (max(fit), max(fits))
        assert kept_bytes(m, n, groups, rank, nnz, element) <= limit + 1e-6
        assert rank >= last[0]
        assert nnz >= last[1]
        last = rank, nnz
    assert coefficient < 1 or nnz == m * n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decompose_keeps_a_share_of_the_bytes_of_its_dtype(dtype, tmp_path):
    conv = torch.nn.Conv2d(16, 24, 3, groups=2, bias=False).to(dtype)
    layer = CMDConv2d.from_dense(conv, budget=0.5, budget_unit="bytes")
    save(layer, tmp_path / "x.safetensors")
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "x.safetensors").values())
    assert 0.4 * conv.weight.nbytes < stored <= 0.5 * conv.weight.nbytes
    sizes = split_budget(24, 72, 0.5, None, 2, "bytes", dtype.itemsize)
    assert (layer.rank, layer.nnz) == sizes
    assert layer.nnz < decompose(conv.weight, budget=0.5, groups=2).nnz


def test_round_to_frees_rank_for_s():
    assert split_budget(64, 576, 0.5, 0.5) == (14, 9216)
    assert split_budget(64, 576, 0.5, 0.5, round_to=8) == (8, 9216 + 6 * 640)
    assert split_budget(64, 576, 0.5, 0.5, round_to=32) == (0, 9216 + 14 * 640)
    assert split_budget(64, 576, 0.5, 0.0, round_to=8) == (24, 0)  # nothing goes to an S that is not wanted
    fit = decompose(structured(64, 96, 9), budget=0.5, sparse_coefficient=0.5, round_to=4)
    assert (fit.rank, fit.nnz) == split_budget(64, 96, 0.5, 0.5, round_to=4) == (8, 1696)
    with pytest.raises(ValueError, match="round_to must be >= 1, got 0"):
        split_budget(64, 96, 0.5, 0.5, round_to=0)
    with pytest.raises(ValueError, match="round_to rounds the rank of a budget, got it without one"):
        decompose(structured(8, 8, 0), rank=3, round_to=2)
