"""Inference of the direction network: Kantor beside torch's own ways of running it, and a matrix product as yardstick.

    python bench/linalg/bench_direction_net.py [--sizes 32 64 128] [--threads 1] [--channels 16] [--variant 64]

Everything runs in one process and takes turns; the least time of each is reported (processor time for one thread, wall
time for more). torch runs eagerly with contiguous and with channels-last tensors, as a frozen graph optimised for
inference (blocked weights, ReLU fused), and in bfloat16; where memory would come fresh from the system at every call, a
second process runs the eager peers with memory that is reused. `of GEMM` is the rate of operations, as a direct
convolution counts them, against torch.mm of 2048 x 2048 in the same dtype. Errors are relative to the largest entry of
the result in float64.

The first and the last layer are timed apart, the last one without what Kantor fuses it into, and so are layers of a few
channels.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from kantor.bench.tables import Table
from kantor.linalg._conv_inference import PackedNet
from torch import Tensor, nn

COUNTS = {"64": (1, 3, 2), "128": (2, 5, 3)}
REUSED = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


class Net(nn.Module):
    """The network of the paper without biases, in torch."""

    def __init__(self, channels: int, counts: tuple[int, int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.counts = 3, counts
        inner = [nn.Conv3d(channels, channels, 3, padding=1, bias=False) for _ in range(2 + 2 * sum(counts))]
        first, last = nn.Conv3d(1, channels, 3, padding=1, bias=False), nn.Conv3d(channels, 1, 1, bias=False)
        self.convolutions = nn.ModuleList([first, *inner, last])

    def forward(self, r: Tensor) -> Tensor:
        layers = list(self.convolutions)
        a = torch.relu(layers[1](layers[0](r)))
        a, at = self.pairs(layers, 2, self.counts[0], a)
        b = torch.relu(layers[at](a))
        pooled = nn.functional.avg_pool3d(b.float(), 2).to(b.dtype)  # torch has none in bfloat16
        u, at = self.pairs(layers, at + 1, self.counts[1], pooled)
        u, at = self.pairs(layers, at, self.counts[2], nn.functional.interpolate(u, scale_factor=2.0) + b)
        return layers[at](u)

    @staticmethod
    def pairs(layers: list[Any], at: int, count: int, u: Tensor) -> tuple[Tensor, int]:
        for _ in range(count):
            u = torch.relu(layers[at + 1](torch.relu(layers[at](u)))) + u
            at += 2
        return u, at


def operations(channels: int, counts: tuple[int, int, int], side: int) -> float:
    """Multiplications and additions of direct convolutions."""
    pre, mid, post = counts
    inner = 2 + 2 * (pre + post) + 2 * mid / 8
    return side**3 * (54 * channels + inner * 54 * channels**2 + 2 * channels)


def least(runs: dict[str, Callable[[], Any]], repeats: int, threads: int) -> dict[str, float]:
    """Seconds of each, the least of several, taking turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = clock()
            run()
            seconds = clock() - started
            if repeat:  # the first warms up
                times[name] = min(seconds, times.get(name, seconds))
    return times


def frozen(net: Net, r: Tensor) -> Any:
    """The graph that torch optimises for inference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(net, r)))
    graph(r), graph(r)  # profiled in the first calls
    return graph


def matrix_product(dtype: torch.dtype) -> Callable[[], Any]:
    """A product of 2048 x 2048 matrices."""
    a = torch.randn(2048, 2048).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out)


def eager(net: Net, r: Tensor) -> dict[str, Callable[[], Any]]:
    """torch's two layouts of float32."""
    last = torch.channels_last_3d
    other, s = Net(net.convolutions[0].out_channels, net.counts).eval().to(memory_format=last), r.to(memory_format=last)
    return {"torch eager": lambda: net(r), "torch eager, channels last": lambda: other(s)}


def with_reused_memory(arguments: argparse.Namespace, side: int) -> dict[str, float]:
    """The eager peers in a process whose allocator keeps large blocks."""
    options = [f"--sizes={side}", f"--threads={arguments.threads}", f"--channels={arguments.channels}"]
    call = [sys.executable, __file__, *options, f"--variant={arguments.variant}", "--eager-only"]
    done = subprocess.run(call, env=os.environ | REUSED, capture_output=True, text=True, check=True)
    lines = (line.split("\t") for line in done.stdout.splitlines())
    return {f"{name}, reused memory": float(seconds) for name, seconds in lines}


