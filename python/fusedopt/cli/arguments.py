"""Command-line arguments; the commands themselves are implemented in the other files of this folder and in bench/.

``fusedopt info`` lists versions and hardware, ``fusedopt bench`` measures this machine, ``fusedopt run`` runs a script
with fusedopt's optimizers in place of torch.optim's, ``fusedopt train`` and ``fusedopt compare`` train models on data
from files, ``fusedopt predict`` applies them.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._core import __version__
from ..rules import RULES

SUITES = {
    "bars": "the promised ratios, each with the measured one",
    "rules": "every rule in float32, 32M parameters",
    "formats": "Adam in every format, from the L1 cache to main memory",
    "shapes": "Adam on one tensor, on 1,000 tiny ones, on ResNet-50 and GPT-2 small",
    "bytes": "AdamW in the forms that move fewer bytes, against torch fused in float32",
    "numpy": "the NumPy functions against the best in-place NumPy",
    "training": "whole iterations of small networks",
    "estimators": "fits and the softmax loss against scikit-learn, torch and NumPy, with the promised ratios",
    "sparse": "steps with sparse gradients, on embedding tables",
    "denormals": "Adam on denormal moments",
    "own": "rules written in Python against the same rules compiled",
    "integrations": "DDP and FSDP2 in two processes, compiled iterations",
    "gpu": "every rule, small tensors and networks on a GPU, against torch's paths and other projects",
    "short": "every rule at 4M parameters, in less than a minute",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusedopt", description="Fused in-place optimizer steps.")
    parser.add_argument("--version", action="version", version=f"fusedopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, instruction sets, threads, and the libraries found")
    run = commands.add_parser(
        "run",
        help="run a training script with fusedopt's optimizers in place of torch.optim's",
        description="Runs a script unchanged, with fusedopt's optimizers in place of torch.optim's. Reports at the end "
        "which optimizers ran, their number of steps, whether they were fused or why not, and the time per step.",
        usage="fusedopt run [--report FILE] [--quiet] (script.py | -m module) [argument ...]",
    )
    run.add_argument("--report", type=Path, metavar="FILE", help="also write the report as JSON")
    run.add_argument("--quiet", action="store_true", help="write no report to stderr")
    run.add_argument("-m", dest="module", action="store_true", help="the target is a module, as for python -m")
    run.add_argument("target", metavar="script.py", help="the script, or with -m the module")
    bench = commands.add_parser(
        "bench",
        help="time the step against PyTorch and NumPy on this machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="suites:\n" + "\n".join(f"  {name:10} {text}" for name, text in SUITES.items()),
    )
    bench.add_argument(
        "--suite", nargs="+", choices=[*SUITES, "all"], default=["rules"], metavar="SUITE", help="see below"
    )
    bench.add_argument("--case", default="", metavar="TEXT", help="only the cases whose names contain this text")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    bench.add_argument("--plot", type=Path, metavar="DIR", help="save plots of the results as PNG files in this folder")
    length = bench.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="time per case (default: 1.5 to 40, by suite)")
    length.add_argument("--rounds", type=int, help="exact number of rounds per case")
    bench.add_argument("--elements", type=int, metavar="N", help="size of a large tensor (default: 32M)")
    bench.add_argument("--compile", action="store_true", help="also torch.compile(opt.step): minutes of compilation")
    bench.add_argument("--peers", action="store_true", help="also time optimizers of other projects, if installed")
    bench.add_argument("--quiet", action="store_true", help="no progress bar")
    _training(commands)
    return parser


OPTIMIZERS = tuple(name.lower() for name in RULES)
SCHEDULES = (
    "constant",
    "linear",
    "polynomial",
    "exponential",
    "step",
    "cosine",
    "restarts",
    "onecycle",
    "plateau",
    "wsd",
)


def _training(commands: Any) -> None:
    text = argparse.ArgumentParser(add_help=False)
    files = text.add_argument_group("text files")
    files.add_argument("--separator", metavar="CHAR", help="cell separator (default: comma in .csv files, else tab)")
    files.add_argument("--no-header", action="store_true", help="the first row is data; columns are column_0, ...")
    common = argparse.ArgumentParser(add_help=False)
    data = common.add_argument_group("data")
    data.add_argument(
        "--data", required=True, metavar="SOURCE",
        help="digits, breast_cancer, iris, wine, diabetes; a .csv or .tsv file (compressed or not), .parquet, or .npz "
        "with x and y; a folder of MNIST's files",
    )  # fmt: skip
    data.add_argument("--target", metavar="NAME", help="column or array to predict (default: the last column; y)")
    data.add_argument("--task", choices=["classification", "regression"], help="default: inferred from the target")
    data.add_argument("--drop", nargs="+", metavar="NAME", help="columns to leave out")
    data.add_argument("--test-size", type=_fraction, metavar="PART", help="fraction held out for testing (default 0.2)")
    data.add_argument(
        "--max-categories", type=_several, metavar="N", help="categories per column (default 1000); the rest share one"
    )
    model = common.add_argument_group("model")
    model.add_argument("--model", choices=["linear", "mlp"], default="mlp")
    model.add_argument("--loss", choices=["log", "hinge"], help="for a linear classifier (default log)")
    model.add_argument("--hidden", type=_count, nargs="+", metavar="N", help="hidden layers of mlp (default 100)")
    model.add_argument(
        "--activation", choices=["relu", "tanh", "logistic", "gelu", "identity"], help="for mlp (default relu)"
    )
    model.add_argument("--dropout", type=float, metavar="P", help="for mlp (default 0)")
    model.add_argument("--batch-norm", action="store_const", const=True, help="for mlp")
    model.add_argument("--l1", type=float, default=0.0, metavar="WEIGHT")
    model.add_argument("--l2", type=float, default=1e-4, metavar="WEIGHT", help="default 1e-4")
    fit = common.add_argument_group("training")
    fit.add_argument("--schedule", choices=SCHEDULES, default="constant", help="schedule of the learning rate")
    fit.add_argument("--epochs", type=_count, default=30, metavar="N", help="default 30")
    fit.add_argument("--batch-size", type=_count, default=32, metavar="N", help="default 32")
    fit.add_argument("--max-grad-norm", type=float, metavar="NORM", help="clip gradients")
    fit.add_argument("--ema-decay", type=float, metavar="DECAY", help="use an exponential average of the weights")
    fit.add_argument("--early-stopping", action="store_true", help="stop by the score on a tenth of the training rows")
    fit.add_argument("--seed", type=int, default=0, metavar="N")
    out = argparse.ArgumentParser(add_help=False)
    results = out.add_argument_group("results")
    results.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
    results.add_argument("--quiet", action="store_true", help="no progress bar")
    train = commands.add_parser(
        "train", parents=[common, text, out], help="train and evaluate a model; save it with its plots"
    )
    train.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    train.add_argument("--lr", type=_rate, metavar="LR", help="learning rate (default: the optimizer's)")
    train.add_argument("--checkpoint", type=Path, metavar="FILE", help="write checkpoints to this file; resume from it")
    train.add_argument(
        "--format", choices=["skops", "joblib"], default="skops",
        help="format of the model file (default skops); loading a joblib file can run code",
    )  # fmt: skip
    train.add_argument("--output", type=Path, metavar="DIR", help="default train-output, or train-output-2, ...")
    compare = commands.add_parser("compare", parents=[common, text, out], help="train one model with every optimizer")
    compare.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    compare.add_argument("--lrs", type=_rate, nargs="+", metavar="LR", help="rates to try (default 1e-4 1e-3 ... 1)")
    compare.add_argument("--output", type=Path, metavar="DIR", help="default compare-output, or compare-output-2, ...")
    predict = commands.add_parser("predict", parents=[text, out], help="predict with a model saved by train")
    predict.add_argument(
        "--model", type=Path, required=True, metavar="FILE",
        help="model.skops or model.joblib; loading a joblib file can run code: use only files you trust",
    )  # fmt: skip
    predict.add_argument("--data", required=True, metavar="SOURCE", help="as for train, with or without the target")
    predict.add_argument("--output", type=Path, required=True, metavar="FILE.csv")
    predict.add_argument("--probabilities", action="store_true", help="also write the probability of each class")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _several(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more, got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def _train(args: argparse.Namespace) -> int:
    if missing := _missing(["sklearn", "matplotlib", "pandas", "skops"]):
        print(f"fusedopt {args.command} needs {' and '.join(missing)}: {HOW_TO_INSTALL['train']}", file=sys.stderr)
        return 2
    try:
        if args.command == "predict":
            from .predict import predict

            return predict(args)
        from . import train

        return train.train(args) if args.command == "train" else train.compare(args)
    except (ValueError, TypeError, OSError, ImportError) as e:
        print(f"fusedopt {args.command}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fusedopt {args.command}: interrupted; nothing was saved", file=sys.stderr)
        return 130


HOW_TO_INSTALL = {extra: f"pip install '.[{extra}]' in a checkout of fusedopt" for extra in ("train", "bench", "torch")}
"""Extra -> command. There is no release on a package index yet."""


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _bench(args: argparse.Namespace) -> int:
    if missing := _missing(["torch", *(["matplotlib"] if args.plot else [])]):
        print(f"fusedopt bench needs {' and '.join(missing)}: {HOW_TO_INSTALL['bench']}", file=sys.stderr)
        return 2
    from fusedopt.bench import LARGE, gpu, render, run_suites, save

    suites = [s for s in SUITES if s != "short"] if "all" in args.suite else args.suite
    if "gpu" in suites and (why := gpu.missing()):
        print(f"fusedopt bench: skipped gpu: {why}", file=sys.stderr)
        suites = [s for s in suites if s != "gpu"]
        if not suites:
            return 2
    results = run_suites(
        suites,
        args.elements or LARGE,
        only=args.case,
        seconds=args.seconds,
        rounds=args.rounds,
        compiled=args.compile,
        with_peers=args.peers,
        progress=not args.quiet,
    )
    if not results:
        print(f"no case name contains {args.case!r}", file=sys.stderr)
        return 2
    print(render(results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        save(results, args.json)
    if args.plot:
        from fusedopt.plots import save_all

        print("\n" + "\n".join(str(path) for path in save_all(results, args.plot)))
    return 0


def _split_run(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments of ``run``: its own, and those of the script, which follow the script's name."""
    at = 1
    while at < len(argv) and argv[at].startswith("-"):
        at += 2 if argv[at] == "--report" else 1
    return list(argv[: at + 1]), list(argv[at + 1 :])


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if _missing(["torch"]):
        print(f"fusedopt run needs torch: {HOW_TO_INSTALL['torch']}", file=sys.stderr)
        return 2
    if not args.module and not Path(args.target).exists():
        print(f"fusedopt run: there is no {args.target}", file=sys.stderr)
        return 2
    from .run import run

    run(args.target, rest, module=args.module, report=args.report, quiet=args.quiet)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    rest: list[str] = []
    if argv[:1] == ["run"]:
        argv, rest = _split_run(argv)
    args = _parser().parse_args(argv)
    if args.command == "run":
        return _run(args, rest)
    if args.command == "bench":
        return _bench(args)
    if args.command in ("train", "compare", "predict"):
        return _train(args)
    import fusedopt

    fusedopt.show_config()
    return 0
