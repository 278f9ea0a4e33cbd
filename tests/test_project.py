"""The tree itself: who imports whom, names, sizes, versions, and what `import fastcontrast` costs.

These are the rules of docs/design.md that a reader of one file cannot see broken.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastcontrast"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Imports run from higher to lower or equal. A new file or folder of the package gets its line.
LAYERS = {
    "__main__": 6,
    "cli": 6,
    "train": 5,
    "": 4,  # fastcontrast/__init__.py, the public names
    "compat": 4,
    "distributed": 4,
    "doctor": 4,
    "losses": 4,
    "mining": 4,
    "patch_arguments": 4,
    "patch_draws": 4,
    "patch_modules": 4,
    "patch_records": 4,
    "patches": 4,
    "retrieval": 4,
    "temporal": 4,
    "transforms": 4,
    "ops": 3,
    "backends": 2,
    "_C": 1,
    "data": 0,  # readers, which know nothing of the rest
}
# Where alone a part of the package, or a library, may be imported.
IMPORTERS = {
    "fastcontrast": ("train/", "cli.py", "__main__.py"),
    "fastcontrast.train": ("train/", "cli.py"),
    "fastcontrast.data": ("data/", "train/", "cli.py"),
    "fastcontrast.doctor": ("cli.py",),
    "fastcontrast._C": ("backends/native/",),
    "triton": ("backends/triton/",),
    "matplotlib": ("train/", "cli.py"),
    "rich": ("train/", "cli.py"),
    "tyro": ("train/", "cli.py"),
    "safetensors": ("train/", "cli.py"),
    "pytorch_metric_learning": ("compat/pytorch_metric_learning.py",),
    "sentence_transformers": ("compat/sentence_transformers.py",),
    "torchvision": ("transforms.py",),
    "PIL": ("transforms.py", "data/image_folder.py"),
    "setuptools": (),
}
BANNED = {"utils", "util", "helper", "helpers", "misc", "common_utils", "v2", "impl2"}
BANNED_PREFIXES = ("fast_", "new_")
MAX_LINES = 450


def _files(*patterns: str) -> list[Path]:
    """The project's own files that match: what git would list, without asking git."""
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return sorted(p for p in found if "__pycache__" not in p.parts)


PACKAGE_FILES = _files("fastcontrast/**/*.py")
PYTHON = [*PACKAGE_FILES, *_files("tests/**/*.py", "benchmarks/**/*.py", "setup.py")]
NATIVE = _files("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in PACKAGE_FILES} | {"fastcontrast._C"}


def _imports(source: str, package: str) -> set[str]:
    """Modules that ``source`` imports anywhere, functions and TYPE_CHECKING blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in MODULES else base)
    return found


def _imports_of(path: Path) -> set[str]:
    module = _module(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return _imports(path.read_text(), package)


def _layer(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    assert part in LAYERS, f"{module} has no layer: give {part!r} one in tests/test_project.py"
    return LAYERS[part]


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
import torch.nn as nn
from fastcontrast import backends, info_nce_loss
from . import patches
from .ops.checks import check_choice
def later():
    from fastcontrast import _C
"""
    assert _imports(source, "fastcontrast") == {
        "torch.nn", "fastcontrast", "fastcontrast.backends", "fastcontrast.patches",
        "fastcontrast.ops.checks", "fastcontrast._C",
    }  # fmt: skip


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=_name)
def test_imports_run_one_way(path: Path) -> None:
    own = _layer(_module(path))
    for imported in _imports_of(path):
        if imported.split(".")[0] == "fastcontrast":
            assert _layer(imported) <= own, f"{_name(path)} imports {imported}, a layer above it"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=_name)
def test_imports_that_have_one_place(path: Path) -> None:
    where = path.relative_to(PACKAGE).as_posix()
    for imported in _imports_of(path):
        for restricted, places in IMPORTERS.items():
            inside = imported == restricted or (
                imported.startswith(restricted + ".") and restricted != "fastcontrast"
            )
            if inside:
                assert where.startswith(places or ("nowhere",)), (
                    f"{where} imports {imported}; only {', '.join(places) or 'no file'} may"
                )


def test_no_pytorch_header_in_native_code() -> None:
    for path in NATIVE:
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        foreign = [i for i in includes if re.match(r"(torch|ATen|c10|caffe2)/", i)]
        assert not foreign, f"{_name(path)} includes {foreign}"


