"""The software model of AMX tiles itself: its arithmetic, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Writes the 3 × 5 result of C + A·B, A [3, 6], B [6, 5] in pairs, or does one forbidden thing.
PROGRAM = """
#define FASTCONTRAST_AMX_EMULATED_TILES
#include "cpu/amx_tiles.h"
#include <string.h>
using namespace fastcontrast::cpu;
int main(int, char** argv) {
  const char* what = argv[1];
  TileConfig config = {};
  config.palette = 1;
  const int rows[3] = {3, 3, 3}, bytes[3] = {20, 12, 20};  // C, A, B
  for (int t = 0; t < 3; ++t) { config.rows[t] = rows[t]; config.bytes_per_row[t] = bytes[t]; }
  if (!strcmp(what, "palette")) config.palette = 2;
  if (!strcmp(what, "rows")) config.rows[4] = 17, config.bytes_per_row[4] = 64;
  if (!strcmp(what, "bytes")) config.rows[4] = 16, config.bytes_per_row[4] = 68;
  if (!strcmp(what, "tiles")) config.rows[8] = 16, config.bytes_per_row[8] = 64;
  if (!strcmp(what, "inner")) config.bytes_per_row[1] = 16;
  if (!strcmp(what, "outer")) config.rows[1] = 2;
  if (strcmp(what, "unconfigured")) FC_TILE_LOADCONFIG(&config);
  float c[15];
  unsigned short a[24], b[30];
  if (fread(a, 2, 18, stdin) + fread(b, 2, 30, stdin) + fread(c, 4, 15, stdin) != 63) return 2;
  FC_TILE_LOAD(0, c, 20);
  FC_TILE_LOAD(1, a, 12);
  FC_TILE_LOAD(2, b, 20);
  if (!strcmp(what, "same")) FC_TILE_DPBF16PS(0, 1, 1);
  FC_TILE_DPBF16PS(0, 1, 2);
  FC_TILE_STORE(0, c, 20);
  FC_TILE_RELEASE();
  if (!strcmp(what, "released")) FC_TILE_ZERO(0);
  return fwrite(c, 4, 15, stdout) == 15 ? 0 : 3;
}
"""
REFUSED = {
    "palette": "palette 1",
    "rows": "more than 16 rows",
    "bytes": "more than 64 bytes",
    "tiles": "there are 8 tiles",
    "inner": "pairs of left and rows of right differ",
    "outer": "rows of result and left differ",
    "unconfigured": "without a configuration",
    "released": "without a configuration",
    "same": "the same tile",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next(
        (c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None
    )
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("tiles")
    source, binary = folder / "tiles.cpp", folder / "tiles"
    source.write_text(PROGRAM)
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(binary)]
    subprocess.run(command, check=True)
    return binary


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = torch.randn(3, 6).bfloat16(), torch.randn(6, 5).bfloat16()
    a[0, 0] = 1e-39  # denormal: counts as 0
    b[0, 0] = 1e38
    return a, b, torch.randn(3, 5)


def stream(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> bytes:
    pairs = b.view(3, 2, 5).transpose(1, 2).contiguous()  # [pair of depth, column, 2]
    parts = (a.contiguous().view(torch.int16), pairs.view(torch.int16), c)
    return b"".join(part.numpy().tobytes() for part in parts)


def test_a_product_of_tiles(program: Path) -> None:
    a, b, c = operands()
    done = subprocess.run([program, ""], input=stream(a, b, c), capture_output=True, check=True)
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(3, 5)
    a[0, 0] = 0.0
    size = a.double().abs() @ b.double().abs() + c.double().abs()
    error = (found.double() - (c.double() + a.double() @ b.double())).abs()
    assert bool((error <= 5 * 2.0**-24 * size).all())  # three products in a row, two additions


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_processor_would_refuse(what: str, program: Path) -> None:
    done = subprocess.run([program, what], input=stream(*operands()), capture_output=True)
    assert done.returncode < 0
    assert REFUSED[what] in done.stderr.decode()
