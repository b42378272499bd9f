"""Linear operators and solvers."""

from kantor._result import SolveResult, SolveStatus
from kantor.linalg._operator import LinearOperator, as_operator
from kantor.linalg.callable import Callable
from kantor.linalg.capped_cg import CappedCGResult, CappedCGStatus, capped_cg
from kantor.linalg.cg import cg
from kantor.linalg.csr import CSR
from kantor.linalg.dcdm import dcdm
from kantor.linalg.dense import Dense
from kantor.linalg.diagonal import Diagonal
from kantor.linalg.direction_net import DirectionNet
from kantor.linalg.direction_training import TrainingResult, train_direction_net
from kantor.linalg.fcg import fcg
from kantor.linalg.flexible_cg import FlexibleResult
from kantor.linalg.lanczos_samples import ritz_dataset
from kantor.linalg.learned_vcycle import LearnedVCycle
from kantor.linalg.low_rank import LowRank
from kantor.linalg.msign import msign
from kantor.linalg.multigrid import Multigrid
from kantor.linalg.multishift_cg import MultishiftResult, multishift_cg
from kantor.linalg.nystrom import NystromPreconditioner, nystrom
from kantor.linalg.poisson_grid import PoissonGrid
from kantor.linalg.preconditioners import ic0, jacobi
from kantor.linalg.stencil import Stencil
from kantor.linalg.variable_stencil_net import VariableStencilNet
from kantor.linalg.vcycle_training import train_vcycle

__all__ = [
    "CSR",
    "Callable",
    "CappedCGResult",
    "CappedCGStatus",
    "Dense",
    "Diagonal",
    "DirectionNet",
    "FlexibleResult",
    "LearnedVCycle",
    "LinearOperator",
    "LowRank",
    "Multigrid",
    "MultishiftResult",
    "NystromPreconditioner",
    "PoissonGrid",
    "SolveResult",
    "SolveStatus",
    "Stencil",
    "TrainingResult",
    "VariableStencilNet",
    "as_operator",
    "capped_cg",
    "cg",
    "dcdm",
    "fcg",
    "ic0",
    "jacobi",
    "msign",
    "multishift_cg",
    "nystrom",
    "ritz_dataset",
    "train_direction_net",
    "train_vcycle",
]
