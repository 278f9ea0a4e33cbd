"""The ``fastcontrast`` command: reads flags, calls the training recipes, prints what came of it.

Everything is imported when its command runs, so that help, the version and ``doctor`` need neither
the train extras nor a wait. Errors of the user are one line and exit code 2.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

HELP = """\
usage: fastcontrast COMMAND [flags]

Contrastive and metric losses on distances, for PyTorch.

commands:
  train RECIPE    learn an embedding: triplet, spatial, semisup or temporal; see its --help
  eval RUN        linear layer, SVM and nearest neighbours on a run's frozen embeddings
  embed RUN       write a run's embeddings to an .npz file
  plot RUN        draw a run's pictures again
  data verify     what data set lies in a folder, and whether its files are as published
  bench           time, memory and error beside other libraries; in a clone of the project
  doctor          what is installed, which backend runs which op, and what is missing

options:
  -h, --help      show this message
  --version       show the version

Example:
  fastcontrast train semisup --steps 1500 --seed 1
"""

TRAIN_HELP = """\
usage: fastcontrast train RECIPE [flags]

recipes:
  triplet   triplet network: two images of one class against one of another
  spatial   spatial contrasting: patches without labels first, then few labels
  semisup   semi-supervised metric embedding: a few labels, the other images without
  temporal  time as the comparison: frames of sequences, without labels

Each recipe's --help lists its flags and presets. Without --data they train on the images of MNIST
that come with the package, temporal on sequences in which these move, in minutes.

Over several processes or GPUs, with the same flags; the batch size is that of all together:
  torchrun --nproc-per-node N -m fastcontrast train RECIPE [flags]
"""

DOCTOR_HELP = """\
usage: fastcontrast doctor

Show what is installed, which backend runs which op, and what is missing.
"""

RUN_HELP = """\
usage: fastcontrast eval RUN [--checkpoint last|best] [--device auto|cpu|cuda]
       fastcontrast embed RUN --out FILE.npz [--checkpoint last|best] [--device auto|cpu|cuda]
       fastcontrast plot RUN [--method pca|tsne|umap]

RUN is the folder of a run of fastcontrast train.

eval    trains a linear layer and a linear SVM on the frozen embeddings of the images whose labels
        the run had, lets nearest neighbours among them vote, and prints each test error with its
        protocol; of a run by folds, fold 0 is judged, and results.json has the mean over folds
embed   writes the embeddings of all training and test images with their labels
plot    draws curves, embedding, confusion matrix and nearest neighbours from the run's files; tsne
        and umap need pip install "fastcontrast[plots]", and leave the picture by pca beside theirs
"""

DATA_HELP = """\
usage: fastcontrast data verify DIR

Say which data sets lie in DIR, whether each file is whole and is the one that was published, and
how many images there are. Nothing is downloaded. Exit code 1 if a set cannot be read, or a file has
not the size that was published; other content of that size is said, with exit code 0.

known layouts, in DIR or in the folder in which torchvision keeps them:
  MNIST      train-images-idx3-ubyte, ... (IDX, plain or .gz)     DIR/MNIST/raw
  CIFAR-10   data_batch_1.bin, ... or the pickles data_batch_1    DIR/cifar-10-batches-bin, -py
  SVHN       train_32x32.mat, test_32x32.mat, extra_32x32.mat     DIR
  STL-10     train_X.bin, train_y.bin, unlabeled_X.bin, ...       DIR/stl10_binary
  pictures   DIR/train/<class>/, DIR/test/<class>/, or DIR/<class>/ alone; needs Pillow
"""

_TRAIN_PACKAGES = ("tyro", "rich", "matplotlib", "safetensors")
RECIPES = ("triplet", "spatial", "semisup", "temporal")
_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; the process's own if None.

    Returns:
        Exit code: 0 done, 1 failed while running, 2 wrong use or unusable input, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        match arguments:
            case []:
                print(HELP, end="", file=sys.stderr)
                return _USAGE
            case ["-h" | "--help" | "help", *_]:
                print(HELP, end="")
                return 0
            case ["--version"]:
                print(f"fastcontrast {_version()}")
                return 0
            case ["--version", other, *_]:
                return _fail(f"--version: takes no arguments, got {other!r}")
            case ["doctor", *flags]:
                return _doctor(flags)
            case ["bench", *flags]:
                return _bench(flags)
            case ["eval" | "embed" | "plot", *rest] if not rest or {"-h", "--help"} & {*rest}:
                print(RUN_HELP, end="", file=sys.stdout if rest else sys.stderr)
                return 0 if rest else _USAGE
            case ["eval" | "embed" | "plot" as command, *rest]:
                return _report(command, rest)
            case ["data", "verify", directory] if not directory.startswith("-"):
                return _verify(directory)
            case ["data"]:
                print(DATA_HELP, end="", file=sys.stderr)
                return _USAGE
            case ["data", "-h" | "--help", *_] | ["data", "verify", "-h" | "--help", *_]:
                print(DATA_HELP, end="")
                return 0
            case ["data", *_]:
                return _fail("data: the command is: fastcontrast data verify DIR")
            case ["train", recipe, *flags] if recipe in RECIPES:
                return _train(recipe, flags)
            case ["train"]:
                print(TRAIN_HELP, end="", file=sys.stderr)
                return _USAGE
            case ["train", "-h" | "--help", *_]:
                print(TRAIN_HELP, end="")
                return 0
            case ["train", other, *_]:
                return _fail(f"train: no recipe {other!r}; there are: {', '.join(RECIPES)}")
            case [other, *_]:
                return _fail(f"no command {other!r}; see fastcontrast --help")
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)
    return 0


def _doctor(flags: list[str]) -> int:
    if flags:
        if flags[0] in ("-h", "--help"):
            print(DOCTOR_HELP, end="")
            return 0
        return _fail(f"doctor: takes no arguments, got {flags[0]!r}")
    from fastcontrast.doctor import report

    print(report().rstrip("\n"))
    return 0


def _bench(flags: list[str]) -> int:
    """Hand over to benchmarks/suite.py of the clone that is installed, or that one stands in."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "benchmarks" / "suite.py").exists():
            sys.path.insert(0, str(root))
            return import_module("benchmarks.suite").main(flags)
    return _fail(
        "bench: the benchmark is not part of the package; clone the project, "
        'pip install -e ".[bench]" there, and run it there'
    )


