"""The checks of what only a GPU can get wrong: order on streams, graphs, memory that nobody has cleared, other devices.

And of what belongs to no value: repeated runs, strides, NaN, empty sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from cmd_ext.gpu_check.correctness import Check, close, same
from cmd_ext.gpu_check.samples import F32, RAW, Call, Target, calls, change, random, replayable, weights


def _repeat(on: Target, call: Call) -> str:
    args = call.draw(on)
    want = call.run(args)
    for _ in range(2):
        same(call.run(args), want, "between runs")
    return "3 runs, the same bits"


def _poison(on: Target, call: Call) -> str:
    """The same bits when every free block of the allocator holds NaN (as floats) and -1 (as integers)."""
    args = call.draw(on)
    want = call.run(args)
    for _ in range(2):
        sizes = [1 << k for k in range(9, 27 if on.large else 16) for _ in range(4)]
        blocks = [torch.full((size,), 255, dtype=torch.uint8, device=on.device) for size in sizes]
        del blocks
        same(call.run(args), want, "on poisoned memory")
    return "the same bits on poisoned memory"


def _graph(on: Target, call: Call) -> str:
    """A captured call, replayed with other inputs in the same tensors."""
    fixed, args = change(Tensor.clone, call.draw(on)), call.draw(on)
    replay = replayable(lambda: call.run(fixed), on.device)
    for turn in (args, call.draw(on)):
        for a, b in zip(fixed, turn, strict=True):
            if isinstance(a, Tensor):
                a.copy_(b)
        close(replay(), call.run(turn), "after replay")
    return "replayed with changed inputs"


def _side_stream(on: Target, call: Call) -> str:
    """A call on another stream behind a long kernel and the copies that bring its inputs."""
    args, static = call.draw(on), change(Tensor.clone, call.draw(on))
    want = call.run(args)
    stream = None
    if on.device.type == "cuda":
        torch.cuda.synchronize(on.device)
        stream = torch.cuda.Stream(on.device)
    with torch.cuda.stream(stream):
        if stream:
            torch.cuda._sleep(50_000_000)  # cycles, some 30 ms
        for a, b in zip(static, args, strict=True):
            if isinstance(a, Tensor):
                a.copy_(b)
        got = call.run(static)
    if stream:
        stream.synchronize()
    close(got, want, "on a side stream")
    return "in order"


def _second_device(on: Target, call: Call) -> str:
    args = call.draw(on)
    other = torch.device("cuda", on.device.index + 1)
    got = call.run(change(lambda t: t.to(other), args))
    if any(t.device != other for t in got):
        raise AssertionError(f"outputs are on {got[0].device}, want {other}")
    close(got, call.run(args), f"on {other}")
    return f"the same on {other}"


def _strides(on: Target, call: Call) -> str:
    """Every second entry of larger buffers full of poison."""

    def spaced(t: Tensor) -> Tensor:
        buffer = t.new_full([2 * s + 1 for s in t.shape], torch.nan if t.is_floating_point() else 1 << 30)
        return buffer[(slice(1, None, 2),) * t.dim()].copy_(t)

    args = call.draw(on)
    close(call.run(change(spaced, args)), call.run(args), "for strided arguments")
    return "the same for strided arguments"


def _not_finite(on: Target, call: Call) -> str:
    """NaN and infinity show up, and only where they belong: not in another token or image."""
    args = call.draw(on)
    clean = call.run(args)[0]
    args[0][1, 0], args[0][2, 0] = torch.nan, torch.inf
    got = call.run(args)[0]
    same([got[0]], [clean[0]], "beside a row with NaN")
    if not got[1].isnan().any() or got[2].isfinite().all():
        raise AssertionError("a NaN or an infinity got lost")
    return "kept to their own row"


def _svd_of_nan(on: Target) -> str:
    a, basis = random(on, 2, 80, 90, dtype=F32), random(on, 2, 90, 20, dtype=F32)
    clean = RAW.truncated_svd(a, basis, 12, 2)
    a[1, 3, 4] = torch.nan
    got = RAW.truncated_svd(a, basis, 12, 2)
    same([t[0] for t in got], [t[0] for t in clean], "beside a matrix with NaN")
    if not all(t[1].isnan().all() for t in got):
        raise AssertionError("the factors of a matrix with NaN must be NaN")
    return "NaN, and the other matrix of the batch unharmed"


def _empty(on: Target) -> str:
    """Sizes of zero that the value checks lack."""
    found = []
    for b, m, n in ((1, 0, 5), (1, 5, 0), (0, 5, 6)):
        found.append((RAW.topk_csr(random(on, b, m, n), 0), [(b, 0), (b, m + 1), (b, 0)]))
        found.append(
            (RAW.truncated_svd(random(on, b, m, n), random(on, b, n, 0), 0, 1), [(b, m, 0), (b, 0), (b, 0, n)])
        )
        w, u, v = random(on, b, m, n), random(on, b, m, 2), random(on, b, 2, n)
        found.append((RAW.residual_topk_csr(w, u, v, 0), [(b, m, n), (b, 0), (b, m + 1), (b, 0)]))
    found.append((RAW.truncated_svd(random(on, 0, 9, 8), random(on, 0, 8, 4), 3, 1), [(0, 9, 3), (0, 3), (0, 3, 8)]))
    layer = weights(on, 4, 12, 2, 20, groups=2)
    geometry = ((2, 3), (2, 1), (1, 2), (1, 2), 2)
    x, grad = random(on, 0, 4, 3, 3), random(on, 0, 4, 2, 3)
    found.append(([RAW.lrs_conv2d(x, *layer, None, *geometry)], [(0, 4, 2, 3)]))
    found.append(([RAW._lrs_conv2d_grad_input(grad, *layer, (3, 3), *geometry)], [(0, 4, 3, 3)]))
    values = RAW._lrs_conv2d_grad_values(grad, x, *layer[3:5], *geometry)
    found.append(([values], [(20,)]))
    if values.any():
        raise AssertionError("the gradient of no image must be zero")
    for got, sizes in found:
        if [tuple(t.shape) for t in got] != sizes:
            raise AssertionError(f"gave {[tuple(t.shape) for t in got]}, want {sizes}")
    return f"{len(found)} cases"


def runtime_checks(on: Target) -> Iterator[Check]:
    kinds = {"repeated": _repeat, "poison": _poison, "strides": _strides, "graph": _graph, "stream": _side_stream}
    if on.device.type == "cuda" and torch.cuda.device_count() > on.device.index + 1:
        kinds["second device"] = _second_device
    for kind, check in kinds.items():
        for call in calls():
            yield f"{kind}: {call.label}", partial(check, on, call)
    for call in calls():
        if call.name in ("lrs_linear", "lrs_conv2d", "_lrs_conv2d_grad_input"):
            yield f"NaN: {call.label}", partial(_not_finite, on, call)
    if on.native:
        yield "NaN: truncated_svd", partial(_svd_of_nan, on)
    yield "empty sizes", partial(_empty, on)


def sanitizer_checks(on: Target) -> Iterator[Check]:
    """One call of each kernel, for compute-sanitizer to watch."""
    for call in calls():
        yield call.label, lambda call=call: f"{len(call.run(call.draw(on)))} outputs"


PARTS = {"runtime": runtime_checks, "sanitizer": sanitizer_checks}
