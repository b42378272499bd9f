"""Linear operators and solvers."""

from kantor._result import SolveResult, SolveStatus
from kantor.linalg._operator import LinearOperator, as_operator
from kantor.linalg.callable import Callable
from kantor.linalg.cg import cg
from kantor.linalg.csr import CSR
from kantor.linalg.dense import Dense
from kantor.linalg.diagonal import Diagonal
from kantor.linalg.preconditioners import ic0, jacobi
from kantor.linalg.stencil import Stencil

__all__ = [
    "CSR",
    "Callable",
    "Dense",
    "Diagonal",
    "LinearOperator",
    "SolveResult",
    "SolveStatus",
    "Stencil",
    "as_operator",
    "cg",
    "ic0",
    "jacobi",
]