def _opening(path: Path) -> bool:
    text = path.read_text()
    if path.suffix == ".py":
        return bool(ast.get_docstring(ast.parse(text)))
    if text.startswith("//"):
        return True
    # An implementation may leave it to its header, which it then includes first.
    header = path.with_suffix(".h")
    own = f'#include "{header.parent.name}/{header.name}"'
    return text.startswith(own) and header.exists() and _opening(header)


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=_name)
def test_a_file_says_first_what_it_is(path: Path) -> None:
    assert _opening(path), "open the file with one paragraph: what lives here, and who calls it"


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=_name)
def test_a_file_holds_one_concept(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < MAX_LINES, f"{lines} lines: there are two concepts in it"


def _defined_names(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)}


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=_name)
def test_names_say_what_a_thing_is(path: Path) -> None:
    names = {Path(part).stem for part in path.relative_to(ROOT).parts}
    if path.suffix == ".py":
        names |= _defined_names(path)
    for name in names:
        words = set(re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
        assert not words & BANNED, name
        assert not name.lstrip("_").startswith(BANNED_PREFIXES), name


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_of_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(
        re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
    )
    named = set(re.findall(r"(?:^|&& )make ([a-z]+)", code, re.MULTILINE))
    assert "test" in named or "install" in named
    assert named <= targets
    commands = set(re.findall(r"(?:^|\n| )fastcontrast ([a-z]+)", code))
    assert commands <= {"train", "eval", "embed", "plot", "data", "bench", "doctor"}
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), f"{document} links to {path}"
    extras = set(re.findall(r'"(?:\.|fastcontrast)\[([a-z]+)\]"', code))
    assert extras <= set(PYPROJECT["project"]["optional-dependencies"])


def test_one_version() -> None:
    version = PYPROJECT["project"]["version"]
    assert importlib.metadata.version("fastcontrast") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:2] in ([], [version]), "the newest release is not this version"


def test_checkers_are_pinned_once() -> None:
    pins = {p for p in PYPROJECT["project"]["optional-dependencies"]["dev"] if "==" in p}
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff", "clang-format"):
        used = set(re.findall(rf"\[({tool}==[\d.]+)\]", hooks))
        assert used
        assert used <= pins


_PARTS = """
import fastcontrast
assert all(hasattr(fastcontrast, name) for name in fastcontrast.__all__)
fastcontrast.distributed.gather, fastcontrast.mining.Triplets, fastcontrast.temporal.ClipSampler
"""


def test_import_brings_every_part_for_users() -> None:
    """In a process of its own: here other tests have imported them."""
    subprocess.run([sys.executable, "-c", _PARTS], check=True)


_COST = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import fastcontrast
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def test_import_is_cheap() -> None:
    """Under 0.2 s on top of torch's own import, in processor time: other programs do not count."""
    seconds, modules = [], set()
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _COST], capture_output=True, text=True, check=True
        )
        taken, added = json.loads(done.stdout)
        seconds.append(taken)
        modules |= {name.split(".")[0] for name in added}
    heavy = {"triton", "matplotlib", "tyro", "rich", "safetensors", "torchvision", "scipy"}
    assert not modules & heavy
    assert min(seconds) < 0.2, seconds


_WITHOUT_NATIVE = """
import sys
sys.modules["fastcontrast._C"] = None  # importing it raises ImportError, as if it was not built
import torch
import fastcontrast
from fastcontrast.backends import native
assert fastcontrast.available_backends() == ("reference",)
x = torch.eye(3, requires_grad=True)
loss = fastcontrast.info_nce_loss(x, torch.eye(3), metric="dot")
loss.backward()
assert abs(loss.item() - 0.55144) < 1e-4, loss  # log(1 + 2/e)
assert x.grad.isfinite().all()
patches = fastcontrast.random_patches(torch.zeros(2, 1, 8, 8), 3, 4, seed=0)
assert patches.data.shape == (2, 3, 1, 4, 4)
print(native.why_not("distance_softmax", x))
"""


def test_without_the_native_module_everything_runs_on_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_NATIVE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fastcontrast._C is not built" in done.stdout
    assert "FASTCONTRAST_NATIVE=require" in done.stdout
