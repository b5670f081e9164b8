"""Sparse gradients against torch: SparseAdam; SGD and Adagrad with gradients of torch.nn.Embedding(sparse=True)."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
import fusedopt.torch as ours
from fusedopt.torch import FallbackWarning

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SparseAdam", {}),
    ("SparseAdam", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3, "maximize": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True}),
]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else str(len(v)))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        yield


def sparse(indices: Tensor, values: Tensor, shape: Any) -> Tensor:
    return torch.sparse_coo_tensor(indices[None], values, shape, check_invariants=True)


def gradients(seed: int, n_rows: int, width: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Duplicates, coalesced, empty, one row a thousand times, int32 indices as torch keeps them, expanded values."""
    g = torch.Generator().manual_seed(seed)

    def values(n: int) -> Tensor:
        return torch.randn((n, *width), generator=g, dtype=torch.float64).to(dtype)

    def rows(n: int) -> Tensor:
        return torch.randint(0, n_rows, (n,), generator=g)

    shape = (n_rows, *width)
    made = [sparse(rows(25), values(25), shape) for _ in range(2)]
    made.append(sparse(rows(25), values(25), shape).coalesce())
    made.append(sparse(rows(0), values(0), shape))
    made.append(sparse(torch.full((1000,), n_rows - 1), values(1000), shape))
    made.append(sparse(rows(9), torch.ones((), dtype=dtype).expand(9, *width), shape))
    return made


def make(module: Any, name: str, params: Any, options: dict[str, Any]) -> Any:
    return getattr(module, name)(params, **options)


