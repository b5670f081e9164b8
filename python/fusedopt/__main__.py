"""The command line: ``fusedopt info`` says what was found, ``fusedopt bench`` measures this machine, ``fusedopt run``
trains with our optimizers in torch.optim's place."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

SUITES = {
    "bars": "the promised ratios, each with what was measured",
    "rules": "every rule in float32, 32M parameters",
    "formats": "Adam in every format, from the first cache to main memory",
    "shapes": "Adam on one tensor, on 1,000 tiny ones, on ResNet-50 and GPT-2 small",
    "bytes": "AdamW in the forms that move fewer bytes, against torch fused in float32",
    "numpy": "the NumPy functions against the best in-place NumPy",
    "training": "whole iterations of small networks",
    "denormals": "what denormal moments cost",
    "integrations": "DDP and FSDP2 in two processes, compiled iterations",
    "short": "every rule at 4M parameters, in less than a minute",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusedopt", description="Fused in-place optimizer steps.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, instruction sets, threads, and the libraries found")
    run = commands.add_parser(
        "run",
        help="run a training script with our optimizers in torch.optim's place",
        description="Runs a script, unchanged, with our optimizers in torch.optim's place; says at the end which of "
        "them ran, how many steps, fused or not and why, and the time per step.",
        usage="fusedopt run [--report FILE] [--quiet] (script.py | -m module) [argument ...]",
    )
    run.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON, too")
    run.add_argument("--quiet", action="store_true", help="no report on stderr")
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
    bench.add_argument("--case", default="", metavar="TEXT", help="only the cases whose name has this text in it")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    bench.add_argument("--plot", type=Path, metavar="DIR", help="draw the results as PNG files into this folder")
    length = bench.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="time for each case (default: by suite, 1.5 to 8)")
    length.add_argument("--rounds", type=int, help="exactly so many rounds for each case")
    bench.add_argument("--elements", type=int, metavar="N", help="size of a large tensor (default: 32M)")
    bench.add_argument("--compile", action="store_true", help="torch.compile(opt.step), too: minutes of compilation")
    bench.add_argument("--peers", action="store_true", help="other projects' optimizers, too, where installed")
    bench.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _bench(args: argparse.Namespace) -> int:
    if missing := _missing(["torch", *(["matplotlib"] if args.plot else [])]):
        print(f"fusedopt bench needs {' and '.join(missing)}: pip install fusedopt[bench]", file=sys.stderr)
        return 2
    from fusedopt.bench import LARGE, render, run_suites, save

    suites = [s for s in SUITES if s != "short"] if "all" in args.suite else args.suite
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
        print(f"no case has {args.case!r} in its name", file=sys.stderr)
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
    """What is ours of ``run``'s arguments, and what belongs to the script: all that follows its name."""
    at = 1
    while at < len(argv) and argv[at].startswith("-"):
        at += 2 if argv[at] == "--report" else 1
    return list(argv[: at + 1]), list(argv[at + 1 :])


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if _missing(["torch"]):
        print("fusedopt run needs torch: pip install fusedopt[torch]", file=sys.stderr)
        return 2
    if not args.module and not Path(args.target).exists():
        print(f"fusedopt run: there is no {args.target}", file=sys.stderr)
        return 2
    from fusedopt.torch_run import run

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
    import fusedopt

    fusedopt.show_config()
    return 0


if __name__ == "__main__":
    sys.exit(main())
