"""The build: how setup.py reads its settings, what it leaves behind, and what the module holds.

Nothing is built here; `.ci/run` builds and installs in every way.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution, Extension

from fastcontrast.backends import native

ROOT = Path(__file__).resolve().parents[1]


def _load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = _load_setup()


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("9.0", "90-real"),
        ("9.0+PTX", "90-real;90-virtual"),
        ("8.0 9.0 10.0+PTX", "80-real;90-real;100-real;100-virtual"),
        ("8.0;9.0", "80-real;90-real"),
        ("8.0, 9.0", "80-real;90-real"),
        (" 8.0;9.0; ", "80-real;90-real"),
        ("9.0a 10.0f+PTX", "90a-real;100f-real;100f-virtual"),
        ("12.0", "120-real"),
        ("9.0 9.0 9.0+PTX", "90-real;90-virtual"),
    ],
)
def test_architectures_in_torchs_form(arch_list: str, expected: str) -> None:
    assert setup.cmake_architectures(arch_list) == expected


@pytest.mark.parametrize("entry", ["Hopper", "90", "9.0b", "9.0+ptx", "sm_90", "9.0-real", "9.00"])
def test_an_architecture_in_another_form_is_named(entry: str) -> None:
    with pytest.raises(SystemExit, match=rf"TORCH_CUDA_ARCH_LIST: {re.escape(repr(entry))}"):
        setup.cmake_architectures(f"8.0 {entry}")


@pytest.mark.parametrize("arch_list", ["", " ", ";"])
def test_an_empty_list_of_architectures_is_an_error(arch_list: str) -> None:
    with pytest.raises(SystemExit, match="names no architecture"):
        setup.cmake_architectures(arch_list)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"compute_75", "compute_80", "compute_90", "compute_100"}, "8.0 9.0 10.0+PTX"),
        ({"compute_80", "compute_90"}, "8.0 9.0+PTX"),  # CUDA 12.0 to 12.7
        ({"compute_90", "compute_100", "compute_120"}, "9.0 10.0+PTX"),
    ],
)
def test_default_architectures_are_those_that_nvcc_knows(known: set[str], expected: str) -> None:
    assert setup.default_arch_list(known) == expected


def test_no_default_architecture_is_a_build_error() -> None:
    with pytest.raises(setup.BuildError, match="TORCH_CUDA_ARCH_LIST"):
        setup.default_arch_list({"compute_70"})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, "auto"), ({"X": ""}, "auto"), ({"X": "REQUIRE"}, "require"), ({"X": " off "}, "off")],
)
def test_choices(environ: dict[str, str], expected: str) -> None:
    assert setup.choice(environ, "X", ("auto", "require", "off")) == expected


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(SystemExit, match="X='yes' is none of auto, on, off"):
        setup.choice({"X": "yes"}, "X", ("auto", "on", "off"))


def _program(path: Path, text: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


posix = pytest.mark.skipif(os.name != "posix", reason="writes shell scripts")


@posix
def test_nvcc_is_looked_for_in_this_order(tmp_path: Path) -> None:
    named = _program(tmp_path / "named")
    home = _program(tmp_path / "home" / "bin" / "nvcc")
    on_path = _program(tmp_path / "path" / "nvcc")
    environ = {"CUDACXX": str(named), "CUDA_HOME": str(tmp_path / "home")}
    environ["PATH"] = str(tmp_path / "path")
    assert setup.find_nvcc(environ) == str(named)
    del environ["CUDACXX"]
    assert setup.find_nvcc(environ) == str(home)
    environ["CUDA_PATH"] = environ.pop("CUDA_HOME")
    assert setup.find_nvcc(environ) == str(home)
    del environ["CUDA_PATH"]
    assert setup.find_nvcc(environ) == str(on_path)


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_a_variable_that_names_no_nvcc_is_named(variable: str, tmp_path: Path) -> None:
    with pytest.raises(setup.BuildError, match=f"{variable} is "):
        setup.find_nvcc({variable: str(tmp_path / "absent"), "PATH": os.defpath})


@posix
def test_an_nvcc_that_does_not_run_is_a_build_error(tmp_path: Path) -> None:
    with pytest.raises(setup.BuildError, match="does not run"):
        setup.nvcc_architectures(str(_program(tmp_path / "nvcc", "exit 1")))
    with pytest.raises(setup.BuildError, match="does not run"):
        setup.nvcc_architectures(str(tmp_path / "absent"))


@posix
def test_options_of_a_build_with_nvcc(tmp_path: Path) -> None:
    nvcc = str(_program(tmp_path / "nvcc", "echo compute_80; echo compute_90"))
    assert setup.cuda_options(nvcc, {}) == [
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real;90-virtual",
    ]
    options = setup.cuda_options(nvcc, {"TORCH_CUDA_ARCH_LIST": "9.0a"})
    assert options[1] == "-DCMAKE_CUDA_ARCHITECTURES=90a-real"


def _command(build_lib: Path) -> object:
    extension = Extension("fastcontrast._C", sources=[])
    command = setup.CMakeBuild(Distribution({"ext_modules": [extension]}))
    command.build_lib = str(build_lib)
    command.extensions = [extension]
    return command


@pytest.mark.parametrize("editable", [False, True])
def test_a_skipped_module_leaves_no_older_one(
    editable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(setup, "say_last", said.append)
    monkeypatch.setattr(setup, "ROOT", tmp_path / "checkout")
    command = _command(tmp_path / "lib")
    command.editable_mode = editable
    name = command.get_ext_filename("fastcontrast._C")
    stale = [tmp_path / "lib" / name, tmp_path / "checkout" / name]
    for path in stale:
        path.parent.mkdir(parents=True)
        path.touch()
    command.skip("no compiler", "install one.")
    # The checkout's module belongs to its editable installation: a wheel does not take it.
    assert [path.exists() for path in stale] == [False, not editable]
    assert command.extensions == []
    assert "NOT built" in said[0]
    assert "reason: no compiler" in said[0]
    assert "remedy: install one." in said[0]


@pytest.mark.parametrize(
    ("native_mode", "cuda", "said"),
    [
        ("require", "auto", "FASTCONTRAST_NATIVE=require, but no compiler"),
        ("auto", "on", "FASTCONTRAST_CUDA=on, but no compiler"),
        ("auto", "auto", None),
    ],
)
def test_a_failed_build_is_an_error_where_someone_insists(
    native_mode: str, cuda: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise setup.BuildError("no compiler")

    monkeypatch.setenv("FASTCONTRAST_NATIVE", native_mode)
    monkeypatch.setenv("FASTCONTRAST_CUDA", cuda)
    monkeypatch.setattr(setup.build_ext, "run", fail)
    last: list[str] = []
    monkeypatch.setattr(setup, "say_last", last.append)
    command = _command(tmp_path)
    if said is None:
        command.run()
        assert "reason: no compiler" in last[0]
        return
    with pytest.raises(SystemExit, match=said):
        command.run()


def test_cmake_forgets_its_cache_and_keeps_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTCONTRAST_BUILD_DIR", raising=False)
    command = _command(tmp_path / "lib")
    command.build_temp = str(tmp_path / "temp")
    kept = tmp_path / "temp" / "CMakeFiles" / "kernels_portable.dir" / "a.o"
    gone = [tmp_path / "temp" / name for name in ("CMakeCache.txt", "CMakeFiles/4.1.0/found.cmake")]
    for path in (kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert command.build_dir() == tmp_path / "temp"
    assert kept.exists()
    assert not any(path.exists() for path in gone)
    monkeypatch.setenv("FASTCONTRAST_BUILD_DIR", str(tmp_path / "chosen"))
    assert command.build_dir() == tmp_path / "chosen"


@pytest.mark.skipif(
    os.environ.get("FASTCONTRAST_NATIVE") != "require", reason="FASTCONTRAST_NATIVE is not require"
)
def test_the_required_module_is_there() -> None:
    assert native.IMPORT_PROBLEM is None


# VEX and EVEX instructions, as objdump writes them: wide registers, masks, or a v before the name.
BEYOND_X86_64 = re.compile(r"%[yz]mm|%k[0-7]|\tv\w+ .*%xmm")


def _tile_units() -> list[str]:
    """Namespaces for AMX as they are mangled; amx_emulated is portable code."""
    return ["3amx"] if "amx" in native._C.BF16_UNITS_BUILT else []


def test_wide_instructions_stay_in_the_copies_made_for_them() -> None:
    """The module runs on any x86-64 only if nothing outside avx2, avx512 and amx needs more.

    An inline function shared by the copies would be one symbol, and the linker keeps any of them.
    """
    if native.IMPORT_PROBLEM is not None:
        pytest.skip(native.IMPORT_PROBLEM)
    path = native._C.__file__
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    with subprocess.Popen(
        [objdump, "-d", "--no-show-raw-insn", path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if "x86-64" not in "".join(next(process.stdout) for _ in range(2)):
            process.kill()
            pytest.skip("not a module for x86-64")
        symbol, found = "", dict.fromkeys(("avx2", "avx512", *_tile_units()), 0)
        astray: set[str] = set()
        for line in process.stdout:
            if line.endswith(">:\n"):
                symbol = line.split("<", 1)[1][:-3]
            elif BEYOND_X86_64.search(line):
                copy = next((isa for isa in found if isa in symbol), None)
                if copy is None:
                    astray.add(symbol)
                else:
                    found[copy] += 1
    assert not astray
    assert all(found.values()), found  # otherwise the pattern finds nothing, and proves nothing
