"""The exact estimator's sums over pairs: n x n at once, pair by pair in blocks, and through the grid.

    python -m perf.expected_cost

Seconds of value and gradient, the ratios to the grid, the largest error against float64, relative to the largest
gradient, and the memory on top of what was held before. Scores are normal with standard deviation 3, about as far
apart as those of trained agents.
"""

import argparse
import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from perf.measure import interleaved, median_ratio, write_result
from pipeline.policy.estimators.exact import NODES, SPACING, direct_sums, grid_sums

# Tokens, heads, repeats.
SIZES = [(1024, 8, 5), (4500, 2, 5), (32768, 1, 1)]
# Tensors of n x n float32 that autograd holds at once for the literal formula.
NAIVE_TENSORS = 4


def naive(scores: Tensor, importance: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The formula as it stands, differentiated by autograd: (heads, n) three times -> (heads,), (heads, n)."""
    leaf = scores.detach().requires_grad_()
    before = torch.sigmoid(leaf[:, :, None] - leaf[:, None, :])
    pairs = before * count[:, :, None] * importance[:, None, :]
    cost = pairs.sum((1, 2)) - 0.5 * (importance * count).sum(-1)
    (gradient,) = torch.autograd.grad(cost.sum(), leaf)
    return cost.detach(), gradient


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Largest memory that ``work`` holds beyond what is held before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory that the process still holds would hide what is needed
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _kilobytes("VmRSS")
    work()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise SystemExit("Memory is read from /proc, which this system lacks; run the benchmark on Linux.")
    return int(match[1])


def measure(n: int, heads: int, repeats: int, device: str, naive_bytes: int) -> list[dict[str, float | str]]:
    """One row per way of adding up."""
    generator = torch.Generator().manual_seed(n)
    scores = (3 * torch.randn(heads, n, generator=generator)).to(device)
    importance = (10 ** (-10 * torch.rand(heads, n, generator=generator))).to(device)
    ways = {"grid": grid_sums, "blockwise": direct_sums}
    if NAIVE_TENSORS * 4 * heads * n * n <= naive_bytes:
        ways["naive"] = naive
    count = torch.ones_like(scores)
    works = {name: (lambda way=way: way(scores, importance, count)) for name, way in ways.items()}
    reference_cost, reference_gradient = direct_sums(scores.double(), importance.double(), count.double())
    seconds = interleaved(works, repeats, device, warm_up=int(n < 10_000))
    rows = []
    for name, work in works.items():
        cost, gradient = work()
        ratio, lowest, highest = median_ratio(seconds[name], seconds["grid"])
        rows.append(
            {
                "way": name,
                "tokens": n,
                "heads": heads,
                "seconds_per_head": min(seconds[name]) / heads,
                "times_the_grid": ratio,
                "lowest_ratio": lowest,
                "highest_ratio": highest,
                "peak_bytes_per_head": peak_bytes(work, device) / heads,
                "cost_error": float(((cost - reference_cost) / reference_cost).abs().max()),
                "gradient_error": float((gradient - reference_gradient).abs().max() / reference_gradient.abs().max()),
            }
        )
        print(
            f"n = {n:6d}  {name:9s} {1e3 * rows[-1]['seconds_per_head']:9.2f} ms per head, {ratio:7.1f} times the grid "
            f"({lowest:.1f} to {highest:.1f}), {rows[-1]['peak_bytes_per_head'] / 1e6:8.1f} MB per head, errors "
            f"{rows[-1]['cost_error']:.1e} (cost) {rows[-1]['gradient_error']:.1e} (gradient)",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="of the sizes measured, only these")
    parser.add_argument("--naive-gb", type=float, default=4.0, help="memory that the n x n formula may take")
    arguments = parser.parse_args()
    rows = []
    for n, heads, repeats in SIZES:
        if arguments.tokens and n not in arguments.tokens:
            continue
        rows += measure(n, heads, repeats, arguments.device, int(arguments.naive_gb * 1e9))
    write_result("expected_cost", arguments.device, {"spacing": SPACING, "nodes": NODES, "rows": rows})


if __name__ == "__main__":
    main()
