"""Problems and small data that tests, benchmarks, documentation and demo share.

Examples
--------
>>> from kantor import datasets
>>> points, moon = datasets.two_moons(100)
>>> points.shape, moon.unique()
(torch.Size([100, 2]), tensor([0, 1]))
>>> problem = datasets.minimization_problems()[0]
>>> bool(problem.fun(problem.x0) > 0)
True
"""

from kantor.datasets import poisson_scenes
from kantor.datasets.few_labels import four_discs, heat_snapshots, read_citation_graph, two_moons
from kantor.datasets.minimization import MinimizationProblem, minimization_problems
from kantor.datasets.transport import (
    colour_clouds,
    digit_clouds,
    image_pair_l1,
    image_pair_l2,
    mixture_1d,
    point_clouds,
    random_assignment,
    transport_problems,
)

__all__ = [
    "MinimizationProblem",
    "colour_clouds",
    "digit_clouds",
    "four_discs",
    "heat_snapshots",
    "image_pair_l1",
    "image_pair_l2",
    "minimization_problems",
    "mixture_1d",
    "point_clouds",
    "poisson_scenes",
    "random_assignment",
    "read_citation_graph",
    "transport_problems",
    "two_moons",
]