def network(arguments: argparse.Namespace, side: int) -> None:
    """The whole network."""
    counts, threads = COUNTS[arguments.variant], arguments.threads
    net, r = Net(arguments.channels, counts).eval(), torch.randn(1, 1, side, side, side)
    runs: dict[str, Callable[[], Any]] = eager(net, r)
    repeats = 3 if side > 96 else 6 if side > 48 else 20
    if arguments.eager_only:
        for name, seconds in least(runs, repeats, threads).items():
            print(f"{name}\t{seconds}")
        return
    graph = frozen(net, r)
    last = torch.channels_last_3d
    half = Net(arguments.channels, counts).eval().to(torch.bfloat16, memory_format=last)
    s = r.to(torch.bfloat16, memory_format=last)
    wide, narrow = (PackedNet(net, precision=precision) for precision in ("float32", "bfloat16"))
    runs |= {
        "torch frozen graph": lambda: graph(r),
        "Kantor": lambda: wide(r),
        "torch eager bfloat16, channels last": lambda: half(s),
        "Kantor bfloat16": lambda: narrow(r),
        "GEMM float32": matrix_product(torch.float32),
        "GEMM bfloat16": matrix_product(torch.bfloat16),
    }
    times = least(runs, repeats, threads)
    rates = {name: 2 * 2048**3 / times.pop(f"GEMM {name}") for name in ("float32", "bfloat16")}
    if side >= 96:
        times |= with_reused_memory(arguments, side)
    results = {"Kantor": wide(r), "Kantor bfloat16": narrow(r), "torch frozen graph": graph(r), "torch eager": net(r)}
    results["torch eager bfloat16, channels last"] = half(s)
    table = Table(
        f"{side}^3, network '{arguments.variant}', {arguments.channels} channels, {threads} thread(s)",
        ("", "ms", "GFLOP/s", "of GEMM", "Kantor is faster", "Kantor bfloat16 is", "error"),
    )
    exact = net.double()(r.double()) if side <= 64 else None
    work = operations(arguments.channels, counts, side)
    for name, seconds in times.items():
        rate = rates["bfloat16" if "bfloat16" in name else "float32"]
        error = "-"
        if exact is not None and name in results:
            error = f"{float((results[name].double() - exact).abs().max() / exact.abs().max()):.1e}"
        ratios = (f"{seconds / times[ours]:.2f}x" for ours in ("Kantor", "Kantor bfloat16"))
        share = f"{100 * work / seconds / rate:.0f}%"
        table.add(name, f"{1e3 * seconds:.2f}", f"{work / seconds / 1e9:.0f}", share, *ratios, error)
    table.notes.append(f"GEMM: {rates['float32'] / 1e9:.0f} GFLOP/s float32, {rates['bfloat16'] / 1e9:.0f} bfloat16")
    table.print()


def layers(side: int, threads: int) -> None:
    """First and last layer, and inner ones of few channels: the difference of two networks, per layer."""
    r = torch.randn(1, 1, side, side, side)
    runs: dict[str, Callable[[], Any]] = {}
    for channels in (4, 8, 16, 32):
        short, long = Net(channels, (0, 1, 1)).eval(), Net(channels, (1, 1, 1)).eval()
        x, layer = torch.randn(1, channels, side, side, side), long.convolutions[2]
        y = x.to(memory_format=torch.channels_last_3d)
        cl = nn.Conv3d(channels, channels, 3, padding=1, bias=False).to(memory_format=torch.channels_last_3d)
        runs |= {
            f"short {channels}": partial(PackedNet(short), r),
            f"long {channels}": partial(PackedNet(long), r),
            f"layer {channels}": lambda layer=layer, x=x: torch.relu_(layer(x)),
            f"layer {channels} last": lambda layer=cl, y=y: torch.relu_(layer(y)),
        }
    times = least(runs, 4, threads)
    table = Table(
        f"one layer with its ReLU, {side}^3, {threads} thread(s), ms", ("channels", "torch", "Kantor", "ratio")
    )
    for channels in (4, 8, 16, 32):
        best = min(times[f"layer {channels}"], times[f"layer {channels} last"])
        mine = (times[f"long {channels}"] - times[f"short {channels}"]) / 2
        table.add(channels, f"{1e3 * best:.2f}", f"{1e3 * mine:.2f}", f"{best / mine:.1f}x")
    table.notes.append("torch: the better of two layouts. Kantor: half of what a residual pair adds to a network")
    table.print()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--variant", choices=tuple(COUNTS), default="64")
    parser.add_argument("--layers", action="store_true", help="single layers as well, at the first size")
    parser.add_argument("--eager-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        for side in arguments.sizes:
            network(arguments, side)
        if arguments.layers:
            layers(arguments.sizes[0], arguments.threads)


if __name__ == "__main__":
    main()
