"""``kantor bench``: the limits of this machine, and Kantor beside whichever other libraries are installed.

A case (:mod:`kantor.bench.cases`) has problems, peers that solve them and a judge of their answers; :mod:`runner`
measures, :mod:`results` keeps, tabulates and draws, :mod:`compare` sets two runs side by side. The developers' benches
in ``bench/`` use the same workers, tables, problems and peers.
"""

from __future__ import annotations

CASES = ("cg", "multigrid", "transport", "knn", "diffuse", "classify", "minimize", "optimizers")
