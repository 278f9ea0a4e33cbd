"""Products of bfloat16 operands with float32 results, against float64, on every unit."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess

import pytest
import torch
from bf16_units import on_every_unit
from torch import Tensor

from fastcontrast.backends import native

if native.IMPORT_PROBLEM is None:
    from fastcontrast.backends.native.products import Bf16Products

# Blocks are 32 × 32 × 32 of panels of 16. One value per regime, none a multiple of the others.
SHAPES = {
    "no rows": (0, 5, 3),
    "no columns": (5, 0, 3),
    "no dimensions": (3, 5, 0),
    "one": (1, 1, 1),
    "panel minus one": (15, 31, 15),
    "panel": (16, 16, 32),
    "panel plus one": (17, 33, 33),
    "block": (32, 64, 32),
    "ragged": (67, 131, 50),
    "deep": (40, 50, 700),  # more than one panel of depth
    "wide": (45, 2085, 20),  # more than one packing of weights
    "tall": (530, 70, 9),
}


def in_terms(x: Tensor, terms: int) -> Tensor:
    """What one term holds, in float64; two terms are compared with the value itself."""
    return x.bfloat16().double() if terms == 1 else x.double()


def assert_product(value: Tensor, left: Tensor, right: Tensor, terms: int) -> None:
    """Every element within the worst case of left @ right, |left| @ |right| being its unit.

    A sum of `depth` exact products of float32 rounds at most depth + 2 times (sums are kept in
    several lanes, and results added to). Two terms leave out low·low, 2^-16, and hold either
    operand within 2^-17.
    """
    size = left.abs() @ right.abs()
    rounding = (terms * left.shape[1] + 2) * 2.0**-24
    bound = (rounding + (0.0 if terms == 1 else 2.0**-15)) * size
    excess = (value.double() - left @ right).abs() - bound
    assert excess.numel() == 0 or excess.max().item() <= 0


def all_products(
    x: Tensor, y: Tensor, weights: Tensor, terms: int, tile: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, both gradients, row and column sums of the weights, tile by tile."""
    (m, n), products = weights.shape, Bf16Products(x, y, terms)
    scores = torch.full((m, n), torch.nan)
    grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
    for row in range(0, m, tile[0]):
        for column in range(0, n, tile[1]):
            rows = slice(row, min(row + tile[0], m))
            columns = slice(column, min(column + tile[1], n))
            out = torch.full((rows.stop - row, columns.stop - column), torch.nan)
            products.scores(rows, columns, out)
            scores[rows, columns] = out
            products.add_gradients(
                weights[rows, columns].contiguous(), rows, columns, grad_x, grad_y
            )
    row_sum, column_sum = products.finish(grad_y) or (torch.zeros(m), torch.zeros(n))
    return scores, grad_x, grad_y, row_sum, column_sum


@on_every_unit
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("tile", [(512, 4096), (64, 96)])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: str, tile: tuple[int, int], terms: int, unit: str) -> None:
    m, n, d = SHAPES[shape]
    x, y, weights = torch.randn(m, d), torch.randn(n, d), torch.randn(m, n)
    scores, grad_x, grad_y, row_sum, column_sum = all_products(x, y, weights, terms, tile)
    xt, yt, wt = (in_terms(value, terms) for value in (x, y, weights))
    assert_product(scores, xt, yt.T, terms)
    assert_product(grad_x, wt, yt, terms)
    assert_product(grad_y, wt.T, xt, terms)
    if d == 0:  # no gradients, and so no sums
        return
    if terms == 2:  # sums are of the two terms, each within 2^-17
        held = weights.bfloat16().float()
        wt = (held + (weights - held).bfloat16().float()).double()
    # At most 256 values are added in float32.
    assert bool(((row_sum - wt.sum(1)).abs() <= 256 * 2.0**-24 * wt.abs().sum(1)).all())
    assert bool(((column_sum - wt.sum(0)).abs() <= 256 * 2.0**-24 * wt.abs().sum(0)).all())


@on_every_unit
@pytest.mark.parametrize("dim", [64, 128, 512])
def test_two_terms_hold_scores_to_5e_6_of_the_largest(dim: int, unit: str) -> None:
    """With a column near every row, as positives are; the largest score is then of size ‖x‖²."""
    x, y = torch.randn(150, dim), torch.randn(1100, dim)
    y[:150] = x + 0.3 * y[:150]
    scores = torch.empty(150, 1100)
    Bf16Products(x, y, 2).scores(slice(0, 150), slice(0, 1100), scores)
    truth = x.double() @ y.double().T
    assert (scores.double() - truth).abs().max() <= 5e-6 * truth.abs().max()


@on_every_unit
@pytest.mark.parametrize("terms", [1, 2])
def test_thread_counts_are_bit_equal(terms: int, unit: str) -> None:
    x, y, weights = torch.randn(300, 70), torch.randn(1500, 70), torch.randn(300, 1500)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(all_products(x, y, weights, terms, (512, 4096)))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@on_every_unit
