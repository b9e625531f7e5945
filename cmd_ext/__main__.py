"""The command line: python -m cmd_ext compress, search, inspect, report, eval, profile, doctor, gpu-check, demo."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import cmd_ext
from cmd_ext import data, demo, html_report, models, report, uniform
from cmd_ext.calibrate import accuracy, outputs
from cmd_ext.compress import SEARCHES
from cmd_ext.sensitivity import BUDGETS, check_picture

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"cmd_ext {args.command}: {error}", file=sys.stderr)
        return 1
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cmd_ext", description="Low-rank plus sparse network compression")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def trials(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--trials", type=int, default=50, help="of --search cmd (default 50)")
        sub.add_argument("--checkpoint", help="of --search cmd: SQLite or journal file or database URL to go on from")

    def network(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--model", required=True, help="resnet56 and the like, torchvision:NAME, timm:NAME or module:callable"
        )
        sub.add_argument("--weights", type=Path, help="safetensors file of trained weights")
        sub.add_argument("--data", type=Path, required=True, help="ImageFolder, tar of one, or CIFAR-10 folder")
        sub.add_argument("--batch-size", type=int, default=128)
        sub.add_argument("--image-size", type=int, help="pixels, for images that are not all small (default 224)")
        sub.add_argument("--limit", type=int, help="use only this many test images")

    def limits(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--constraint",
            action="append",
            required=True,
            metavar="KIND=VALUE",
            help="e.g. params=30%%, latency=40%% (or ms), score_drop=0.01; may be repeated",
        )

    sub = command("compress", _compress, "compress, fine-tune, save and report")
    network(sub)
    limits(sub)
    sub.add_argument("--search", choices=SEARCHES, default="cmd")
    trials(sub)
    sub.add_argument("--form", default="auto", help="of k x k convolutions: auto, channel or spatial")
    sub.add_argument("--sparse-coefficient", type=float, help="share of S in the budget, for uniform")
    sub.add_argument("--calibration", type=int, default=512, help="training images that steer the allocation")
    sub.add_argument("--finetune-epochs", type=int, default=0)
    sub.add_argument("--lr", type=float, default=0.01)
    sub.add_argument(
        "--distill", type=float, default=0.5, help="weight of the distillation from the dense network, 0 to 1"
    )
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for model.safetensors, plan.json, report.txt, stats.json, report.html",
    )

    sub = command("search", _search, "rank and sparse coefficient of every layer: a plan, and the front around it")
    network(sub)
    limits(sub)
    trials(sub)
    sub.add_argument("--calibration", type=int, default=1024, help="training images that the trials are measured on")
    sub.add_argument("--at", action="append", default=[], metavar="KIND=VALUE", help="a plan for this limit too")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, required=True, help="folder for plan.json, plan-at-*.json and search.json")

    sub = command(
        "eval", _eval, "top-1 accuracy of a network: dense, saved by compress, or at one budget right after the fit"
    )
    network(sub)
    sub.add_argument("--compressed", type=Path, help="file written by compress or cmd_ext.save")
    sub.add_argument("--permute", type=int, metavar="SEED", help="--limit draws images at random, by this seed")
    sub.add_argument(
        "--budget",
        type=_share,
        help="compress every convolution of 3x3 and more but the first to this share of its values",
    )
    sub.add_argument(
        "--search", choices=SEARCHES, default="uniform", help="the same share for each of them, or one share of all"
    )
    trials(sub)
    sub.add_argument("--sparse-coefficient", type=float, help="share of S in a uniform budget (default 0.7)")
    sub.add_argument("--calibration", type=int, default=512, help="training images that the layers are fitted to")
    sub.add_argument("--no-data-aware", action="store_true", help="fit to the weights alone")
    sub.add_argument(
        "--sequential",
        type=int,
        nargs="?",
        const=1,
        metavar="LAYERS",
        help="fit to what compressed layers give",
    )
    sub.add_argument(
        "--recalibrate", choices=uniform.RECALIBRATE, default="auto", help="batch norms: auto goes by calibration loss"
    )
    sub.add_argument("--seed", type=int, default=0)

    sub = command("profile", _profile, "parameters, bytes, MACs and milliseconds per layer")
    sub.add_argument("--model", required=True)
    sub.add_argument("--compressed", type=Path, help="file written by compress or cmd_ext.save")
    sub.add_argument("--input", default="1x3x32x32", help="input shape (default 1x3x32x32)")

    sub = command("inspect", _inspect, "what each layer costs, and what it loses at several shares of its parameters")
    sub.add_argument("--model", required=True, help="as for compress")
    sub.add_argument("--weights", type=Path, help="safetensors file of trained weights")
    sub.add_argument("--data", type=Path, help="as for compress; without it errors are those of the weights")
    sub.add_argument("--calibration", type=int, default=256, help="training images that errors and losses are of")
    sub.add_argument("--batch-size", type=int, default=128)
    sub.add_argument("--image-size", type=int, help="pixels, for images that are not all small (default 224)")
    sub.add_argument("--input", help="shape of the call that is timed (default a batch of the data, else 1x3x32x32)")
    sub.add_argument("--budgets", nargs="+", type=_share, default=BUDGETS, help="shares like 30%% (default 5 to 50 %%)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--csv", type=Path, metavar="FILE", help="write a line for every layer and share")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write these, the costs of all layers and the reasons")
    sub.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw heat maps, .svg, .png or .pdf (matplotlib)")

    sub = command("report", _report, "a page of what compress did, without anything to load")
    sub.add_argument("--stats", type=Path, required=True, help="stats.json that compress wrote")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="file to write")
    sub.add_argument("--title", default="Compression report")

    command("doctor", _doctor, "what this installation has and lacks")
    sub = command("gpu-check", _gpu_check, "prove and time the CUDA kernels on this machine's GPU, in under 8 minutes")
    sub.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="report (default gpu-check.json)")
    sub.add_argument("--quick", action="store_true", help="fewer layers, ranks and densities")
    sub.add_argument("--seconds", type=float, default=450, help="time for all of it (default 450)")
    sub.add_argument("--device", default="cuda", help="e.g. cuda:1 (default cuda)")
    sub.add_argument("--parts", nargs="+", default=[], metavar="PART", help="only these, e.g. layers bench")
    sub.add_argument("--pytest", action="store_true", help="also run the checkout's operator tests on the GPU")
    sub.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    sub.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    sub = command("demo", demo.run, "train, compress, fine-tune and reload a small network on scikit-learn's digits")
    sub.add_argument("--out", type=Path, default=Path("build/demo"))
    sub.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    return parser


def _network(args: argparse.Namespace) -> torch.nn.Module:
    model = models.create(args.model)
    if args.weights:
        models.load_weights(model, args.weights)
    return model.eval()


def _dataset(args: argparse.Namespace, split: str):
    mean, std = models.NORMALIZATION.get(args.model, IMAGENET)
    return data.open_dataset(args.data, split, mean, std, args.image_size)


def _constraints(entries: list[str]) -> dict[str, str | float]:
    constraints: dict[str, str | float] = {}
    for entry in entries:
        kind, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"--constraint must be KIND=VALUE like params=30%, got {entry!r}")
        try:
            constraints[kind] = value if value.endswith("%") else float(value)
        except ValueError:
            raise ValueError(f"--constraint {kind} must be a number or a share like 30%, got {value!r}") from None
    return constraints


def _compress(args: argparse.Namespace) -> None:
    constraints = _constraints(args.constraint)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model, train, test = _network(args), _dataset(args, "train"), _dataset(args, "test")
    tests = data.loader(test, args.batch_size, limit=args.limit)
    calibration = list(data.loader(train, args.batch_size, shuffle=True, seed=args.seed, limit=args.calibration))

    def evaluate(network: torch.nn.Module) -> float:
        return accuracy(network, tests)

    result = cmd_ext.compress(
        model,
        calibration[0][0],
        constraints=constraints,
        calibration=calibration,
        evaluate=evaluate,
        search=args.search,
        n_trials=args.trials,
        checkpoint=args.checkpoint,
        sparse_coefficient=args.sparse_coefficient,
        form=args.form,
        seed=args.seed,
    )
    lines = [str(result.stats)]
    history: list[dict] = []
    if args.finetune_epochs:
        loader = data.loader(train, args.batch_size, shuffle=True, augment=True, seed=args.seed)
        history = cmd_ext.finetune(
            result.model,
            loader,
            epochs=args.finetune_epochs,
            lr=args.lr,
            teacher=model if args.distill else None,
            distill_weight=args.distill,
            evaluate=evaluate,
            clip_norm=5.0,
            checkpoint=args.out / "finetune.pt",
        )
        lines += [f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, score {row['score']:.4f}" for row in history]
    cmd_ext.save(result.model, args.out / "model.safetensors")
    report.write(args.out / "plan.json", result.plan.to_json())
    stats = {"stats": result.stats.to_dict(), "front": result.front, "trials": result.trials, "history": list(history)}
    report.write(args.out / "stats.json", json.dumps(stats, indent=2))
    report.write(args.out / "report.txt", "\n".join(lines) + "\n")
    report.write(args.out / "report.html", html_report.page(stats, f"{args.model}, {', '.join(args.constraint)}"))
    print("\n".join(lines))
    print(f"written to {args.out}")


def _search(args: argparse.Namespace) -> None:
    constraints, others = _constraints(args.constraint), [_constraints([entry]) for entry in args.at]
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model, train = _network(args), _dataset(args, "train")
    calibration = list(data.loader(train, args.batch_size, shuffle=True, seed=args.seed, limit=args.calibration))
    result = cmd_ext.compress(
        model,
        calibration[0][0],
        constraints=constraints,
        calibration=calibration,
        n_trials=args.trials,
        checkpoint=args.checkpoint,
        seed=args.seed,
    )
    plans = {"plan.json": result.plan}
    for entry, constraint in zip(args.at, others, strict=True):
        plans[f"plan-at-{entry.replace('%', '')}.json"] = result.at(**constraint)
    for name, plan in plans.items():
        report.write(args.out / name, plan.to_json())
    found = {"search": result.search, "front": result.front, "trials": result.trials}
    report.write(args.out / "search.json", json.dumps(found, indent=2))
    print(result.stats)
    print(f"\n{report.front(result.front)}\nwritten to {args.out}: {', '.join([*plans, 'search.json'])}")


def _share(text: str) -> float:
    """30% or 0.3."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share like 30% or 0.3, got {text!r}")
    return value