def _verify(directory: str) -> int:
    from fastcontrast.data import describe, verify

    try:
        reports = verify(directory)
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error))
    for report in reports:
        print(report.title)
        width = max((len(str(file.path)) for file in report.files), default=0)
        for file in report.files:
            size = f"{file.size:>13,} bytes  " if file.size else " " * 21
            print(f"  {file.path!s:<{width}}  {size}{file.state}")
        print("  " + (describe(report.dataset) if report.dataset else f"error: {report.problem}"))
    states = {file.state for report in reports for file in report.files}
    whole = all(report.dataset for report in reports) and "other size" not in states
    return 0 if whole else _FAILED


def _train(recipe: str, flags: list[str]) -> int:
    missing = [name for name in _TRAIN_PACKAGES if not _importable(name)]
    if missing:
        return _fail(f'train needs {", ".join(missing)}: pip install "fastcontrast[train]"')
    from fastcontrast.train.loop import NonFiniteLossError
    from fastcontrast.train.ranks import LostRankError, process_group
    from fastcontrast.train.runs import RECIPES as CONFIGS
    from fastcontrast.train.settings import configure

    module = import_module(f"fastcontrast.train.{recipe}")
    try:
        config = configure(CONFIGS[recipe], module.HELP, flags)
        with process_group(config.device, config.rank_timeout):
            return _run_recipe(recipe, module, config)
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error))
    except (NonFiniteLossError, LostRankError) as error:
        return _fail(str(error), _FAILED)


def _run_recipe(recipe: str, module: Any, config: Any) -> int:
    from fastcontrast.train.ranks import is_first

    job = module.prepare(config)
    try:
        result = module.train(job)
    except OSError as error:  # what was to be written, as opposed to read
        advice = f"free space there, or make it writable, then {_continued(recipe, job.run)}"
        return _fail(f"{error}; {advice}", _FAILED)
    if is_first():
        module.show(job, result)
        _print_written(recipe, job.run, result)
    # Where a rank fails, torchrun ends the others: they leave rank 0 the time to write.
    return _INTERRUPTED if result.interrupted and is_first() else 0


def _report(command: str, arguments: list[str]) -> int:
    """Run ``eval``, ``embed`` or ``plot`` on a finished run."""
    missing = [name for name in _TRAIN_PACKAGES if not _importable(name)]
    if missing:
        return _fail(f'{command} needs {", ".join(missing)}: pip install "fastcontrast[train]"')
    choices = {"--checkpoint": ("last", "best"), "--device": ("auto", "cpu", "cuda")}
    if command == "embed":
        choices["--out"] = ()
    if command == "plot":
        choices = {"--method": ("pca", "tsne", "umap")}
    try:
        run, options = _parse_report(command, arguments, choices)
        from fastcontrast.train import reports
        from fastcontrast.train.progress import print_figures

        if command == "plot":
            for path in reports.plot_finished(run, options.get("--method", "pca")):
                print(path)
            return 0
        checkpoint, device = options.get("--checkpoint", "last"), options.get("--device", "auto")
        loaded = reports.load_run(run, checkpoint, device)
        if command == "eval":
            title = f"Test error on {loaded.job.dataset.name}, weights of {loaded.source}:"
            print_figures(reports.evaluate_run(loaded), title)
        else:
            for name, shape in reports.embed_run(loaded, Path(options["--out"])).items():
                print(f"{name}: {' x '.join(map(str, shape))}")
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error))
    return 0


def _parse_report(
    command: str, arguments: list[str], choices: dict[str, tuple[str, ...]]
) -> tuple[Path, dict[str, str]]:
    run, options, rest = None, {}, list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("-") and run is None:
            run = Path(flag + equals + value)
            continue
        if flag not in choices:
            raise ValueError(
                f"{command}: does not take {flag!r}; see fastcontrast {command} --help"
            )
        if not equals and not rest:
            raise ValueError(f"{command}: {flag} wants a value")
        value = value if equals else rest.pop(0)
        if choices[flag] and value not in choices[flag]:
            raise ValueError(f"{command}: {flag} is {value!r}; wanted {' or '.join(choices[flag])}")
        options[flag] = value
    if run is None:
        raise ValueError(f"{command}: wants the folder of a run")
    if "--out" in choices and "--out" not in options:
        raise ValueError(f"{command}: wants --out FILE.npz")
    return run, options


def _print_written(recipe: str, run: Any, result: Any) -> None:
    print("\nWritten:")
    for path in run.written:
        if path.exists():
            print(f"  {path}")
    if result.interrupted:
        print(f"\nStopped after step {result.step:,}. To continue:\n  {_continued(recipe, run)}")


def _continued(recipe: str, run: Any) -> str:
    again = ["fastcontrast", "train", recipe, "--resume", "--name", run.path.name]
    if run.path.parent != Path("runs"):
        again += ["--out-dir", str(run.path.parent)]
    return shlex.join(again)


def _importable(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


def _version() -> str:
    try:
        return metadata.version("fastcontrast")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _fail(message: str, code: int = _USAGE) -> int:
    print(f"fastcontrast: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
