"""A benchmark case: a workload, its contenders, and the promised ratios. The cases themselves are in suites.py and
gpu.py. No timing and no torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedopt import zoo
from fusedopt.bench.shapes import BYTES, F32, Format, Shapes, count, distinct
from fusedopt.rules import RULES, SPARSE_RULES

LARGE = 32 << 20
CEILING = "ceiling"
COMPILED = "compiled"
BUILT_IN = "built-in"  # the compiled rule, beside the same one written in Python
EXTRA = "built-in, extra ns a tensor"  # a bar: the most that a step may take longer than the built-in's, by tensor
REFERENCE = "reference"  # another implementation of a rule of the zoo
FUSED_F32 = "fused f32"  # torch's fused step with everything in float32, whatever our form
FUSED_LERP = "fused + lerp"  # the same, then torch._foreach_lerp_ into the moving average
DENSE = "fused, dense"  # torch's fused step with a dense gradient, where ours has a sparse one
MOVED = "rows moved"  # torch's index_select and index_copy_ of the same rows of parameter and states, and no arithmetic
BEST_NUMPY = "best NumPy"  # the faster of the two below
NUMPY = ("NumPy whole", "NumPy blocked")
TORCH = ("default", "foreach", "fused", COMPILED)

# Options that select another kernel of the same rule, listed as a separate row.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "SGD": {"SGD": {}, "Momentum": {"momentum": 0.9}},
    "RMSprop": {"RMSprop": {}, "RMSprop centered + momentum": {"centered": True, "momentum": 0.9}},
}


@dataclass(frozen=True)
class Case:
    """One row of a table: a workload, the contenders besides ours, and the bars."""

    label: str
    against: tuple[str, ...]
    rule: str = "Adam"
    options: Mapping[str, Any] = field(default_factory=dict)
    format: Format = F32
    shapes: Shapes = ((LARGE,),)
    kind: str = "torch"  # or gpu, numpy, training, denormals, estimators, ...: selects the builder in contenders.py
    model: str = ""  # of a training or estimators case
    grouped: bool = False  # one parameter group per tensor
    lookups: int = 0  # of a sparse case: rows that its gradient names,
    zipf: float = 0.0  # by Zipf's law with this exponent; 0: all alike
    fresh: bool = False  # gradients are replaced before every step, untimed
    misaligned: bool = False  # gradients are views of one buffer, from its second element on
    graph: bool = False  # the step is captured in a CUDA graph, whose replays are timed
    ours: Mapping[str, Any] = field(default_factory=dict)  # options of fusedopt alone
    max_grad_norm: float | None = None  # clip to this global norm; torch's side calls clip_grad_norm_
    # contender (or ceiling) -> minimum ratio (or share); EXTRA -> maximum
    bars: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.label

    @property
    def elements(self) -> int:
        return count(self.shapes)

    @property
    def bytes(self) -> int | None:
        """Minimum memory traffic of a step; None if more than a step is timed."""
        if self.kind in ("training", "estimators", "compiled", "ddp", "fsdp"):
            return None
        rule: Any = getattr(zoo, self.rule) if self.kind == "zoo" else {**RULES, **SPARSE_RULES}[self.rule]
        states = len(rule.states({**rule.defaults, **self.options}))
        if self.kind == "sparse":
            rows, width = self.shapes[0]
            moved = distinct(rows, self.lookups, self.zipf) * 2 * (1 + states)
            return (moved + self.lookups) * width * 4
        norm = 0.0 if self.max_grad_norm is None else BYTES[self.format.grad]  # the norm reads the gradients once more
        beside: float = {None: 0, "split8": 1, "split16": 2, "float32": 4}[self.ours.get("master")]
        beside += BYTES["f32"] if "ema_decay" in self.ours else 0
        return int(self.elements * (self.format.bytes(states) + 2 * beside + norm))


def rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Rows of a table of all registered rules: label, rule, options."""
    for rule in RULES:
        for label, options in VARIANTS.get(rule, {rule: {}}).items():
            yield label, rule, options
