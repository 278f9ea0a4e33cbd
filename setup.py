"""Build of the native module ``fastcontrast._C`` by CMake and ninja; metadata is in pyproject.toml.

FASTCONTRAST_NATIVE=auto|require|off  auto skips the module with a message when it cannot be built
FASTCONTRAST_CUDA=auto|on|off         CUDA kernels: when an nvcc is found, always, never
TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX"    GPU architectures (default: 8.0 9.0 10.0+PTX)
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0 9.0 10.0+PTX"
SKIPPED = """\
fastcontrast: the native module was NOT built; this install is pure Python and slower.
  reason: {reason}
  remedy: install a C++17 compiler (Debian and Ubuntu: apt install g++; macOS: xcode-select
          --install; Windows: Visual Studio Build Tools), then reinstall fastcontrast.
  `fastcontrast doctor` shows which backend runs each op."""


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default).lower()
    if value not in allowed:
        raise SystemExit(f"{name}={value!r} is not one of {', '.join(allowed)}")
    return value


def cmake_architectures(arch_list: str) -> str:
    """Translate torch's "8.0 9.0a+PTX" into CMake's "80-real;90a-real;90a-virtual"."""
    result = []
    for entry in re.split(r"[ ;,]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {entry!r} is not of the form 9.0, 9.0a or 9.0+PTX")
        number = "".join(match.group(1, 2, 3))
        result.append(f"{number}-real")
        if match.group(4):
            result.append(f"{number}-virtual")
    return ";".join(result)


class CMakeBuild(build_ext):
    def run(self):
        mode = choice("FASTCONTRAST_NATIVE", "auto", ("auto", "require", "off"))
        if mode == "off":
            return self.skip("FASTCONTRAST_NATIVE=off")
        try:
            super().run()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if mode == "require":
                raise SystemExit(
                    f"FASTCONTRAST_NATIVE=require, but the build failed: {error}"
                ) from error
            self.skip(str(error))

    def skip(self, reason: str):
        self.extensions = []
        print(SKIPPED.format(reason=reason), file=sys.stderr, flush=True)

    def build_extension(self, ext):
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not on PATH")
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cuda = choice("FASTCONTRAST_CUDA", "auto", ("auto", "on", "off"))
        arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTCONTRAST_OUTPUT_DIR={module.parent}",
            f"-DFASTCONTRAST_CUDA={cuda}",
            f"-DFASTCONTRAST_CUDA_ARCHITECTURES={cmake_architectures(arch_list)}",
        ]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        else:
            print("fastcontrast: ninja is not on PATH; building with make, one file at a time")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir)], check=True)
        if not module.exists():
            raise RuntimeError(f"the build did not produce {module}")


setup(
    ext_modules=[Extension("fastcontrast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
