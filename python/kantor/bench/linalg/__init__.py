"""Conjugate gradients: systems, solvers and what times them; `kantor.bench.cases.cg` and bench/linalg use them."""