def _eval(args: argparse.Namespace) -> None:
    if args.budget is None and args.sparse_coefficient is not None:
        raise ValueError("--sparse-coefficient divides a budget, got it without --budget")
    if args.search != "uniform" and args.budget is None:
        raise ValueError(f"--search {args.search} divides a budget, got it without --budget")
    if args.search != "uniform" and args.sparse_coefficient is not None:
        raise ValueError(f"--search {args.search} chooses the sparse coefficients, got --sparse-coefficient too")
    if args.budget is not None and args.compressed:
        raise ValueError("--budget compresses a dense network, got --compressed too")
    torch.manual_seed(args.seed)
    model, test = _network(args), _dataset(args, "test")
    if args.compressed:
        model = cmd_ext.load(args.compressed, model).eval()
    tests = data.loader(test, args.batch_size, limit=args.limit, permute=args.permute)
    print(f"top-1 {100 * accuracy(model, tests):.2f} % of {min(len(test), args.limit or len(test))} images", flush=True)
    if args.budget is not None:
        _eval_budget(args, model, tests)


def _eval_budget(args: argparse.Namespace, model: torch.nn.Module, tests) -> None:
    train = _dataset(args, "train")
    calibration = list(data.loader(train, args.batch_size, shuffle=True, seed=args.seed, limit=args.calibration))
    trial = uniform.budget_trial(
        model,
        calibration,
        lambda network: accuracy(network, tests),
        budget=args.budget,
        search=args.search,
        sparse_coefficient=args.sparse_coefficient,
        data_aware=not args.no_data_aware,
        sequential=args.sequential,
        recalibrate=args.recalibrate,
        seed=args.seed,
        **({"n_trials": args.trials, "checkpoint": args.checkpoint} if args.search == "cmd" else {}),
    )
    (kept, whole), errors = trial.values, trial.output_errors.values()
    search = f"{trial.search_seconds:.1f} search, " if args.search != "uniform" else ""
    print(
        f"compressed: {kept} of {whole} values ({report.share(kept, whole)}) of {len(errors)} convolutions, "
        f"{len(errors) - len(trial.to_weights)} fitted to {sum(len(y) for _, y in calibration)} training images\n"
        f"mean output error {sum(errors) / max(1, len(errors)):.4f}\n"
        f"CPU seconds: {search}{trial.fit_seconds:.1f} fits, "
        f"{trial.total_seconds:.1f} with the passes over these images\n"
        f"without recalibration: top-1 {100 * trial.scores[0]:.2f} %"
    )
    if trial.losses is not None:
        verdict = "undone" if not trial.recalibrated else "kept" if args.recalibrate == "auto" else "kept regardless"
        before, after = trial.losses
        losses = f"calibration loss {before:.4f} > {after:.4f}"
        print(f"recalibration {verdict} ({losses}): top-1 {100 * trial.scores[1]:.2f} %")


