"""A million points: the graph of their nearest neighbours and twenty diffusion steps on it, in seconds and megabytes.

python bench/graph/bench_million.py
python bench/graph/bench_million.py --points 100000 --method approximate
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from kantor.graph import diffuse, knn_graph

T = TypeVar("T")


def timed(what: str, call: Callable[[], T]) -> T:
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{what:<34} {seconds:8.2f} s   peak of the process {peak:6d} MB", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--neighbours", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--method", choices=("auto", "exact", "approximate"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    random = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(200, args.dim, generator=random)
    x = centres[torch.randint(200, (args.points,), generator=random)]
    x += torch.randn(args.points, args.dim, generator=random)
    print(f"{args.points:,} points of a mixture, d = {args.dim}, k = {args.neighbours}, {args.threads} threads")

    graph = timed("graph", lambda: knn_graph(x, args.neighbours + 1, method=args.method))
    timed("largest eigenvalue", graph.lambda_max)
    step = 1 / graph.lambda_max_bound()
    timed(f"{args.steps} steps, the first time", lambda: diffuse(x, graph, step, args.steps))
    timed(f"{args.steps} steps", lambda: diffuse(x, graph, step, args.steps))
    near, order = timed("reordering", graph.reorder)
    z = x[order]
    timed(f"{args.steps} steps reordered, the first", lambda: diffuse(z, near, step, args.steps, stability="ignore"))
    timed(f"{args.steps} steps reordered", lambda: diffuse(z, near, step, args.steps, stability="ignore"))
    print(graph)


if __name__ == "__main__":
    main()