@each_case
@each_dtype
@pytest.mark.parametrize("width", [(), (3,), (16,), (4, 5)], ids=str)
def test_values_are_torchs(name: str, options: dict[str, Any], dtype: torch.dtype, width: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    start = torch.randn(30, *width, dtype=dtype)
    pair = [start.clone().requires_grad_() for _ in range(2)]
    optimizers = [make(m, name, [p], options) for m, p in zip((torch.optim, ours), pair, strict=True)]
    for grad in gradients(2, 30, width, dtype):
        for p, opt in zip(pair, optimizers, strict=True):
            p.grad = grad.clone()
            before = p.grad._values().clone()
            opt.step()
            assert torch.equal(p.grad._values(), before)
    tight = {"rtol": 3e-5, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(pair[1], pair[0], **tight)
    theirs, mine = (opt.state[p] for opt, p in zip(optimizers, pair, strict=True))
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(torch.as_tensor(mine[key]).to(dtype), torch.as_tensor(value).to(dtype), **tight)


@pytest.mark.parametrize("name", ["SparseAdam", "Adagrad", "SGD"])
def test_the_distance_to_torch_is_that_of_torch_to_itself(name: str) -> None:
    """torch, given the lookups in another order, adds values up in another order: so far its own results differ."""
    torch.manual_seed(3)
    g = torch.Generator().manual_seed(4)
    rows, values = torch.randint(0, 50, (4000,), generator=g), torch.randn(4000, 8, generator=g)
    order = torch.randperm(4000, generator=g)
    start = torch.randn(50, 8)

    def after(module: Any, indices: Tensor, given: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        p = start.to(dtype, copy=True).requires_grad_()
        opt = make(module, name, [p], {"lr": 0.1})
        for _ in range(3):
            p.grad = sparse(indices, given.to(dtype), p.shape)
            opt.step()
        return p.detach().double()

    exact = after(torch.optim, rows, values, torch.float64)
    theirs, shuffled = after(torch.optim, rows, values), after(torch.optim, rows[order], values[order])
    mine = after(ours, rows, values)
    own = max((theirs - exact).abs().max(), (shuffled - exact).abs().max(), (theirs - shuffled).abs().max())
    assert (mine - exact).abs().max() <= 1.5 * own


def embedding_model(seed: int) -> torch.nn.ModuleList:
    torch.manual_seed(seed)
    return torch.nn.ModuleList([torch.nn.Embedding(100, 16, sparse=True), torch.nn.Linear(16, 1)])


def loss_of(model: Any, seed: int) -> Tensor:
    indices = torch.randint(0, 100, (64,), generator=torch.Generator().manual_seed(seed))
    out: Tensor = model[1](model[0](indices)).pow(2).mean()
    return out


@pytest.mark.parametrize("name", ["Adagrad", "SGD"])
def test_dense_and_sparse_parameters_in_one_optimizer(name: str) -> None:
    models = [embedding_model(5), embedding_model(5)]
    optimizers = [make(m, name, x.parameters(), {"lr": 0.1}) for m, x in zip((torch.optim, ours), models, strict=True)]
    for step in range(6):
        for model, opt in zip(models, optimizers, strict=True):
            opt.zero_grad()
            loss_of(model, step).backward()
            opt.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_a_parameter_may_have_dense_and_sparse_gradients_by_turns() -> None:
    pair = [torch.ones(10, 4, requires_grad=True) for _ in range(2)]
    optimizers = [make(m, "Adagrad", [p], {"lr": 0.1}) for m, p in zip((torch.optim, ours), pair, strict=True)]
    for step in range(6):
        dense = torch.randn(10, 4, generator=torch.Generator().manual_seed(step))
        for p, opt in zip(pair, optimizers, strict=True):
            p.grad = sparse(torch.tensor([1, 7, 1]), dense[:3], (10, 4)) if step % 2 else dense
            opt.step()
    torch.testing.assert_close(pair[1], pair[0])


# ---- what is refused


def test_a_dense_gradient_is_refused_as_torch_refuses_it() -> None:
    for module in (torch.optim, ours):
        p = torch.ones(4, 2, requires_grad=True)
        opt = make(module, "SparseAdam", [p], {})
        p.grad = torch.ones(4, 2)
        warnings.simplefilter("ignore", FallbackWarning)  # within the fixture's context
        with pytest.raises(RuntimeError, match="dense gradients"):
            opt.step()
        assert (p == 1).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", {}), ("SGD", {"weight_decay": 0.1}), ("Adagrad", {"weight_decay": 0.1}), ("RMSprop", {})],
)
def test_what_torch_does_not_take_is_refused(name: str, options: dict[str, Any]) -> None:
    for module in (torch.optim, ours):
        p = torch.ones(4, 2, requires_grad=True)
        opt = make(module, name, [p], options)
        p.grad = sparse(torch.tensor([1]), torch.ones(1, 2), (4, 2))
        warnings.simplefilter("ignore", FallbackWarning)  # within the fixture's context
        with pytest.raises(RuntimeError):
            opt.step()
        assert (p == 1).all()


def test_two_sparse_dimensions_and_rows_that_are_not_contiguous_take_torchs_step() -> None:
    two = torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 1]]), torch.ones(2), (4, 2), check_invariants=True)
    one = sparse(torch.tensor([1, 3]), torch.ones(2, 2), (4, 2))
    for start, grad, text in (
        (torch.ones(4, 2), two, "2 sparse dimensions"),
        (torch.ones(2, 4).t(), one, "rows that are not contiguous"),
    ):
        pair = [start.clone().detach().requires_grad_() for _ in range(2)]
        for module, p in zip((torch.optim, ours), pair, strict=True):
            opt = make(module, "SGD", [p], {"lr": 0.1})
            p.grad = grad.clone()
            if module is ours:
                with pytest.warns(FallbackWarning, match=text):
                    opt.step()
            else:
                opt.step()
        assert torch.equal(pair[0], pair[1])


def test_an_index_out_of_range_is_named_and_nothing_is_written() -> None:
    p, q = torch.ones(4, 2, requires_grad=True), torch.ones(5, requires_grad=True)
    opt = ours.SGD([q, p], lr=0.1)
    q.grad = torch.ones(5)
    for index in (4, -1):
        p.grad = torch.sparse_coo_tensor(torch.tensor([[1, index]]), torch.ones(2, 2), (4, 2), check_invariants=False)
        with pytest.raises(IndexError, match=rf"parameter 1 of group 0: index 1: .*\[0, 4\), got {index}"):
            opt.step()
        assert (p == 1).all()
        assert (q == 1).all()


