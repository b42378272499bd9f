# The native module, compiled from csrc/bind. Private: the functions of the package check their arguments first.
# kantor._emu, which the tests build, has the same contents and runs the CUDA code on the fiber emulator.
# Tensors are contiguous; results are written into tensors that the caller made. `threads` counts CPU threads.

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict

from torch import Tensor

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    simd: str
    openmp: int  # date of the OpenMP standard, as yyyymm
    cuda_built: bool
    cuda_architectures: str  # as CMake writes them; empty without CUDA
    cuda_runtime: int  # 1000 major + 10 minor; 0 without CUDA

__version__: str
cg_state_size: int  # float64 numbers per system in the `info` of cg
capped_state_size: int  # and in the `states` of capped_cg
multishift_state_size: int  # float64 numbers in the `state` of multishift_cg
multishift_scalars: int  # and per shift
flexible_state_size: int  # float64 numbers per system of flexible_cg
direction_scalars: int  # and per direction kept

# --- core ---

def build_info() -> _BuildInfo: ...
def cuda_device_count() -> int: ...  # 0 without a driver or without CUDA code; never raises

# --- linalg: an operator is (operands, layout, scales), encoded as csrc/linalg/operator.h says ---

def multiply_add(x: Tensor, y: Tensor, out: Tensor, a: float, b: float, threads: int) -> None: ...
def zero_fill(out: Tensor, threads: int) -> None: ...
def matvec(
    operands: Sequence[Tensor],
    layout: Sequence[int],
    scales: Sequence[float],
    x: Tensor,
    y: Tensor,
    projections: Tensor | None,  # float64, batch * projections_size(layout); may be absent where that is 0
    threads: int,
) -> None: ...
def projections_size(layout: Sequence[int]) -> int: ...  # doubles of workspace a vector, for low-rank terms
def cg(
    operands: Sequence[Tensor],
    layout: Sequence[int],  # empty: `apply` stands in for the operator
    scales: Sequence[float],
    m_operands: Sequence[Tensor],
    m_layout: Sequence[int],  # empty: no preconditioner, or `precondition`
    m_scales: Sequence[float],
    b: Tensor,  # (batch, n)
    x: Tensor,  # (batch, n); initial guess, then the solution
    vectors: Sequence[Tensor],  # r, p, q, z, each (batch, n)
    zero_start: bool,
    info: Tensor,  # (batch, cg_state_size) float64
    history: Tensor,  # (batch, length) float64
    workspace: Tensor,  # uint8
    projections: Tensor | None,  # float64, as for matvec, first that of the operator, then of the preconditioner
    rtol: float,
    atol: float,
    max_iterations: int,
    apply: Callable[[bool], None] | None,  # q = A x if the argument is true, else q = A p
    precondition: Callable[[], None] | None,  # z = M r
    user_monitor: Callable[[int, float], bool] | None,  # (iteration, residual norm) -> whether to stop
    sums: Tensor | None,  # float64, 4 batch + 2: what all_reduce sums
    all_reduce: Callable[[int], None] | None,  # over ranks, of the first so many sums (csrc/core/all_reduce.h)
    threads: int,
) -> None: ...
def cg_workspace_bytes(batch: int) -> int: ...
def capped_cg(
    operands: Sequence[Tensor],
    layout: Sequence[int],  # empty: `product` stands in for the operator
    scales: Sequence[float],
    m_operands: Sequence[Tensor],
    m_layout: Sequence[int],  # empty: no preconditioner, or `precondition`
    m_scales: Sequence[float],
    g: Tensor,  # (batch, n)
    vectors: Sequence[Tensor],  # y, Hy, r, p, Hp, z, q, each (batch, n); q may be any tensor where it is not needed
    states: Tensor,  # (batch, capped_state_size) float64
    arrays: Tensor,  # (batch, 4, capacity) float64
    workspace: Tensor,  # uint8
    projections: Tensor | None,  # as for cg
    rule: int,
    check_every: int,
    resume: bool,
    product: Callable[[Tensor], Tensor] | None,
    z: Tensor,  # what `product` gets
    precondition: Callable[[], None] | None,  # z = M r
    sums: Tensor | None,  # as for cg
    all_reduce: Callable[[int], None] | None,
    threads: int,
) -> int: ...  # calls of `product`
def multishift_cg(
    operands: Sequence[Tensor],
    layout: Sequence[int],  # empty: `product` stands in for the operator
    scales: Sequence[float],
    b: Tensor,  # (n)
    vectors: Sequence[Tensor],  # r, p, q, each (n); x, directions, each (count, n)
    state: Tensor,  # (multishift_state_size) float64
    shifts: Tensor,  # (multishift_scalars, count) float64
    workspace: Tensor,  # uint8
    projections: Tensor | None,  # float64, for the low-rank terms
    check_every: int,
    product: Callable[[Tensor], Tensor] | None,
    p: Tensor,  # what `product` gets
    threads: int,
) -> int: ...  # calls of `product`
def multishift_workspace_bytes() -> int: ...

