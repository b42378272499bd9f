"""Points or a graph: similarity graphs, diffusion on them, and classification from a few labels."""

from kantor._errors import StabilityError
from kantor.graph._classify_result import ClassifyResult
from kantor.graph.classify import classify
from kantor.graph.convection_diffuse import convection_diffuse
from kantor.graph.conversions import from_edge_index, from_networkx, from_pyg, from_scipy, from_torch
from kantor.graph.diffuse import diffuse
from kantor.graph.graph import Graph
from kantor.graph.implicit_diffuse import ImplicitInfo, implicit_diffuse
from kantor.graph.knn_graph import knn_graph
from kantor.graph.propagator import propagator
from kantor.graph.stability import StabilityReport, stability

__all__ = [
    "ClassifyResult",
    "Graph",
    "ImplicitInfo",
    "StabilityError",
    "StabilityReport",
    "classify",
    "convection_diffuse",
    "diffuse",
    "from_edge_index",
    "from_networkx",
    "from_pyg",
    "from_scipy",
    "from_torch",
    "implicit_diffuse",
    "knn_graph",
    "propagator",
    "stability",
]
