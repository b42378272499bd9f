"""Inference of the direction network on a GPU: Kantor beside cuDNN's convolutions, in float32, TF32 and bfloat16.

    python bench/linalg/bench_direction_net_cuda.py [--sizes 64 128 256] [--channels 16] [--variant 64]

Every run is captured in a CUDA graph, so that kernels are timed and not the launching of them; the least of several
replays counts. torch runs channels-last with the algorithms that it finds fastest. `of copy` is the bandwidth of a
device copy against the network's least traffic, in which each activation is written once and read once by its
convolution and once where it is added. Errors are relative to the largest entry of the result in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_direction_net import COUNTS, Net, operations
from kantor.bench.tables import Table
from kantor.linalg._conv_inference import PackedNet
from torch import Tensor


def seconds(run: Callable[[], Tensor], repeats: int = 20) -> float:
    """The least time of a replay of what `run` does on the device."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    least = float("inf")
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        least = min(least, start.elapsed_time(end) / 1e3)
    return least


def traffic(channels: int, counts: tuple[int, int, int], side: int, width: int) -> float:
    """Bytes, with activations of `width` bytes a channel."""
    pre, mid, post = counts
    fine = 3 + 5 * pre + 2 + 5 * post - 1  # activations moved, and 2 for the sum with b
    coarse = 1 + 5 * mid - 1
    return side**3 * (8 + channels * width * (fine + 2 + coarse / 8))


def copy_rate() -> float:
    """Bytes a second that a copy on the device reads and writes."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds(lambda: b.copy_(a))


def network(side: int, channels: int, counts: tuple[int, int, int], rate: float) -> None:
    """A table for one size."""
    net = Net(channels, counts).eval().cuda()
    r = torch.randn(1, 1, side, side, side, device="cuda")
    exact = Net(channels, counts).double().eval().cuda()(r.double()) if side <= 64 else None
    table = Table(f"{side}^3, {channels} channels, {counts}", ("", "us", "TFLOP/s", "of copy", "Kantor is", "error"))
    for precision, width in (("float32", 4), ("tf32", 4), ("bfloat16", 2)):
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        peer = Net(channels, counts).eval().cuda().to(dtype, memory_format=torch.channels_last_3d)
        s = r.to(dtype, memory_format=torch.channels_last_3d)
        packed = PackedNet(net, precision=precision)
        runs: dict[str, Callable[[], Tensor]] = {"torch": lambda p=peer, s=s: p(s), "Kantor": lambda p=packed: p(r)}
        times = {name: seconds(run) for name, run in runs.items()}
        for name, time in times.items():
            error = "-" if exact is None else f"{float((runs[name]() - exact).abs().max() / exact.abs().max()):.1e}"
            table.add(
                f"{name} {precision}",
                f"{1e6 * time:.0f}",
                f"{operations(channels, counts, side) / time / 1e12:.1f}",
                f"{100 * traffic(channels, counts, side, width) / time / rate:.0f}%",
                f"{time / times['Kantor']:.2f}x",
                error,
            )
    table.notes.append(f"device copy: {rate / 1e12:.2f} TB/s")
    table.print()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--variant", choices=tuple(COUNTS), default="64")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_direction_net_cuda.py: torch sees no CUDA device")
    torch.backends.cudnn.benchmark = True
    with torch.inference_mode():
        rate = copy_rate()
        for side in arguments.sizes:
            network(side, arguments.channels, COUNTS[arguments.variant], rate)


if __name__ == "__main__":
    main()