_Encoded: TypeAlias = tuple[Sequence[Tensor], Sequence[int], Sequence[float]]

def flexible_cg(
    A: _Encoded,  # empty: `product` stands in
    f: _Encoded,  # the map; empty: the residual itself, or `direction`
    fallback: _Encoded,  # likewise
    b: Tensor,  # (batch, n)
    vectors: Sequence[Tensor],  # x, r (batch, n); ring (slots, 2, batch, n); direction (batch, n)
    zero_start: bool,
    tables: Sequence[Tensor],  # float64: (batch, flexible_state_size), (batch, slots, direction_scalars), history
    workspace: Tensor,  # uint8
    projections: Tensor | None,  # float64, for the low-rank terms of A, f and the fallback
    rtol: float,
    atol: float,
    max_iterations: int,
    numbers: Sequence[int],  # window, notay, normalised, rounds between true residuals, patience, stall_after
    product: Callable[[bool, int], None] | None,  # ring[slot, 1] = A x if the argument is true, else A ring[slot, 0]
    direction: Callable[[int], None] | None,  # ring[slot, 0] = f(ring[slot, 1])
    fall_back: Callable[[int], None] | None,  # ring[slot, 1] = M r
    user_monitor: Callable[[int, float], bool] | None,
    threads: int,
) -> None: ...
def flexible_workspace_bytes(batch: int) -> int: ...
def capped_scan(arrays: Tensor, j: int) -> tuple[float, int]: ...  # the smallest ratio of test 4, and its index
def capped_workspace_bytes(batch: int) -> int: ...
def csr_check(crow: Tensor, col: Tensor, values: Tensor, cols: int) -> dict[str, int]: ...  # struct CsrReport
def csr_transpose(crow: Tensor, col: Tensor, t_crow: Tensor, t_col: Tensor, permutation: Tensor) -> None: ...
def csr_asymmetry(crow: Tensor, col: Tensor, values: Tensor) -> tuple[float, int, int]: ...  # |a_ij - a_ji|, i, j
def ic0_factor(crow: Tensor, col: Tensor, values: Tensor, shift: float, factor: Tensor) -> int: ...
def level_schedule(crow: Tensor, col: Tensor, pointers: Tensor, rows: Tensor) -> int: ...

level_layout_size: int  # integers that describe a level of multigrid

# The arena and the levels' layout; host tensors.
def multigrid_setup(
    operands: Sequence[Tensor],
    nz: int,
    ny: int,
    nx: int,
    single_precision: bool,
    walls: bool,
    stencils: Tensor | None,  # float64 (levels, 27)
    scales: Tensor | None,  # float64 (levels,)
    first_level: int,
    threads: int,
) -> tuple[Any, list[int]]: ...
def multigrid_workspace(layout: Sequence[int], threads: int) -> int: ...  # bytes
def multigrid_apply(operands: Sequence[Tensor], layout: Sequence[int], r: Tensor, z: Tensor, threads: int) -> None: ...

multigrid_dense_limit: int  # unknowns of a level that is solved exactly

# The parts of a grid that several processes share (csrc/bind/multigrid.cpp); host tensors.
def multigrid_coarsen(
    grid: Sequence[Tensor],
    nz: int,
    ny: int,
    nx: int,
    level: int,
    begin: int,
    end: int,
    coarse: Sequence[Tensor],
    threads: int,
) -> int: ...
def multigrid_walls_matter(splits: int, nz: int, ny: int, nx: int) -> bool: ...
def multigrid_pass(
    grid: Sequence[Tensor],
    nodes: Sequence[Tensor],
    stencil: Tensor | None,
    scale: float,
    place: Sequence[int],  # nz, ny, nx, begin, end, first coarse plane
    sweeps: int,
    up: bool,
    b: Tensor,
    x: Tensor,
    out: Tensor,
    coarse: Tensor,
    workspace: Tensor,
    threads: int,
) -> None: ...
def multigrid_pass_workspace(ny: int, nx: int, sweeps: int, width: int, threads: int) -> int: ...  # bytes

