"""Contenders of the suite ``sparse``: steps with sparse gradients against torch's, and a lazy step against a dense one.

The gradient of a case has ``lookups`` rows of its table, drawn uniformly or by Zipf's law. A contender gets a new
gradient before every step, untimed and not coalesced, as the backward pass of an embedding leaves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusedopt.bench.cases import DENSE, MOVED, Case
from fusedopt.bench.shapes import draw
from fusedopt.bench.timing import Contender
from fusedopt.rules import RULES, SPARSE_RULES

if TYPE_CHECKING:
    import torch

OURS = "ours"
DRAWS = 4  # gradients taken in turn


def builder(case: Case) -> Callable[[str], Contender]:
    """The data of a case; a function from a contender's name to the contender."""
    import torch

    import fusedopt.torch

    checks: Any = torch.sparse.check_sparse_tensor_invariants
    checks.disable()  # torch asks its users to decide, and warns until they do
    rows, width = case.shapes[0]
    make = torch.Generator().manual_seed(0)
    base = torch.randn(rows, width, generator=make)
    indices = [torch.from_numpy(draw(rows, case.lookups, case.zipf, seed))[None] for seed in range(DRAWS)]
    values = torch.randn(case.lookups, width, generator=make).mul_(1e-2)

    def build(name: str) -> Contender:
        turn = iter(range(10**9))
        if name == MOVED:
            rule = {**RULES, **SPARSE_RULES}[case.rule]
            tables = [base.clone() for _ in range(1 + len(rule.states({**rule.defaults, **case.options})))]
            distinct = [torch.unique(at[0]) for at in indices]

            def move() -> None:
                at = distinct[next(turn) % DRAWS]
                for table in tables:
                    table.index_copy_(0, at, table.index_select(0, at))

            return Contender(move)
        p = base.clone().requires_grad_()
        module: Any = fusedopt.torch if name == OURS else torch.optim
        beside: dict[str, Any] = dict(case.ours) if name == OURS else {"fused": True} if name == DENSE else {}
        opt: torch.optim.Optimizer = getattr(module, case.rule)([p], **case.options, **beside)
        if name == DENSE:
            p.grad = torch.zeros_like(base).index_add_(0, indices[0][0], values)
            return Contender(opt.step)

        def replace() -> None:
            at = indices[next(turn) % DRAWS]
            p.grad = torch.sparse_coo_tensor(at, values.clone(), p.shape, check_invariants=False)

        return Contender(opt.step, setup=replace)

    return build