def _input_of(text: str, model: torch.nn.Module) -> torch.Tensor:
    """Random numbers of a shape that the network takes."""
    try:
        inputs = torch.randn([int(size) for size in text.split("x")])
    except (ValueError, RuntimeError):
        raise ValueError(f"--input must be a shape like 1x3x32x32, got {text!r}") from None
    try:
        outputs(model, [(inputs, None)])
    except (ValueError, RuntimeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--input must be a shape that the network takes, got {text!r}: {reason}") from None
    return inputs


def _profile(args: argparse.Namespace) -> None:
    model = models.create(args.model)
    if args.compressed:
        model = cmd_ext.load(args.compressed, model)
    print(cmd_ext.profile(model, _input_of(args.input, model)))


def _inspect(args: argparse.Namespace) -> None:
    if args.plot:
        check_picture(args.plot)
    for file in filter(None, (args.csv, args.json, args.plot)):
        report.check_writable(file)
    torch.manual_seed(args.seed)
    model, calibration = _network(args), None
    inputs = _input_of(args.input or "1x3x32x32", model) if args.input or not args.data else None
    if args.data:
        train = _dataset(args, "train")
        calibration = list(data.loader(train, args.batch_size, shuffle=True, seed=args.seed, limit=args.calibration))
        inputs = calibration[0][0] if inputs is None else inputs
    rows = cmd_ext.sensitivity(model, inputs, calibration=calibration, budgets=args.budgets, seed=args.seed)
    print(f"{rows.profile}\n\n{rows}")
    if args.csv:
        report.write(args.csv, rows.to_csv())
    if args.json:
        content = {"profile": rows.profile.to_dict(), "sensitivity": rows, "skipped": rows.skipped}
        report.write(args.json, json.dumps(content, indent=2) + "\n")
    if args.plot:
        cmd_ext.plot_sensitivity(rows, args.plot)


def _report(args: argparse.Namespace) -> None:
    report.check_writable(args.out)
    try:
        content = json.loads(args.stats.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"report: --stats {args.stats} is not JSON: {error}") from None
    report.write(args.out, html_report.page(content, args.title))


def _doctor(_args: argparse.Namespace) -> None:
    from cmd_ext import _C, dispatch

    def version_of(*command: str) -> str:
        if not shutil.which(command[0]):
            return "not found"
        text = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
        return text[-1] if "nvcc" in command[0] and text else text[0] if text else "found"

    build = _C.build_info()
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    operators = sorted(name[9:] for name in registered if name.startswith("cmd_ext::") and name[9] != "_")
    devices = [d for d in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key("cmd_ext::lrs_conv2d", d)]
    extras = {
        "tqdm": "progress bars",
        "PIL": "image files",
        "matplotlib": "pictures",
        "torchvision": "its networks",
        "timm": "its networks",
    }
    kernels = f"for CUDA {build['cuda']}; `python -m cmd_ext gpu-check` proves and times them"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = {
        "cmd_ext": f"{cmd_ext.__version__} in {Path(cmd_ext.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none (CPU build)'}",
        "gpu": ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or "none visible",
        "CUDA kernels": kernels if dispatch.has_cuda_kernels() else "not in this build",
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; kernels run as {_C.cpu_capability()}",
        "built with": f"torch {build['torch']}, stable ABI {build['stable_abi']}",
        "compiler, CUDA": f"g++ {build['compiler']}, {build['cuda']}",
        "operators": f"{', '.join(operators)} on {' and '.join(devices)}",
        "compiler here": version_of("c++", "--version"),
        "nvcc here": version_of("nvcc", "--version"),
        "ninja here": version_of("ninja", "--version"),
        "missing extras": ", ".join(f"{name} ({use})" for name, use in extras.items() if not find_spec(name)) or "none",
    }
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


def _gpu_check(args: argparse.Namespace) -> int:
    from cmd_ext.gpu_check import command

    return command.run(args)


if __name__ == "__main__":
    sys.exit(main())
