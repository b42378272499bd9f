"""What an installed wheel must do beside the torch it finds: solve, differentiate, vmap, compile. Prints one line.

Needs nothing but kantor, torch and numpy.
"""

from __future__ import annotations

import sys
import warnings

import torch

import kantor
from kantor.linalg import CSR, Stencil, cg


def main() -> None:
    """Raise at the first thing that does not hold."""
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    options = {"dtype": torch.float64}
    for module in ("scipy", "matplotlib", "typer"):
        assert module not in sys.modules, f"import kantor brought in {module}"

    stencil = Stencil((4, 5, 6), weights=torch.tensor([1.0, 2.0, 0.5], **options), shift=0.1)
    dense = stencil.dense()
    b = torch.randn(3, dense.shape[0], **options)
    solve = {"rtol": 1e-12}

    result = cg(stencil, b, M="jacobi", **solve)
    assert result.converged, result.message
    expected = torch.linalg.solve(dense, b.mT).mT
    torch.testing.assert_close(result.x, expected, rtol=1e-9, atol=1e-10)

    # Gradients with respect to the right-hand side and the entries of the matrix.
    sparse = dense.to_sparse_csr()
    crow, col = sparse.crow_indices(), sparse.col_indices()
    leaves = [sparse.values().clone().requires_grad_(), b.clone().requires_grad_()]
    x = cg(CSR(crow, col, leaves[0], dense.shape), leaves[1], M="ic0", **solve).x
    gradients = torch.autograd.grad(x.square().sum(), leaves)
    matrix, right = dense.clone().requires_grad_(), b.clone().requires_grad_()
    reference = torch.autograd.grad(torch.linalg.solve(matrix, right.mT).square().sum(), (matrix, right))
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff())
    torch.testing.assert_close(gradients[0], reference[0][rows, col], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradients[1], reference[1], rtol=1e-7, atol=1e-9)

    def solution(right: torch.Tensor) -> torch.Tensor:
        return cg(stencil, right, **solve).x

    torch.testing.assert_close(torch.vmap(solution)(b), expected, rtol=1e-9, atol=1e-10)
    tangent = torch.func.jvp(solution, (b[0],), (b[1],))[1]
    torch.testing.assert_close(tangent, expected[1], rtol=1e-9, atol=1e-10)
    gradient = torch.func.grad(lambda right: solution(right).sum())(b[0])
    torch.testing.assert_close(gradient, solution(torch.ones_like(b[0])), rtol=1e-9, atol=1e-10)
    compiled = torch.compile(solution, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(b), expected, rtol=1e-9, atol=1e-10)

    cuda = "with CUDA code" if kantor._C.build_info()["cuda_built"] else "without CUDA code"
    print(f"kantor {kantor.__version__} {cuda} works with torch {torch.__version__}")


if __name__ == "__main__":
    main()
