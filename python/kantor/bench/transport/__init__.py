"""Entropic transport: the solvers that `kantor.bench.cases.transport` and bench/transport time."""
