"""Problems and small data that tests, benchmarks, documentation and demo share."""

from kantor.datasets.minimization import MinimizationProblem, minimization_problems

__all__ = ["MinimizationProblem", "minimization_problems"]