def test_constructors_refuse_what_torchs_refuse() -> None:
    with pytest.raises(ValueError, match="Sparse params"):
        ours.SparseAdam([torch.zeros(3, 2).to_sparse().requires_grad_()])
    with pytest.raises(ValueError, match="Complex params"):
        ours.SparseAdam([torch.zeros(3, 2, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(ValueError, match="learning rate"):
        ours.SparseAdam([torch.zeros(3, requires_grad=True)], lr=0.0)


# ---- clipping, scaling, checkpoints, install


@pytest.mark.parametrize("name", ["SGD", "SparseAdam"])
def test_the_norm_is_that_of_merged_gradients_of_all_parameters(name: str) -> None:
    p, q = torch.zeros(20, 8, requires_grad=True), torch.zeros(9, 3, requires_grad=True)
    opt = make(ours, name, [p, q], {"lr": 1.0, "max_grad_norm": 0.5})
    g = torch.Generator().manual_seed(6)
    for t in (p, q):
        n = len(t)
        t.grad = sparse(torch.randint(0, n, (50,), generator=g), torch.randn(50, t.shape[1], generator=g), t.shape)
    assert p.grad is not None
    assert q.grad is not None
    norm = torch.cat([p.grad.to_dense().flatten(), q.grad.to_dense().flatten()]).norm()
    opt.step()
    torch.testing.assert_close(opt.last_grad_norm, norm)
    if name == "SGD":
        torch.testing.assert_close(p.detach(), -p.grad.to_dense() * 0.5 / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "SparseAdam"])
@pytest.mark.parametrize("finite", [True, False])
def test_grad_scaler_in_both_protocols(name: str, finite: bool) -> None:
    results = []
    for protocol in ("unscaled before", "attributes", "plain"):
        p = torch.ones(6, 4, requires_grad=True)
        opt = make(ours, name, [p], {"lr": 0.1})
        scale = 1.0 if protocol == "plain" else 1024.0
        values = torch.full((3, 4), 0.25 if finite else float("inf"))
        p.grad = sparse(torch.tensor([2, 5, 2]), values * scale, (6, 4))
        if protocol == "unscaled before":
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(torch.ones(()))
            scaler.step(opt)
        elif protocol == "attributes":
            opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(float(not finite))
            opt.step()
        elif finite:
            opt.step()
        results.append(p.detach().clone())
        if not finite:
            assert not opt.state.get(p)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_checkpoints_go_both_ways() -> None:
    grads = gradients(7, 30, (4,), torch.float32)
    want = torch.ones(30, 4, requires_grad=True)
    reference = torch.optim.SparseAdam([want], lr=0.1)
    p = torch.ones(30, 4, requires_grad=True)
    opt: Any = ours.SparseAdam([p], lr=0.1)
    for i, grad in enumerate(grads):
        want.grad, p.grad = grad.clone(), grad.clone()
        reference.step()
        opt.step()
        other: Any = (torch.optim if i % 2 == 0 else ours).SparseAdam([p], lr=0.3)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        opt = other
    torch.testing.assert_close(p, want, rtol=1e-5, atol=1e-6)
    assert float(opt.state[p]["step"]) == len(grads)


def test_copies_and_conversion() -> None:
    grads = gradients(8, 30, (4,), torch.float32)
    want = torch.ones(30, 4, requires_grad=True)
    reference = torch.optim.SparseAdam([want], lr=0.1)
    p = torch.ones(30, 4, requires_grad=True)
    opt: Any = torch.optim.SparseAdam([p], lr=0.1)
    for i, grad in enumerate(grads):
        want.grad, p.grad = grad.clone(), grad.clone()
        reference.step()
        opt.step()
        opt = ours.convert(opt, back=i % 2 == 1)
        assert isinstance(opt, ours.SparseAdam) == (i % 2 == 0)
    torch.testing.assert_close(p, want, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(ours.convert(opt))
    assert isinstance(twin, ours.SparseAdam)


def test_install_covers_it() -> None:
    ours.install()
    try:
        opt = torch.optim.SparseAdam([torch.ones(2, 2, requires_grad=True)])
        assert type(opt) is ours.SparseAdam
    finally:
        ours.uninstall()


def test_no_step_falls_back_and_no_plan_is_built_twice() -> None:
    model = embedding_model(9)
    table = model[0].weight
    opt: Any = ours.SparseAdam([table])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for step in range(5):
            opt.zero_grad()
            loss_of(model, step).backward()
            opt.step()
            if step == 0:
                planned = opt._engine.plans_built
    assert opt._engine.plans_built == planned
    assert table._version >= 5


def test_the_bits_do_not_depend_on_threads_or_the_order_of_parameters() -> None:
    def run(threads: int, reverse: bool) -> list[Tensor]:
        fusedopt.set_num_threads(threads)
        try:
            tables = [torch.ones(n, 24, requires_grad=True) for n in (1000, 7, 300)]
            opt = ours.SparseAdam(tables[::-1] if reverse else tables, lr=0.1)
            for step in range(3):
                for i, t in enumerate(tables):
                    g = torch.Generator().manual_seed(step * 10 + i)
                    indices = torch.randint(0, len(t), (20_000,), generator=g)
                    t.grad = sparse(indices, torch.randn(20_000, 24, generator=g), t.shape)
                opt.step()
            return [t.detach() for t in tables]
        finally:
            fusedopt.set_num_threads(None)

    want = run(1, False)
    for threads in (1, 2, 5, 8):
        for reverse in (False, True):
            for got, expected in zip(run(threads, reverse), want, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "options",
    [{"stochastic_rounding": True}, {"master": "split16"}, {"master": "split8", "state_dtype": "int8"}],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_16_bit_tables(options: dict[str, Any]) -> None:
    torch.manual_seed(10)
    start = torch.randn(40, 64)
    p, wide = start.bfloat16().requires_grad_(), start.bfloat16().float().requires_grad_()
    opt: Any = ours.SparseAdam([p], lr=0.01, **options)
    reference = torch.optim.SparseAdam([wide], lr=0.01)
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        indices, values = torch.randint(0, 20, (30,), generator=g), torch.randn(30, 64, generator=g).bfloat16()
        p.grad, wide.grad = sparse(indices, values, p.shape), sparse(indices, values.float(), p.shape)
        opt.step()
        reference.step()
    torch.testing.assert_close(p.float(), wide.detach(), rtol=2e-2, atol=1.5e-2)
    assert torch.equal(p[20:].float(), wide[20:])


def test_int8_states_are_refused_where_blocks_cross_rows() -> None:
    p = torch.ones(4, 40, requires_grad=True)
    opt: Any = ours.SparseAdam([p], state_dtype="int8")
    p.grad = sparse(torch.tensor([1]), torch.ones(1, 40), p.shape)
    with pytest.raises(RuntimeError, match=r"state_dtype: .*rows of 40 elements, no whole number of blocks of 64"):
        opt.step()


# ---- lazy


LAZY: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 0.1, "weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "max_grad_norm": 1.0}),
    ("AdamW", {"lr": 0.05, "l1": 0.1, "ema_decay": 0.9}),
    ("NAdam", {"lr": 0.05}),
    ("RAdam", {"weight_decay": 0.1}),
    ("Adamax", {}),
    ("Adadelta", {"lr": 0.5}),
    ("Lion", {"lr": 0.01, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), LAZY, ids=lambda v: v if isinstance(v, str) else "")
def test_lazy_steps_have_the_bits_of_numpys_and_leave_other_rows_alone(name: str, options: dict[str, Any]) -> None:
    start = torch.randn(40, 16, generator=torch.Generator().manual_seed(11))
    p, array = start.clone().requires_grad_(), start.numpy().copy()
    opt: Any = make(ours, name, [p], {**options, "lazy": True})
    known = getattr(fusedopt, name)(array.copy()).defaults  # torch's constructors have defaults of their own
    given = {k: v for k, v in opt.param_groups[0].items() if k in known}
    twin = getattr(fusedopt, name)(array, **given, max_grad_norm=options.get("max_grad_norm"))
    named = torch.arange(1, 40, 3)
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        indices = named[torch.randint(0, len(named), (20,), generator=g)]
        values = torch.randn(20, 16, generator=g)
        p.grad = sparse(indices, values, p.shape)
        opt.step()
        twin.step(fusedopt.Rows(indices.numpy(), values.numpy()))
    assert torch.equal(p.detach(), torch.from_numpy(array))
    others = torch.ones(40, dtype=torch.bool)
    others[named] = False
    assert torch.equal(p[others], start[others])
    for key, value in opt.state[p].items():
        if value.ndim and key != "ema":
            assert not value[others].any(), key


def test_lazy_does_not_change_a_dense_step() -> None:
    results = []
    for lazy in (False, True):
        p = torch.ones(5, 3, requires_grad=True)
        opt = ours.AdamW([p], lr=0.1, lazy=lazy)
        for step in range(3):
            p.grad = torch.full((5, 3), float(step))
            opt.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_lazy_is_checked_and_may_be_set_by_group_and_between_steps() -> None:
    with pytest.raises(TypeError, match="lazy: expected True or False"):
        ours.Adam([torch.ones(2, requires_grad=True)], lazy=1)
    a, b = torch.ones(4, 2, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    opt: Any = ours.Adam([{"params": [a], "lazy": True}, {"params": [b]}], lr=0.1)
    a.grad = sparse(torch.tensor([2]), torch.ones(1, 2), (4, 2))
    b.grad = torch.ones(4, 2)
    opt.step()
    assert (a[2] != 1).all()
    assert (a[[0, 1, 3]] == 1).all()
    b.grad = a.grad.clone()
    warnings.simplefilter("ignore", FallbackWarning)  # within the fixture's context
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    opt.param_groups[1]["lazy"] = True
    before = b.detach().clone()
    opt.step()
    assert (b[2] != before[2]).all()
    assert torch.equal(b[[0, 1, 3]], before[[0, 1, 3]])


def test_lazy_is_kept_in_checkpoints() -> None:
    p = torch.ones(4, 2, requires_grad=True)
    opt: Any = ours.Adam([p], lr=0.1, lazy=True)
    p.grad = sparse(torch.tensor([2]), torch.ones(1, 2), (4, 2))
    opt.step()
    other: Any = ours.Adam([p], lr=0.1)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["lazy"] is True
    torch.optim.Adam([p]).load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="lazy"):
        ours.convert(opt, back=True)


# -- counts and sums of rows -----------------------------------------------------------------------------------------

BY_ROW: list[tuple[str, dict[str, Any]]] = [
    ("SparseAdam", {"lr": 0.1, "row_steps": True}),
    ("Adam", {"lr": 0.1, "lazy": True, "row_steps": True}),
    ("AdamW", {"lr": 0.1, "lazy": True, "row_steps": True, "weight_decay": 0.1, "amsgrad": True}),
    ("SGD", {"lr": 0.1, "lazy": True, "row_steps": True, "momentum": 0.9, "dampening": 0.3}),
    ("Adagrad", {"lr": 0.1, "row_steps": True, "lr_decay": 0.1}),
    ("Adagrad", {"lr": 0.1, "row_wise": True, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("Adagrad", {"lr": 0.1, "row_wise": True, "row_steps": True, "max_grad_norm": 1.0, "maximize": True}),
]
by_row = pytest.mark.parametrize(("name", "options"), BY_ROW, ids=lambda v: v if isinstance(v, str) else "")


@by_row
@each_dtype
def test_numbers_of_rows_have_the_bits_of_numpys(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """A table beside a dense parameter; for SparseAdam Adam's function with eps before the correction has no twin."""
    torch.manual_seed(1)
    table = torch.randn(30, 16, dtype=dtype, requires_grad=True)
    beside = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    params = [table] if name == "SparseAdam" else [table, beside]
    opt: Any = make(ours, name, params, options)
    arrays = [p.detach().numpy().copy() for p in params]
    kept = {k: v for k, v in options.items() if k != "lazy"}
    twin: Any = None if name == "SparseAdam" else getattr(fusedopt, name)(arrays, **kept)
    for grad in gradients(2, 30, (16,), dtype):
        table.grad, beside.grad = grad, torch.randn(5, 3, dtype=dtype)
        opt.step()
        if twin:
            rows = fusedopt.Rows(grad._indices()[0].numpy(), grad._values().contiguous().numpy())
            twin.step([rows, beside.grad.numpy()])
    state = opt.state[table]
    if options.get("row_steps"):
        assert state["row_steps"].shape == (30,)
        assert state["row_steps"].max() > state["row_steps"].min()
    if options.get("row_wise"):
        assert state["sum"].shape == (30, 1)
        assert opt.state[beside]["sum"].shape == (5, 1)
        report = ours.memory_report(opt)
        assert report["sum"] == 35 * state["sum"].element_size() / (30 * 16 + 15)
    for p, a, s in zip(params, arrays, twin.state if twin else (), strict=False):
        assert torch.equal(p.detach(), torch.from_numpy(a))
        for k in {"row_steps", "sum"} & set(s):
            assert torch.equal(opt.state[p][k], torch.from_numpy(s[k])), k
    assert opt._engine.updated_by(opt) == {None: len(params)}


def test_sparse_adam_that_counts_by_row_is_torchs_for_each_row() -> None:
    table = torch.randn(6, 16, dtype=torch.float64)
    ps = [table.clone().requires_grad_()], [table[r : r + 1].clone().requires_grad_() for r in range(6)]
    opt: Any = ours.SparseAdam(ps[0], lr=0.1, row_steps=True)
    each = [torch.optim.SparseAdam([p], lr=0.1) for p in ps[1]]
    for t in range(20):
        rows = torch.tensor(sorted({t % 6, t * t % 6}))
        values = torch.randn(len(rows), 16, dtype=torch.float64)
        ps[0][0].grad = sparse(rows, values, (6, 16))
        opt.step()
        for r, v in zip(rows.tolist(), values, strict=True):
            ps[1][r].grad = sparse(torch.tensor([0]), v[None], (1, 16))
            each[r].step()
    torch.testing.assert_close(ps[0][0].detach(), torch.cat(ps[1]).detach(), rtol=1e-12, atol=1e-13)


@by_row
def test_numbers_of_rows_in_checkpoints(name: str, options: dict[str, Any]) -> None:
    """Through a file; the resumed run has the same bits, in bfloat16, too, whose casts would lose them."""
    torch.manual_seed(3)
    table = torch.randn(30, 16, dtype=torch.bfloat16, requires_grad=True)
    grads = gradients(4, 30, (16,), torch.bfloat16)
    opt: Any = make(ours, name, [table], options)
    for grad in grads[:3]:
        table.grad = grad
        opt.step()
    file = io.BytesIO()
    torch.save((table, opt.state_dict()), file)
    file.seek(0)
    again, saved = torch.load(file)
    again = again.detach().requires_grad_()
    other: Any = make(ours, name, [again], options)
    other.load_state_dict(saved)
    for grad in grads[3:]:
        for p, o in ((table, opt), (again, other)):
            p.grad = grad
            o.step()
    assert torch.equal(table, again)
    for key, value in opt.state[table].items():
        assert torch.equal(other.state[again][key], value), key


def test_row_wise_takes_torchs_checkpoint() -> None:
    """The mean over each row is what the row-wise sum would be; and what was begun by torch counts on."""
    table = torch.randn(8, 4, requires_grad=True)
    theirs = torch.optim.Adagrad([table], lr=0.1)
    table.grad = torch.randn(8, 4)
    theirs.step()
    mine: Any = ours.Adagrad([table], lr=0.1, row_wise=True, row_steps=True)
    mine.load_state_dict(theirs.state_dict())
    assert mine.param_groups[0]["row_wise"] is True
    torch.testing.assert_close(mine.state[table]["sum"], theirs.state[table]["sum"].mean(1, keepdim=True))
    table.grad = sparse(torch.tensor([2]), torch.ones(1, 4), (8, 4))
    mine.step()
    assert mine.state[table]["row_steps"].tolist() == [1, 1, 2, 1, 1, 1, 1, 1]


def test_row_options_are_checked_and_may_be_set_by_group_and_between_steps() -> None:
    a, b = (torch.ones(4, 2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="row_steps: NAdam has a number from step to step"):
        ours.NAdam([a], row_steps=True)
    with pytest.raises(ValueError, match="row_steps: Lion has no use for step counts"):
        ours.Lion([a], row_steps=True)
    with pytest.raises(TypeError, match="row_wise"):
        ours.Adam([a], row_wise=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="row_wise: Adam has no such form"):
        ours.Adam([{"params": [a], "row_wise": True}])
    with pytest.raises(ValueError, match="weight_decay: expected 0 with row_wise=True"):
        ours.Adagrad([a], weight_decay=0.1, row_wise=True)
    opt: Any = ours.Adagrad([{"params": [a]}, {"params": [b], "row_wise": False}], lr=0.1, row_wise=True)
    assert opt.state[a]["sum"].shape == (4, 1)
    assert opt.state[b]["sum"].shape == (4, 2)
    assert opt.state[b]["sum"].dtype == torch.float32
    a.grad, b.grad = sparse(torch.tensor([2]), torch.ones(1, 2), (4, 2)), torch.full((4, 2), 2.0)
    opt.step()
    assert opt.state[a]["sum"].tolist() == [[0], [0], [1], [0]]
    opt.param_groups[1]["row_wise"] = True
    b.grad = torch.tensor([[0.0, 2.0]] * 4)
    opt.step()
    assert opt.state[b]["sum"].tolist() == [[6.0]] * 4
    opt.param_groups[1]["weight_decay"] = 0.5
    before = b.detach().clone()
    with pytest.raises(ValueError, match="weight_decay: expected 0 with row_wise=True"):
        opt.step()
    assert torch.equal(b, before)


def test_row_wise_has_no_other_step() -> None:
    """What the kernels do not take is refused, since torch's step has one number for each element."""
    across = torch.randn(4, 6).t().requires_grad_()
    opt: Any = ours.Adagrad([across], lr=0.1, row_wise=True)
    before = across.detach().clone()
    across.grad = torch.ones(6, 4)
    with pytest.raises(RuntimeError, match=r"row_wise: torch's own step, needed here .*rows that are not contiguous"):
        opt.step()
    p = torch.ones(3, 2, requires_grad=True)
    p.grad = torch.ones(3, 2)
    bad: Any = ours.Adagrad([p], lr=0.1, row_wise=True)
    bad.state[p]["sum"] = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"state 'sum': expected .* of shape \(3, 1\), got .* of \(2, 1\)"):
        bad.step()
    assert torch.equal(across, before)


def test_weight_decay_that_comes_later_is_refused_as_torch_refuses_it() -> None:
    for module in (torch.optim, ours):
        p = torch.ones(4, 2, requires_grad=True)
        opt: Any = module.Adagrad([p], lr=0.1)  # type: ignore[attr-defined]
        p.grad = sparse(torch.tensor([2]), torch.ones(1, 2), (4, 2))
        opt.step()
        opt.param_groups[0]["weight_decay"] = 0.5
        before = p.detach().clone()
        warnings.simplefilter("ignore", FallbackWarning)  # within the fixture's context
        with pytest.raises(RuntimeError, match="weight_decay"):
            opt.step()
        assert torch.equal(p, before)


def test_a_step_count_that_is_none_is_left_to_torch() -> None:
    for name in ("SparseAdam", "Adagrad"):
        results = []
        for module in (torch.optim, ours):
            torch.manual_seed(0)
            p = torch.ones(4, 2, requires_grad=True)
            opt: Any = make(module, name, [p], {"lr": 0.1})
            for step in range(3):
                p.grad = sparse(torch.tensor([2]), torch.ones(1, 2), (4, 2))
                if step == 2:
                    held = opt.state[p]["step"]
                    opt.state[p]["step"] = held + 0.5 if isinstance(held, torch.Tensor) else torch.tensor(held + 0.5)
                warnings.simplefilter("ignore", FallbackWarning)
                opt.step()
            results.append(p.detach())
        torch.testing.assert_close(results[1], results[0])
