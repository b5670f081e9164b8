"""The benchmark: suites of cases, contenders, timing, results, tables.

Needs ``pip install '.[bench]'`` in a checkout.

Run it with ``python -m fusedopt bench``, or from Python::

    from fusedopt.bench import LARGE, render, run_suites
    print(render(run_suites(["rules"], LARGE)))

torch, matplotlib and tqdm are imported on first use.
"""

from fusedopt.bench.cases import LARGE, Case
from fusedopt.bench.results import Result, run_case, run_suites
from fusedopt.bench.suites import SUITES
from fusedopt.bench.table import render, save

__all__ = ["LARGE", "SUITES", "Case", "Result", "render", "run_case", "run_suites", "save"]
