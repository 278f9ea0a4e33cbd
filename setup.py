"""Build of the native module ``fastcontrast._C`` by CMake and ninja; metadata is in pyproject.toml.

FASTCONTRAST_NATIVE=auto|require|off  auto: where it cannot be built, a pure-Python install
FASTCONTRAST_CUDA=auto|on|off         CUDA kernels: where an nvcc builds them, always, never
TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX"    GPU architectures (default: those of 8.0 9.0 10.0 that nvcc
                                      knows, and PTX of the last)
FASTCONTRAST_BUILD_DIR=FOLDER         where objects are kept, for the next build to start from
CXX, CXXFLAGS, CUDACXX, CUDA_HOME     as everywhere
"""

import atexit
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")
NO_NVCC = (
    "no nvcc found; install the CUDA toolkit and put its bin folder on PATH, "
    "or name it by CUDA_HOME or CUDACXX"
)
BUILT = """\
fastcontrast: the native module was built.
  CPU kernels:  {cpu}
  CUDA kernels: {cuda}"""
SKIPPED = """\
fastcontrast: the native module was NOT built; this install is pure Python and slower.
  reason: {reason}
  remedy: {remedy}
  `fastcontrast doctor` shows which backend runs each op."""
REMEDY = """\
install a C++17 compiler and Python's headers (Debian and Ubuntu: apt install g++
          python3-dev; macOS: xcode-select --install; Windows: Visual Studio Build Tools), then
          reinstall fastcontrast; FASTCONTRAST_NATIVE=require shows the build's errors."""


class BuildError(RuntimeError):
    """The native module cannot be built; the message is one line for the person who installs."""


