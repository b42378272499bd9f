"""Kantor: solvers, transport, diffusion and curvature for PyTorch, with the hot kernels in C++/CUDA."""

import torch  # first: its OpenMP runtime must be the one in the process

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"kantor needs torch 2.11 or newer (found {torch.__version__}): its native code reads tensors through the "
        "DLPack C exchange API, which appeared there. Install one with `pip install 'torch>=2.11'`."
    )

from importlib.metadata import version as _distribution_version

from kantor import _C, cuda, distributed, graph, linalg, nn, optim, transport
from kantor._errors import (
    BackendUnavailable,
    ConvergenceError,
    ConvergenceWarning,
    KantorError,
    NumericalBreakdown,
    RankError,
    StabilityError,
)

__version__: str = _C.__version__

if _distribution_version("kantor") != __version__:
    raise ImportError(
        f"kantor {_distribution_version('kantor')} is installed, but its native module was built as {__version__}: two "
        "versions are mixed. Reinstall with `pip install --force-reinstall kantor`."
    )

__all__ = [
    "BackendUnavailable",
    "ConvergenceError",
    "ConvergenceWarning",
    "KantorError",
    "NumericalBreakdown",
    "RankError",
    "StabilityError",
    "__version__",
    "cuda",
    "distributed",
    "graph",
    "linalg",
    "nn",
    "optim",
    "transport",
]