# The number of closed components; writes their labels, int32, -1 elsewhere. Host tensors.
def closed_components(cells: Tensor, labels: Tensor, nz: int, ny: int, nx: int) -> int: ...
def ic0_solve(
    operands: Sequence[Tensor], layout: Sequence[int], r: Tensor, work: Tensor, z: Tensor, threads: int
) -> None: ...

# --- direction networks; layout: dims, channels, pre, mid, post, nz, ny, nx, precision (0 float32, 1 bfloat16, 2 tf32),
# bits of the CPU's widest vectors. `like` says where the network runs. ---

def direction_net_prepared_bytes(layout: Sequence[int], masked: bool, like: Tensor) -> int: ...
def direction_net_workspace_bytes(layout: Sequence[int], batch: int, like: Tensor, threads: int) -> int: ...
def prepare_direction_net(
    layout: Sequence[int],
    weights: Sequence[Tensor],  # float32, of each convolution
    biases: Sequence[Tensor | None],
    mask: Tensor | None,  # uint8
    prepared: Tensor,  # uint8
    threads: int,
) -> None: ...
def direction_net(
    layout: Sequence[int],
    prepared: Tensor,
    mask: Tensor | None,
    r: Tensor,  # (batch, grid) float32
    q: Tensor,
    workspace: Tensor,  # uint8
    threads: int,
) -> None: ...

# --- transport: a cost is (operands, layout, power, fill): csrc/bind/transport.cpp; vectors are float64, on the CPU ---

_Fill: TypeAlias = Callable[[int, int], None]
_Cost: TypeAlias = tuple[Sequence[Tensor], Sequence[int], float, _Fill | None]
_Task: TypeAlias = tuple[_Cost, Tensor, Tensor, Sequence[float], Tensor, Tensor]

def transport_workspace_bytes(n: int, m: int) -> int: ...  # device memory behind a cost; 0 without CUDA code
def transport_solve(
    method: str,
    tasks: Sequence[_Task],  # cost, a, b, numbers, f, g
    options: Sequence[float],
    monitor: Callable[[int, float, float], bool] | None,
    threads: int,
    ranks: tuple[Tensor, Callable[[int], None], Callable[[int], None], int, int] | None = None,  # memory, sum, max, ...
) -> list[dict[str, Any]]: ...
def transport_extract(
    cost: _Cost, eps: float, f: Tensor, g: Tensor, threshold: float, limit: int, threads: int
) -> tuple[Any, Any, Any] | None: ...  # arrays crow, col, values; None beyond the limit
def transport_apply(
    cost: _Cost, eps: float, f: Tensor, g: Tensor, V: Tensor, out: Tensor, transposed: bool, threads: int
) -> None: ...
def transport_values(cost: _Cost, eps: float, f: Tensor, g: Tensor, threads: int) -> tuple[float, float]: ...
def transport_sums(
    cost: _Cost, eps: float, f: Tensor, g: Tensor, row_sums: Tensor, column_sums: Tensor, threads: int
) -> None: ...
def transport_sweep(
    cost: _Cost,
    eps: float,
    cutoff: float,
    g: Tensor,
    offset: Tensor,
    log_sums: Tensor,
    f: Tensor,
    column_sums: Tensor,
    repeats: int,
    threads: int,
) -> None: ...
def transport_column_log_sums(cost: _Cost, eps: float, f: Tensor, log_sums: Tensor, threads: int) -> None: ...
def transport_linear_solve(
    row_start: Tensor,
    column: Tensor,
    value: Tensor,
    R: Tensor,
    C: Tensor,
    u: Tensor,
    v: Tensor,
    xi: Tensor,
    zeta: Tensor,
    rtol: float,
    max_iterations: int,
    threads: int,
) -> tuple[int, float, int]: ...  # iterations, relative residual, directions of negative curvature

# --- graph: a pattern is rowptr (n + 1) and col (nnz), int32; x, y and g are (n, d) ---

_Options: TypeAlias = tuple[int, float, float, int, bool]  # steps, teleport, dropout, seed, adjoint

