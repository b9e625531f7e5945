"""The support of S in files: the packed forms, their sizes, what is refused."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmd_ext import support
from cmd_ext.ops import Pattern


def csr(kept: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    row_ptr = np.concatenate([[0], np.cumsum(kept.sum(1))])
    return torch.tensor(row_ptr, dtype=torch.int32), torch.tensor(np.nonzero(kept)[1], dtype=torch.int32)


def check_round_trip(row_ptr, col_idx, m, n) -> str:
    nnz = len(col_idx)
    form, tensors = support.pack(row_ptr, col_idx, n)
    assert form == support.form(m, n, nnz)
    assert sorted(tensors) == sorted(support.FORMS[form])
    assert sum(t.nbytes for t in tensors.values()) == support.size(m, n, nnz)
    rows, columns = support.unpack(form, tensors, m, n, nnz)
    assert rows.dtype == columns.dtype == torch.int32
    assert torch.equal(rows, row_ptr)
    assert torch.equal(columns, col_idx)
    return form


@given(st.integers(1, 40), st.integers(1, 600), st.sampled_from([0, 0.003, 0.05, 0.3, 0.9, 1]), st.integers(0, 999))
@settings(max_examples=300, deadline=None)
def test_any_support_comes_back(m, n, density, seed):
    rng = np.random.default_rng(seed)
    kept = rng.random((m, n)) < density
    kept[rng.random(m) < 0.3] &= density == 1  # rows without an entry
    check_round_trip(*csr(kept), m, n)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_row_groups_of_a_convolution_come_back(groups, rows, n, seed):
    row_ptr, col_idx = csr(np.random.default_rng(seed).random((groups * rows, n)) < 0.4)
    form, tensors = support.pack(row_ptr, col_idx, n)
    back = support.unpack(form, tensors, groups * rows, n, len(col_idx))
    pairs = zip(Pattern.from_csr(*back, n, groups), Pattern.from_csr(row_ptr, col_idx, n, groups), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@given(st.lists(st.integers(0, (1 << 17) - 1), unique=True, max_size=30), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_columns_beyond_16_bits_come_back(columns, m):
    row_ptr = torch.tensor([0] * m + [len(columns)], dtype=torch.int32)
    check_round_trip(row_ptr, torch.tensor(sorted(columns), dtype=torch.int32), m, 1 << 17)


@pytest.mark.parametrize(
    ("n", "nnz", "form", "dtypes"),
    [
        (256, 1, "columns", ("uint8", "uint8")),
        (257, 1, "columns", ("uint16", "uint8")),
        (1 << 16, 256, "columns", ("uint16", "uint16")),
        ((1 << 16) + 1, 255, "columns", ("int32", "uint8")),
        (1 << 22, 1 << 16, "columns", ("int32", "int32")),
        (256, 40, "bitmap", ("uint8",)),
        (256, 0, "none", ()),
        (256, 256, "none", ()),
    ],
)
def test_the_forms_at_their_borders(n, nnz, form, dtypes):
    columns = torch.arange(n - nnz, n, dtype=torch.int32)  # the last ones
    row_ptr = torch.tensor([0, nnz], dtype=torch.int32)
    assert check_round_trip(row_ptr, columns, 1, n) == form
    tensors = support.pack(row_ptr, columns, n)[1]
    assert [str(tensors[name].dtype) for name in support.FORMS[form]] == [f"torch.{dtype}" for dtype in dtypes]


def test_the_smallest_form_is_taken_and_bits_lie_as_told():
    for m, n in itertools.product((1, 8, 33), (5, 300)):
        for nnz in range(m * n + 1):
            width, counts = 1 if n <= 256 else 2, 1 if min(n, nnz) < 256 else 2
            both = nnz * width + m * counts, (m * n + 7) // 8
            assert support.size(m, n, nnz) == (0 if nnz in (0, m * n) else min(both))
    row_ptr, col_idx = csr(np.array([[1, 0, 1, 0, 0], [1, 1, 0, 0, 1]], dtype=bool))
    assert support.pack(row_ptr, col_idx, 5)[1]["bitmap"].tolist() == [0b01100101, 0b10]


@pytest.mark.parametrize("element", [1, 2, 4, 8])
def test_most_entries_is_the_largest_that_fits(element):
    for m, n in ((1, 1), (3, 7), (4, 64), (2, 300)):
        cost = [nnz * element + support.size(m, n, nnz) for nnz in range(m * n + 1)]
        for limit in [0, 0.5, *range(1, m * n * element + 40, 3)]:
            want = max(nnz for nnz in range(m * n + 1) if cost[nnz] <= limit)
            assert support.most_entries(m, n, element, limit) == want


def test_bits_beyond_the_last_entry_are_refused():
    row_ptr, col_idx = csr(np.array([[1, 0, 1, 0, 0], [1, 1, 0, 0, 1]], dtype=bool))
    form, tensors = support.pack(row_ptr, col_idx, 5)
    tensors["bitmap"][1] = 0b110
    with pytest.raises(ValueError, match="bitmap must end in zeros from bit 10 on"):
        support.unpack(form, tensors, 2, 5, 5)