def test_results_are_added_to_what_is_there(unit: str) -> None:
    """Near pairs are in the gradients before the products."""
    x, y, weights = torch.randn(40, 33), torch.randn(50, 33), torch.randn(40, 50)
    grad_x, grad_y = torch.full_like(x, 100.0), torch.full_like(y, -100.0)
    products = Bf16Products(x, y, 1)
    products.add_gradients(weights, slice(0, 40), slice(0, 50), grad_x, grad_y)
    products.finish(grad_y)
    rounded = in_terms(weights, 1)
    for value, start, product in (
        (grad_x, 100.0, rounded @ in_terms(y, 1)),
        (grad_y, -100.0, rounded.T @ in_terms(x, 1)),
    ):
        # Numbers of the size of 100 to 200, rounded to float32 a few times.
        assert (value.double() - start - product).abs().max() < 8 * 200 * 2.0**-24


@on_every_unit
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("terms", [1, 2])
def test_what_is_not_finite_stays_in_its_row(terms: int, value: float, unit: str) -> None:
    x, y = torch.randn(20, 40), torch.randn(21, 40)
    x[3, 5] = value
    scores = torch.empty(20, 21)
    Bf16Products(x, y, terms).scores(slice(0, 20), slice(0, 21), scores)
    assert not bool(torch.isfinite(scores[3]).any())
    assert bool(torch.isfinite(scores[:3]).all() and torch.isfinite(scores[4:]).all())
    if terms == 1:  # as x @ y.T; of two terms, low·inf has a sign of its own
        assert torch.equal(torch.isinf(scores[3]), torch.isinf(x[3] @ y.T))
        if value == value:
            assert torch.equal(scores[3] > 0, y[:, 5] * value > 0)


@on_every_unit
def test_rounding_is_torchs(unit: str) -> None:
    x = torch.cat([torch.randn(50, 60) * 10.0**e for e in range(-20, 21, 10)])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 3.4e38, 1.00390625, 1.01171875])
    x[0, : len(special)] = special  # an overflow, and ties to even, down and up
    held, squares = x.clone(), torch.empty(x.shape[0])
    native._C.bf16_round_to_terms(
        points=held.data_ptr(), rows=x.shape[0], dim=60, terms=1, threads=2,
        sqnorm=squares.data_ptr(),
    )  # fmt: skip
    torch.testing.assert_close(held, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    expected = x.bfloat16().double().square().sum(1)
    normal = slice(100, 150)  # squares of the others leave the range of float32
    torch.testing.assert_close(squares[normal].double(), expected[normal], rtol=1e-6, atol=0)


def _product_in_a_child(unit: str, x: Tensor, y: Tensor, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)  # as in a worker of a DataLoader: a fork has no thread pool
    out = torch.empty(x.shape[0], y.shape[0])
    assert native._C.active_bf16_unit() == unit
    Bf16Products(x, y, 1).scores(slice(0, x.shape[0]), slice(0, y.shape[0]), out)
    queue.put(out.numpy())


@on_every_unit
def test_in_a_forked_child(unit: str) -> None:
    x, y = torch.randn(70, 40), torch.randn(90, 40)
    expected = torch.empty(70, 90)
    Bf16Products(x, y, 1).scores(slice(0, 70), slice(0, 90), expected)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_product_in_a_child, args=(unit, x, y, queue))
    child.start()
    try:
        assert torch.equal(torch.from_numpy(queue.get(timeout=60)), expected)
    finally:
        child.join(timeout=60)
    assert child.exitcode == 0


def test_an_unknown_unit_is_named() -> None:
    if native.IMPORT_PROBLEM is not None:
        pytest.skip(native.IMPORT_PROBLEM)
    with pytest.raises(ValueError, match="'sse' is none of"):
        native._C.set_active_bf16_unit("sse")
    absent = [u for u in ("avx512_bf16", "amx") if u not in native._C.bf16_units()]
    for name in absent:
        with pytest.raises(ValueError, match=f"has no {name}"):
            native._C.set_active_bf16_unit(name)


INSTRUCTIONS = {
    "avx512_bf16": ("vdpbf16ps",),
    "3amx": ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"),
}


@pytest.mark.parametrize("namespace", INSTRUCTIONS)
def test_the_instructions_are_in_the_module(namespace: str) -> None:
    """Also where they cannot run: a build for AMX must hold tiles, not their emulation."""
    if native.IMPORT_PROBLEM is not None:
        pytest.skip(native.IMPORT_PROBLEM)
    if namespace.lstrip("3") not in native._C.BF16_UNITS_BUILT:
        pytest.skip(f"the compiler of this build does not know {namespace.lstrip('3')}")
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    text = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", native._C.__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    functions = re.split(r"\n(?=[0-9a-f]+ <)", text)
    own = "\n".join(f for f in functions if namespace in f.split("\n", 1)[0])
    for instruction in INSTRUCTIONS[namespace]:
        assert f"\t{instruction}" in own, instruction