def product(rowptr: Tensor, col: Tensor, weight: Tensor, x: Tensor, y: Tensor, threads: int) -> None: ...
def edge_dot(rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor, out: Tensor, threads: int) -> None: ...
def propagate_workspace(
    rowptr: Tensor, col: Tensor, edge: Tensor, diagonal: Tensor, x: Tensor, options: _Options, threads: int
) -> int: ...  # elements
def propagate(
    rowptr: Tensor,  # of the transpose for an adjoint, and so edge
    col: Tensor,
    edge: Tensor,
    diagonal: Tensor,
    x: Tensor,
    y: Tensor,
    workspace: Tensor,
    options: _Options,
    threads: int,
) -> None: ...
def propagate_gradients_workspace(
    rowptr: Tensor, col: Tensor, edge: Tensor, diagonal: Tensor, x: Tensor, options: _Options, threads: int
) -> int: ...
def propagate_gradients(
    rowptr: Tensor,
    col: Tensor,
    edge: Tensor,
    diagonal: Tensor,
    transposed: tuple[Tensor, Tensor, Tensor],  # rowptr, col, edge
    x: Tensor,
    g: Tensor,
    results: tuple[Tensor, Tensor, Tensor],  # gradients for edge, diagonal, x
    workspace: Tensor,
    options: _Options,  # not adjoint
    threads: int,
) -> None: ...
def dropout_mask(mask: Tensor, step: int, dropout: float, seed: int, first_row: int, threads: int) -> None: ...

knn_largest_k: int  # on CUDA

def knn_workspace_bytes(x: Tensor, k: int, threads: int) -> int: ...
def knn(
    x: Tensor,  # (n, d)
    index: Tensor,  # (n, k) int32
    distance: Tensor,  # (n, k)
    workspace: Tensor,  # uint8
    threads: int,
) -> None: ...

# --- polar factors of small matrices, and the passes of optim.LANTON over lists of tensors, in place ---

def msign_is_small(B: Tensor) -> bool: ...
def msign_small(
    B: Tensor,  # (count, rows, columns), rows <= columns
    coefficients: Sequence[tuple[float, float, float]],
    safety: float,
    out: Tensor,
    threads: int,
) -> None: ...

lmo_keep_gradient: int  # flags
lmo_nesterov: int
lmo_measure: int
lmo_previous_is_given: int

def lmo_work(n: int) -> int: ...
def lmo_momentum(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    inputs: Sequence[Tensor],
    previous: Sequence[Tensor | None],
    differences: Sequence[Tensor | None],
    betas: Sequence[float],
    flags: Sequence[int],
    accepted: Tensor,  # (n,) float64
    sums: Tensor,  # (n, 4) float64
    work: Tensor,  # float64, the sum of lmo_work(number of elements)
    threads: int,
) -> None: ...
def lmo_apply(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    signs: Sequence[bool],
    rates: Tensor,  # (n,) float64
    decays: Tensor,
    threads: int,
) -> None: ...

# --- optim: a table has a row of pointers for each tensor of its lists, as csrc/optim/tensor_table.h says ---

table_row_words: int

def tensor_table(
    lists: Sequence[Sequence[Tensor]],  # up to 4, of one dtype; the last has one element a block
    blocks: Sequence[int],
    numbers: Sequence[Sequence[float]],  # up to 8 for each row
    whole_blocks: bool,  # whether a chunk is made of whole blocks
    table: Tensor,  # int64 on the CPU, table_row_words for each row
) -> int: ...  # chunks
def rademacher(table: Tensor, chunks: int, like: Tensor, seed: int, threads: int) -> None: ...
def average_curvature(table: Tensor, chunks: int, like: Tensor, threads: int) -> None: ...
def adahessian_step(table: Tensor, chunks: int, like: Tensor, threads: int) -> None: ...

# --- M-FAC: G is (rows, stride) in a storage dtype, products and coefficients (count, blocks, rows) float64 ---

def mfac_workspace(rows: int, d: int, block: int) -> int: ...  # float64 numbers
def mfac_products(
    G: Tensor,  # row `slot` is written, unless it is negative
    block: int,
    slot: int,
    inverse_scale: float,
    x: Tensor,  # (count, d)
    out: Tensor,
    workspace: Tensor,
    threads: int,
) -> None: ...
def mfac_combine(G: Tensor, block: int, c: Tensor, scale: float, x: Tensor, y: Tensor, threads: int) -> None: ...
def mfac_gram_workspace(rows: int, d: int, block: int) -> int: ...  # float64 numbers
def mfac_gram(G: Tensor, d: int, block: int, out: Tensor, workspace: Tensor, threads: int) -> bool: ...  # on the CPU
def mfac_replace(factors: Tensor, slot: int, rows: Tensor) -> bool: ...  # (blocks, m, m) by columns; on the CPU
