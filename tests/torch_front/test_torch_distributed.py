"""DDP, FSDP2, ZeRO, tensor parallelism, distributed checkpoints: two processes compared with one.

With the same gradients as in the single process all values must be bit-identical. If a sum over processes is taken in
another order, the tolerance is 1e-5 relative.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed", exc_type=ImportError)
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

import torch_distributed as cases  # noqa: E402
from torch_cases import NAMES  # noqa: E402

RICH: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "centered": True, "momentum": 0.5, "eps": 1e-3},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[cases.Cluster]:
    cluster = cases.Cluster()
    yield cluster
    cluster.close()


def assert_ranks_agree(results: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = results
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[k], other[k]) for k in first)
    return first


def assert_near(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.integration("DDP", "every class: the bits of one process given the same gradients")
@pytest.mark.parametrize("name", NAMES)
def test_ddp(cluster: cases.Cluster, name: str) -> None:
    options = RICH.get(name, {"lr": 0.01})
    got = assert_ranks_agree(cluster.run(cases.ddp, name, options))
    if name not in ("Adam", "NAdam", "RAdam", "Lion"):  # near zero the sign of a gradient decides
        assert_near(got, cases.train_alone(name, options, 4))


# Rules written in Python: with momenta, with a carried scalar, with the step before the first, without state.
OWN = ["fusedopt.bench.own.OwnAdam", "fusedopt.bench.own.OwnNAdam", "fusedopt.zoo.Adan", "fusedopt.bench.own.PlainSGD"]


@pytest.mark.parametrize("name", OWN)
def test_rules_written_in_python_on_shards(cluster: cases.Cluster, name: str) -> None:
    assert_ranks_agree(cluster.run(cases.ddp, name, {"lr": 0.01}))
    assert_ranks_agree(cluster.run(cases.fsdp, name, {"lr": 0.01}, 0.0))
    assert_ranks_agree(cluster.run(cases.fsdp, name, {"lr": 0.01, "max_grad_norm": 0.01}, 1e-5))


Sums = tuple[str, dict[str, Any], str, str, float]
SUMS: dict[str, Sums] = {
    "float64": ("LAMB", {"weight_decay": 0.1}, "float64", "shard", 1e-12),
    "float32": ("LAMB", {"weight_decay": 0.1}, "float32", "shard", 1e-5),
    "clipping": ("LAMB", {"max_grad_norm": 0.01}, "float64", "shard", 1e-6),
    "bfloat16": ("LAMB", {"weight_decay": 0.1}, "bfloat16", "shard", 0.02),
    "int8 states": ("LAMB", {"weight_decay": 0.1, "state_dtype": "int8"}, "float32", "shard", 1e-5),
    "two sums, and a mean": ("CautiousAdamW", {}, "float64", "shard", 1e-12),
    "norms of weight and gradient": ("LARS", {"weight_decay": 0.1}, "float64", "shard", 1e-12),
    "replicated": ("CautiousAdamW", {}, "float64", "replicate", 1e-12),
    "plain parameters": ("StableAdamW", {}, "float64", "some", 1e-12),
}


@pytest.mark.integration("FSDP2 `fully_shard`", "rules with sums over a tensor (LAMB): within 1e-12 in float64")
@pytest.mark.parametrize("case", SUMS.values(), ids=SUMS)
def test_sums_over_a_tensor_on_shards(
    cluster: cases.Cluster, case: tuple[str, dict[str, Any], str, str, float]
) -> None:
    name, options, *rest = case
    assert_ranks_agree(cluster.run(cases.sums, f"fusedopt.zoo.{name}", {"lr": 0.01, **options}, *rest))


def test_sums_over_a_tensor_in_three_processes() -> None:
    cluster = cases.Cluster(3)
    try:
        for name in ("LAMB", "StableAdamW"):
            given = (f"fusedopt.zoo.{name}", {"lr": 0.01, "weight_decay": 0.1}, "float64", "shard", 1e-12)
            assert_ranks_agree(cluster.run(cases.sums, *given))
    finally:
        cluster.close()


def test_sums_over_a_tensor_under_tensor_parallelism(cluster: cases.Cluster) -> None:
    assert_ranks_agree(cluster.run(cases.tensor_parallel, "fusedopt.zoo.LAMB", {"lr": 0.01}, 1e-5))


def test_a_sum_over_a_tensor_is_refused_on_shards_where_no_kernel_steps(cluster: cases.Cluster) -> None:
    for message, unchanged in cluster.run(cases.sums_refused, "fusedopt.zoo.LAMB"):
        assert message.startswith("LAMB needs sums over whole tensors, and only the kernels complete those of a shard")
        assert unchanged


@pytest.mark.parametrize("name", ["AdamW", "fusedopt.zoo.LAMB"])
def test_a_parameter_of_partial_sums_is_refused(cluster: cases.Cluster, name: str) -> None:
    for messages in cluster.run(cases.partial_refused, name):
        assert [m.partition(" (")[0] for m in messages] == ["a parameter of partial sums"] * 2


@pytest.mark.integration("FSDP2 `fully_shard`", "every class: the bits of one process; uneven and empty shards")
@pytest.mark.parametrize("name", NAMES)
def test_fsdp2(cluster: cases.Cluster, name: str) -> None:
    assert_ranks_agree(cluster.run(cases.fsdp, name, RICH.get(name, {"lr": 0.01}), 0.0))


@pytest.mark.integration("FSDP2 `fully_shard`", "`max_grad_norm`: the norm within 1e-6, the values within 1e-5")
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_fsdp2_clips_by_the_norm_over_the_mesh(cluster: cases.Cluster, name: str) -> None:
    assert_ranks_agree(cluster.run(cases.fsdp, name, {**RICH.get(name, {}), "max_grad_norm": 0.01}, 1e-5))


@pytest.mark.integration("FSDP2 `fully_shard`", "groups, scheduler, frozen parameters, state: as torch's classes")
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_fsdp2_gives_torchs_values(cluster: cases.Cluster, name: str) -> None:
    cluster.run(cases.fsdp_like_torch, name)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch gives gradients the dtype of the weight")
@pytest.mark.parametrize("options", [{}, {"master": "split16", "state_dtype": "float32"}], ids=["plain", "split16"])
def test_fsdp2_with_float32_gradients_of_bfloat16_weights(cluster: cases.Cluster, options: dict[str, Any]) -> None:
    cluster.run(cases.fsdp_wide_gradients, "AdamW", {"lr": 0.01, **options})


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "_has_grad_dtype_override"), reason="torch's fully_shard drops grad_dtype"
)
def test_fsdp2_shards_the_dtype_of_gradients(cluster: cases.Cluster) -> None:
    cluster.run(cases.fsdp_grad_dtype, "AdamW")


@pytest.mark.integration("FSDP2 `fully_shard`", "GradScaler: an overflow on one process skips the step on all")
def test_fsdp2_with_a_scaler(cluster: cases.Cluster) -> None:
    cluster.run(cases.fsdp_scaler, "AdamW")


@pytest.mark.integration("ZeroRedundancyOptimizer", "divided state, scheduler, consolidation: the bits of one process")
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lion"])
def test_zero_redundancy_optimizer(cluster: cases.Cluster, name: str) -> None:
    first, other = cluster.run(cases.zero, name, {"lr": 0.01})
    assert len(first) == 5
    assert other == {}


@pytest.mark.integration("tensor parallel", "column- and rowwise: the bits of one process; clipping within 1e-5")
@pytest.mark.parametrize(("options", "rtol"), [({}, 0.0), ({"max_grad_norm": 0.01}, 1e-5)], ids=["plain", "clipping"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_tensor_parallel(cluster: cases.Cluster, name: str, options: dict[str, Any], rtol: float) -> None:
    assert_ranks_agree(cluster.run(cases.tensor_parallel, name, {**RICH.get(name, {}), **options}, rtol))


@pytest.mark.integration("torch.distributed.checkpoint", "2 processes to 1 to 2: the same values, parameters and state")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_travel_between_two_processes_and_one(cluster: cases.Cluster, name: str, tmp_path: Path) -> None:
    paths = [str(tmp_path / part) for part in ("two", "one", "again")]
    two = assert_ranks_agree(cluster.run(cases.checkpoint, name, None, paths[0], 2))
    one = cases.checkpoint(name, paths[0], paths[1], 2)
    again = assert_ranks_agree(cluster.run(cases.checkpoint, name, paths[1], paths[2], 0))

    def part(values: dict[str, Any], loaded: bool) -> dict[str, Any]:
        return {k.removeprefix("loaded "): v for k, v in values.items() if k.startswith("loaded ") == loaded}

    for saved, read in ((two, one), (one, again)):
        want, got = part(saved, loaded=False), part(read, loaded=True)
        assert want.keys() == got.keys()
        assert all(torch.equal(want[k], got[k]) for k in want)
    assert any(
        k.endswith("param") and not torch.equal(v, part(one, loaded=False)[k])
        for k, v in part(two, loaded=False).items()
    )


def test_the_report_of_fusedopt_run_counts_shards(cluster: cases.Cluster, tmp_path: Path) -> None:
    for text in cluster.run(cases.reports, str(tmp_path / "r.json")):
        assert "fused: 5 tensors" in text