def choice(environ: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """Value of an environment variable; the first allowed one if it is unset or empty."""
    value = environ.get(name, "").strip().lower() or allowed[0]
    if value not in allowed:
        raise SystemExit(f"{name}={environ[name]!r} is none of {', '.join(allowed)}")
    return value


def cmake_architectures(arch_list: str) -> str:
    """Translate torch's "8.0 9.0a+PTX" into CMake's "80-real;90a-real;90a-virtual"."""
    result: list[str] = []
    for entry in filter(None, re.split(r"[\s;,]+", arch_list)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not of the form 9.0, 9.0a or 9.0+PTX"
            )
        number = "".join(match.group(1, 2, 3))
        result.append(f"{number}-real")
        if match.group(4):
            result.append(f"{number}-virtual")
    if not result:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST={arch_list!r} names no architecture")
    return ";".join(dict.fromkeys(result))


def default_arch_list(known: set[str]) -> str:
    """The default architectures among those that nvcc knows, in torch's form."""
    usable = [a for a in DEFAULT_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    if not usable:
        raise BuildError(
            f"nvcc knows none of the architectures {' '.join(DEFAULT_ARCHITECTURES)}; "
            "name others by TORCH_CUDA_ARCH_LIST"
        )
    return " ".join(usable) + "+PTX"


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """Path of nvcc: CUDACXX, then CUDA_HOME or CUDA_PATH, then PATH, then the usual folder.

    A variable that is set and names none is an error: another nvcc is not what was asked for.
    """
    path = environ.get("PATH", os.defpath)
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        value = environ.get(variable)
        if value:
            program = value if variable == "CUDACXX" else str(Path(value, "bin", "nvcc"))
            nvcc = shutil.which(program, path=path)
            if nvcc is None:
                raise BuildError(f"{variable} is {value!r}, and there is no program {program}")
            return nvcc
    return shutil.which("nvcc", path=path) or shutil.which("/usr/local/cuda/bin/nvcc")


def nvcc_architectures(nvcc: str) -> set[str]:
    """What ``nvcc --list-gpu-arch`` prints: {"compute_80", ...}; also the proof that it runs."""
    try:
        done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} does not run, or is older than CUDA 11.1") from error
    return set(done.stdout.split())


def cuda_options(nvcc: str, environ: Mapping[str, str]) -> list[str]:
    """CMake's arguments for a build with ``nvcc``."""
    known = nvcc_architectures(nvcc)
    arch_list = environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or default_arch_list(known)
    return [
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={cmake_architectures(arch_list)}",
    ]


def run(step: str, command: list[str]) -> None:
    sys.stdout.flush()
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{step} failed; the output above this says why") from error


def say_last(text: str) -> None:
    """Print when the process ends, so that the copying of files does not scroll it away."""
    atexit.register(print, text, file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Configure and build the one extension; skip it where that fails and nobody insists."""

    def run(self):
        mode = choice(os.environ, "FASTCONTRAST_NATIVE", ("auto", "require", "off"))
        cuda = choice(os.environ, "FASTCONTRAST_CUDA", ("auto", "on", "off"))
        if mode == "off":
            self.skip("FASTCONTRAST_NATIVE=off", "unset it and reinstall fastcontrast.")
        try:
            super().run()
        except BuildError as error:
            if mode == "require":
                raise SystemExit(f"FASTCONTRAST_NATIVE=require, but {error}") from error
            if cuda == "on":
                raise SystemExit(f"FASTCONTRAST_CUDA=on, but {error}") from error
            self.skip(str(error), REMEDY)

    def skip(self, reason: str, remedy: str) -> None:
        # What an earlier build left would be taken for the module that this one does without.
        folders = [Path(self.build_lib)]
        if self.inplace or self.editable_mode:
            folders.append(ROOT)
        for ext in self.extensions:
            for folder in folders:
                (folder / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        self.extensions = []
        say_last(SKIPPED.format(reason=reason, remedy=remedy))

    def build_extension(self, ext):
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = choice(os.environ, "FASTCONTRAST_CUDA", ("auto", "on", "off"))
        reason = "FASTCONTRAST_CUDA=off"
        if cuda != "off":
            try:
                nvcc = find_nvcc(os.environ)
                if nvcc is None:
                    raise BuildError(NO_NVCC)
                options = cuda_options(nvcc, os.environ)
                return self.cmake(module, ["-DFASTCONTRAST_CUDA=ON", *options])
            except BuildError as error:
                if cuda == "on":
                    raise
                reason = str(error)
                print(f"fastcontrast: building without CUDA kernels: {reason}", flush=True)
        return self.cmake(module, ["-DFASTCONTRAST_CUDA=OFF"], f"none ({reason})")

    def cmake(self, module: Path, options: list[str], without_cuda: str = "") -> None:
        try:
            import pybind11
        except ImportError as error:
            raise BuildError("pybind11 is not installed (pip install pybind11)") from error
        cmake = shutil.which("cmake")
        if cmake is None:
            raise BuildError("cmake is not on PATH (pip install cmake)")
        build_dir = self.build_dir()
        module.unlink(missing_ok=True)
        command = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTCONTRAST_OUTPUT_DIR={module.parent}",
            # A checkout runs the tests, and the AMX kernels' need no AMX on emulated tiles.
            f"-DFASTCONTRAST_AMX_EMULATION={'ON' if self.editable_mode else 'OFF'}",
            *options,
        ]
        build = [cmake, "--build", str(build_dir)]
        if shutil.which("ninja"):
            command.append("-GNinja")
        elif os.name == "posix":
            command.append("-GUnix Makefiles")
            build += ["--parallel", str(os.cpu_count() or 1)]
        run("configuration by CMake", command)
        run("compilation", build)
        if not module.exists():
            raise BuildError(f"the build did not produce {module}")
        facts = dict(
            line.split(": ", 1) for line in (build_dir / "summary.txt").read_text().splitlines()
        )
        say_last(BUILT.format(cpu=facts["cpu"], cuda=without_cuda or facts["cuda"]))

    def build_dir(self) -> Path:
        """Folder of CMake's files, with what the last configuration found removed from it.

        An isolated build has ninja, pybind11 and Python in a new folder every time, and CMake
        would trust its cache; objects stay, so that ninja compiles only what changed.
        """
        if chosen := os.environ.get("FASTCONTRAST_BUILD_DIR"):
            folder = Path(chosen).resolve()
        elif (
            self.editable_mode
        ):  # setuptools names a temporary folder, which would lose the objects
            folder = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        else:
            folder = Path(self.build_temp).resolve()
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        for found in folder.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(found)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fastcontrast._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
