"""What the Triton kernels of pairs ask of a GPU: launches of `distance_softmax` and `nearest`.

Counted in fastcontrast/backends/triton/, in the file that each function names, per score of a tile
or per row of it. Two figures beside the source's are the compiler's: COMPILED, instructions of the
inner loops, and REPLICAS, threads that keep the same row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.gpu_model import Counts, Device, Launch
from fastcontrast.backends.triton import distance_softmax, nearest, wide
from fastcontrast.backends.triton.launch import Launch as Sizes
from fastcontrast.backends.triton.launch import is_fused, launch, padded_dimension

# Bytes of an operand as the products take it; of a point as it was given.
OPERAND_BYTES = {"ieee": 4, "tf32": 4, "bf16x3": 4, "bfloat16": 2, "float16": 2}
GIVEN_BYTES = {"ieee": 4, "tf32": 4, "bf16x3": 4, "bfloat16": 2, "float16": 2}
# Products of two points in units of one in bfloat16 (tiles.products: tf32 has half the rate, bf16x3
# four products, without norms three); of a weight and a point (tiles.weighted_rows). "ieee" has
# none, but lanes.
SCORE_PRODUCTS = {"tf32": 2, "bf16x3": 4, "bfloat16": 1, "float16": 1, "ieee": 0}
WEIGHT_PRODUCTS = {"tf32": 2, "bf16x3": 3, "bfloat16": 1, "float16": 2, "ieee": 0}
# Of a score: (floats, integers and comparisons, special). The Gram identity: sum, product and sum
# in one; the clamp; sqrt. "cosine": a factor. (Masks and near pairs are for few tiles.)
SCORE = {"l2": (2, 1, 1), "sqeuclidean": (2, 1, 0), "dot": (0, 0, 0), "cosine": (1, 0, 0)}
# row_statistics.py: times the slope less the maximum in one, exp2 times it and its sum in one, the
# other sum; best of the row, FLOOR; exp2. For "dot" +inf is looked for.
STATISTICS = {
    "l2": (3, 2, 1), "sqeuclidean": (3, 2, 1), "dot": (3, 4, 1), "cosine": (3, 2, 1),
}  # fmt: skip
# COLUMNS of it: times the slope less the largest of the tile in one, sum; exp2.
OF_COLUMNS = (2, 0, 1)
# point_gradients.py, "l2": distance by its inverse (sum, product and sum in one, a factor, clamp;
# rsqrt); tiles.score_gradient: log p in one, times the gradient; exp2; tiles.pair_weight: a factor;
# tiles.weighted_rows: two sums, bits cut off, two packed by an instruction; best of the near test.
# "dot" needs neither the sums nor what was rounded, "cosine" the factor and these.
GRADIENTS = {
    "l2": (8, 3.5, 2), "sqeuclidean": (6, 3.5, 1), "dot": (2, 0.5, 1), "cosine": (5, 1.5, 1),
}  # fmt: skip
# HAS_COLUMNS: log p of the column in one, times its gradient and added in one; exp2.
OTHER_DIRECTION = (2, 0, 1)
# Sums of a row go on in float64 once a tile: (operations, conversions). row_statistics.py: weighted
# and mass, each scaled and added to; four conversions. point_gradients.py: two sums.
STATISTICS_ROW, GRADIENTS_ROW = (3, 4), (2, 2)
# A row of a tile lies in four lanes, and what is taken once a row is taken by each.
REPLICAS = 4
# What is multiplied by one instruction: rows of a warp, or of a group of four.
WARP_ROWS, WARP_COLUMNS, GROUP_ROWS = 16, 8, 64
# A multiprocessor of capability 9.0 on reads operands of products from shared memory itself.
WITH_GROUPS = (9, 0)
# Per score of the loops as compiled for bfloat16 at D = 128 by Triton 3.9.0: all instructions,
# those for integers and comparisons, floats, special functions and conversions between types.
# Printed by `python -m benchmarks.compiled_loops`.
COMPILED: dict[tuple[int, str, str], tuple[float, float, float, float]] = {
    (80, "statistics", "l2"): (21.2, 5.7, 6.8, 2.6),
    (80, "statistics of both sides", "l2"): (30.0, 6.8, 11.1, 3.7),
    (80, "gradients of rows", "l2"): (39.0, 6.8, 12.8, 2.8),
    (80, "gradients of columns", "l2"): (38.2, 7.8, 11.8, 2.8),
    (80, "gradients of rows, symmetric", "l2"): (43.8, 7.1, 14.6, 3.8),
    (80, "gradients of columns, symmetric", "l2"): (43.6, 7.4, 13.8, 3.8),
    (80, "statistics", "sqeuclidean"): (20.4, 5.8, 7.0, 1.6),
    (80, "statistics of both sides", "sqeuclidean"): (29.1, 6.9, 11.2, 2.6),
    (80, "gradients of rows", "sqeuclidean"): (56.4, 10.9, 17.9, 5.5),
    (80, "gradients of columns", "sqeuclidean"): (34.8, 7.8, 9.8, 1.5),
    (80, "gradients of rows, symmetric", "sqeuclidean"): (40.2, 7.0, 12.8, 2.5),
    (80, "gradients of columns, symmetric", "sqeuclidean"): (40.1, 7.4, 11.9, 2.5),
    (80, "statistics", "dot"): (18.5, 6.5, 4.8, 1.6),
    (80, "statistics of both sides", "dot"): (26.6, 7.4, 8.9, 2.6),
    (80, "gradients of rows", "dot"): (13.9, 1.8, 2.6, 1.0),
    (80, "gradients of columns", "dot"): (14.6, 1.8, 2.7, 1.0),
    (80, "gradients of rows, symmetric", "dot"): (20.9, 2.4, 5.1, 2.0),
    (80, "gradients of columns, symmetric", "dot"): (20.9, 2.1, 5.2, 2.0),
    (80, "statistics", "cosine"): (17.7, 4.5, 5.8, 1.6),
    (80, "statistics of both sides", "cosine"): (26.0, 5.4, 9.9, 2.6),
    (80, "gradients of rows", "cosine"): (20.4, 2.7, 6.5, 1.2),
    (80, "gradients of columns", "cosine"): (21.8, 2.8, 6.7, 1.2),
    (80, "gradients of rows, symmetric", "cosine"): (27.8, 3.2, 9.8, 2.5),
    (80, "gradients of columns, symmetric", "cosine"): (28.4, 3.2, 9.6, 2.5),
    (90, "statistics", "l2"): (16.5, 5.3, 6.7, 2.2),
    (90, "statistics of both sides", "l2"): (30.8, 6.8, 12.3, 3.4),
    (90, "gradients of rows", "l2"): (23.2, 6.1, 9.0, 2.2),
    (90, "gradients of columns", "l2"): (24.8, 5.5, 9.4, 2.2),
    (90, "gradients of rows, symmetric", "l2"): (32.5, 5.4, 11.4, 3.4),
    (90, "gradients of columns, symmetric", "l2"): (32.5, 6.2, 11.4, 3.4),
    (90, "statistics", "sqeuclidean"): (15.5, 5.3, 6.7, 1.2),
    (90, "statistics of both sides", "sqeuclidean"): (29.7, 6.8, 12.3, 2.3),
    (90, "gradients of rows", "sqeuclidean"): (18.8, 5.1, 6.7, 1.1),
    (90, "gradients of columns", "sqeuclidean"): (21.3, 5.8, 7.1, 1.1),
    (90, "gradients of rows, symmetric", "sqeuclidean"): (29.1, 6.2, 9.4, 2.2),
    (90, "gradients of columns, symmetric", "sqeuclidean"): (29.4, 6.2, 9.5, 2.2),
    (90, "statistics", "dot"): (12.0, 5.3, 3.9, 1.2),
    (90, "statistics of both sides", "dot"): (26.2, 7.0, 9.6, 2.3),
    (90, "gradients of rows", "dot"): (8.5, 1.4, 2.2, 1.0),
    (90, "gradients of columns", "dot"): (10.7, 1.7, 2.3, 1.0),
    (90, "gradients of rows, symmetric", "dot"): (16.5, 2.3, 4.6, 2.0),
    (90, "gradients of columns, symmetric", "dot"): (16.8, 2.2, 4.7, 2.0),
    (90, "statistics", "cosine"): (12.4, 3.8, 5.4, 1.2),
    (90, "statistics of both sides", "cosine"): (26.7, 5.5, 11.0, 2.3),
    (90, "gradients of rows", "cosine"): (14.8, 2.7, 6.4, 1.1),
    (90, "gradients of columns", "cosine"): (16.6, 2.7, 6.4, 1.1),
    (90, "gradients of rows, symmetric", "cosine"): (23.1, 3.3, 8.8, 2.2),
    (90, "gradients of columns, symmetric", "cosine"): (23.4, 3.4, 8.8, 2.2),
}


class Shape(NamedTuple):
    """Of a problem: rows, columns and dimensions, and how its points are multiplied.

    Attributes:
        m: Rows.
        n: Columns.
        dim: Dimensions.
        metric: "l2", "sqeuclidean", "dot" or, of half points, "cosine".
        kind: One of launch.KINDS but "float64".
    """

    m: int
    n: int
    dim: int
    metric: str = "l2"
    kind: str = "bfloat16"

    def exchanged(self) -> Shape:
        """Rows for columns."""
        return self._replace(m=self.n, n=self.m)


def score_products(shape: Shape) -> int:
    """Of two points."""
    return 3 if (shape.kind, shape.metric) == ("bf16x3", "dot") else SCORE_PRODUCTS[shape.kind]


def units(shares: tuple[float, ...], scores: float) -> Counts:
    """Of (floats, integers, special) for each score."""
    return Counts(
        {u: s * scores for u, s in zip(("floats", "integers", "special"), shares, strict=True)}
    )


def compiled(arch: int, kernel: str, shape: Shape) -> Counts | None:
    """What the compiler made of a loop, where it was looked at: of bfloat16, whatever D."""
    numbers = COMPILED.get((arch, kernel, shape.metric))
    if numbers is None or shape.kind != "bfloat16":
        return None
    names = ("slots", "integers", "floats", "special")
    return Counts({u: n * shape.m * shape.n for u, n in zip(names, numbers, strict=True)})


def more_of(source: Counts, made: Counts | None) -> Counts | None:
    """What compiled code has beyond the source's count, so that the two add up to it."""
    if made is None:
        return None
    return Counts({unit: max(0.0, n - source.get(unit, 0.0)) for unit, n in made.items()})


def warp_grid(block: int, other: int, warps: int, chained: bool) -> tuple[int, int]:
    """Warps along rows and columns of a tile for mma.sync, as Triton deals them out."""
    rows = columns = 1
    while rows * columns < warps:
        along = block // (WARP_ROWS * rows) >= other // (2 * WARP_COLUMNS * columns)
        rows, columns = (2 * rows, columns) if chained or along else (rows, 2 * columns)
    return rows, columns


def operand_bytes(sizes: Sizes, depth: float, capability: tuple[int, int], weights: bool) -> float:
    """Bytes that the products of one tile read from shared memory; ``depth``: of a point.

    Scores read owners and others; with ``weights``, whose own are in registers, others again.
    """
    if capability >= WITH_GROUPS:
        groups = sizes.block / GROUP_ROWS
        scores = groups * (GROUP_ROWS + sizes.other) * depth
        return scores + (groups * sizes.other * depth if weights else 0.0)
    rows, columns = warp_grid(sizes.block, sizes.other, sizes.warps, weights)
    scores = (columns * sizes.block + rows * sizes.other) * depth
    return scores + (rows * sizes.other * depth if weights else 0.0)


def _tiles(
    shape: Shape, sizes: Sizes, device: Device, weights: bool, row: tuple[int, int]
) -> Counts:
    """Products, operands and float64 sums of a kernel that streams tiles of the columns."""
    scores, width = float(shape.m) * shape.n, padded_dimension(shape.dim)
    programs = math.ceil(shape.m / sizes.block)
    tiles = programs * math.ceil(shape.n / sizes.other)
    products = score_products(shape) + (WEIGHT_PRODUCTS[shape.kind] if weights else 0)
    size = OPERAND_BYTES[shape.kind]
    counts = Counts(
        matrix=products * scores * width,
        # Owners once, others once for every program (load_rows).
        cache=size * shape.dim * (shape.m + programs * float(shape.n)),
        shared=tiles * operand_bytes(sizes, size * width, device.capability, weights),
        doubles=row[0] * REPLICAS * tiles * sizes.block,
        conversions=row[1] * REPLICAS * tiles * sizes.block,
    )  # fmt: skip
    if products == 0:  # "ieee": products of lanes, without a matrix unit
        counts = counts + {"floats": (2 if weights else 1) * scores * width}
    return counts


def architecture(device: Device) -> int:
    """The entries of the launch table that the device runs."""
    return 90 if device.capability >= (9, 0) else 80


def _sizes(kernel: str, shape: Shape, device: Device, *, both: bool) -> Sizes:
    return launch(
        kernel, shape.kind, shape.dim, device.capability, metric=shape.metric, symmetric=both
    )


def statistics(shape: Shape, device: Device, *, both: bool = False) -> Launch:
    """row_statistics_kernel and its merge: of rows, or with ``both`` of columns as well."""
    sizes = _sizes("statistics", shape, device, both=both)
    scores, size = float(shape.m) * shape.n, GIVEN_BYTES[shape.kind]
    counts = _tiles(shape, sizes, device, False, STATISTICS_ROW)
    counts = counts + units(SCORE[shape.metric], scores) + units(STATISTICS[shape.metric], scores)
    # Points; state [4, M] float64 written and read, three results.
    counts = counts + {"memory": size * shape.dim * (shape.m + shape.n) + (64 + 12) * shape.m}
    if both:
        counts = counts + units(OF_COLUMNS, scores)
        blocks = math.ceil(shape.m / sizes.block)
        counts = counts + {"memory": 2 * 8.0 * blocks * shape.n}  # maximum and sum, float32
    name = "statistics of both sides" if both else "statistics"
    return Launch(name, counts, more_of(counts, compiled(architecture(device), name, shape)))


def gradients(shape: Shape, device: Device, *, rows: bool, both: bool = False) -> Launch:
    """point_gradients_kernel of one side, ``m`` of ``shape`` the rows in either case."""
    own = shape if rows else shape.exchanged()
    sizes = _sizes("gradients", shape, device, both=both)
    scores, size = float(shape.m) * shape.n, GIVEN_BYTES[shape.kind]
    counts = _tiles(own, sizes, device, True, GRADIENTS_ROW if shape.metric != "dot" else (0, 0))
    counts = counts + units(GRADIENTS[shape.metric], scores)
    # Points, the table of rows [5, M]; the gradient is zeroed, read and written.
    moved = size * shape.dim * (own.m + own.n) + 20 * shape.m + 12 * own.m * shape.dim
    counts = counts + {"memory": moved}
    name = f"gradients of {'rows' if rows else 'columns'}"
    if both:
        counts = counts + units(OTHER_DIRECTION, scores)
    made = compiled(architecture(device), name + (", symmetric" if both else ""), shape)
    return Launch(name, counts, more_of(counts, made))


def around(shape: Shape) -> Launch:
    """What is done beside the pairs: norms, positives, gradients added and rounded; O(M·D)."""
    size, sides = GIVEN_BYTES[shape.kind], float(shape.m + shape.n) * shape.dim
    # operands.py: norms; directions.py: points read twice more and written. pairs.py: values, then
    # for either side points of both, gradients read and written. ops/softmax_loss.py: gradients
    # read, scaled and written, read and rounded.
    norms = {"dot": 0, "cosine": 3 * size}.get(shape.metric, size)
    moved = sides * (norms + size + 2 * size + 8 + 12 + size)
    if shape.kind in ("tf32", "bf16x3"):  # points centred and rounded are written
        moved += sides * OPERAND_BYTES[shape.kind]
    if shape.metric == "cosine":  # directions.py: points and gradients read twice, these written
        moved += (2 * size + 3 * 4) * sides
    return Launch("norms, positives, sums", Counts(memory=moved))


def gemm(name: str, products: float, times: int, moved: Counts) -> Launch:
    """PyTorch's GEMMs at the peak of their unit.

    Args:
        name: Of the launch.
        products: Multiplications of one.
        times: Products of bfloat16 that one is; 0 for lanes.
        moved: Bytes.
    """
    unit = Counts(matrix=times * products) if times else Counts(floats=products)
    return Launch(name, unit + moved)


def wide_step(n: int) -> int:
    """Rows of a block of scores: wide.blocks_of_products."""
    return wide.rows_of_block(n)


def _of_block(shape: Shape, device: Device, size: float) -> Callable[[float], Counts]:
    """Bytes for each score of a block: those of the memory if the block outgrows the L2 cache."""
    scores, block = float(shape.m) * shape.n, float(wide_step(shape.n)) * shape.n * size
    place = "memory" if block > device.cache_bytes else "cache"
    return lambda each: Counts({place: each * scores})


def wide_scores(shape: Shape, device: Device) -> Launch:
    """GEMMs that write the dot products of all blocks, float32."""
    blocks, size = math.ceil(shape.m / wide_step(shape.n)), OPERAND_BYTES[shape.kind]
    read = Counts(memory=size * shape.dim * (shape.m + blocks * float(shape.n)))
    written = _of_block(shape, device, 4)(4)
    products = float(shape.m) * shape.n * shape.dim
    return gemm("scores by GEMM", products, score_products(shape), read + written)


def wide_statistics(shape: Shape, device: Device) -> list[Launch]:
    """Statistics from them: row_statistics_kernel with FROM_DOTS, blocks of 8 × 256."""
    scores = float(shape.m) * shape.n
    counts = units(SCORE[shape.metric], scores) + units(STATISTICS[shape.metric], scores)
    counts = counts + _of_block(shape, device, 4)(4)
    return [wide_scores(shape, device), Launch("statistics of scores", counts)]


def wide_gradients(shape: Shape, device: Device, *, both: bool = False) -> list[Launch]:
    """wide.Weights, from scores: weights, and a GEMM for either side."""
    scores, size = float(shape.m) * shape.n, OPERAND_BYTES[shape.kind]
    blocks = math.ceil(shape.m / wide_step(shape.n))
    half = 2 if shape.kind in ("bfloat16", "bf16x3") else 4
    parts = 2 if shape.kind == "bf16x3" else 1
    of_block = _of_block(shape, device, 4)
    # As GRADIENTS, and for "l2" sqrt beside rsqrt.
    counts = units(GRADIENTS[shape.metric], scores) + of_block(4 + half * parts)
    counts = counts + units((0, 0, 1 if shape.metric == "l2" else 0), scores)
    if both:
        counts = counts + units(OTHER_DIRECTION, scores)
    weights = of_block(half * parts)
    x, y = (4.0 * side * shape.dim for side in (shape.m, shape.n))
    # Of a block of the rows: written, read and added. Of the columns, once for every block: read,
    # added to and written by the GEMM.
    of_rows = weights + {"memory": x * 3 + size / 4 * y * blocks}
    of_columns = weights + {"memory": y * blocks * 2 + size / 4 * x}
    # part.sum(0, dtype=float64) widens every weight.
    sums = weights + {"conversions": parts * scores, "doubles": parts * scores}
    products, times = scores * shape.dim, WEIGHT_PRODUCTS[shape.kind]
    return [
        Launch("weights of scores", counts),
        gemm("gradient of rows by GEMM", products, times, of_rows),
        gemm("gradient of columns by GEMM", products, times, of_columns),
        Launch("sums of columns", sums),
    ]


def loss(shape: Shape, device: Device, *, symmetric: bool = False) -> list[Launch]:
    """Launches of `softmax_loss` with both gradients, positives on the diagonal."""
    fused = {
        kernel: is_fused(kernel, shape.kind, shape.dim, device.capability, shape.metric)
        for kernel in ("statistics", "gradients")
    }
    found = [around(shape)]
    if not (symmetric or fused["gradients"]):  # from the same scores: _statistics_and_gradients
        return found + wide_statistics(shape, device) + wide_gradients(shape, device)
    if not fused["statistics"]:
        found += wide_statistics(shape, device)
        found += wide_statistics(shape.exchanged(), device) if symmetric else []
    elif symmetric and column_state(shape, device) <= distance_softmax.COLUMN_BYTES:
        found.append(statistics(shape, device, both=True))
    else:
        found.append(statistics(shape, device))
        found += [statistics(shape.exchanged(), device)] if symmetric else []
    if fused["gradients"]:
        return found + [gradients(shape, device, rows=r, both=symmetric) for r in (True, False)]
    found.append(wide_scores(shape, device))
    return found + wide_gradients(shape, device, both=symmetric)


def column_state(shape: Shape, device: Device) -> int:
    """Bytes that row blocks leave of the columns: _both_statistics."""
    sizes = _sizes("statistics", shape, device, both=True)
    return math.ceil(shape.m / sizes.block) * 2 * shape.n * 4


# Bytes of a row at the forward peak: statistics and their float64 state, two norms, the table of
# gradients, targets sorted by column; and at the backward peak, what was saved.
FORWARD_ROW, BACKWARD_ROW = 112, 12


def peak_bytes(m: int, n: int, dim: int, half: bool) -> int:
    """Memory of a one-sided fused loss on distances above inputs and gradients, at its peak.

    Of half points in the backward pass: both gradients in float32, kept from the forward pass, and
    both scaled and rounded (ops/softmax_loss.py). Of float32 points in the forward pass, beside
    both sides centred (operands.py); with as much in the backward pass, beside both scaled.
    Gradients are added to those that exist.
    """
    kept = 4 * (m + n) * dim
    if half:
        return kept + 2 * (m + n) * dim + BACKWARD_ROW * m
    return 2 * kept + FORWARD_ROW * m


# nearest.py of a score: the bound (a sum, a product and sum in one); first pass: finite (compared),
# counted (chosen), minimum; second: compared twice, counted, summed.
LIMITS, CANDIDATES = (2, 3, 0), (2, 4, 0)
# Of a score of a tile in which any pair passes: tl.cumsum, place, address, store under a mask.
LISTED = (0, 8, 0)


def nearest_columns(shape: Shape, device: Device, k: int, passing: float = 1.15) -> list[Launch]:
    """Launches of `nearest`; ``passing``: candidates for each neighbour (GROUPS_PER_NEIGHBOR)."""
    kind = "tf32" if GIVEN_BYTES[shape.kind] == 4 else shape.kind
    shape = shape._replace(kind=kind)
    sizes = launch("nearest", kind, shape.dim, device.capability)
    scores, m = float(shape.m) * shape.n, float(shape.m)
    tiles = _tiles(shape, sizes, device, False, (0, 0))
    points = Counts(memory=OPERAND_BYTES[kind] * shape.dim * float(shape.m + shape.n))
    minima = sizes.other * math.ceil(nearest.GROUPS_PER_NEIGHBOR * k / sizes.other)
    first = tiles + points + units(LIMITS, scores) + {"memory": 8.0 * m * minima}
    expected = passing * k * sizes.block * sizes.other / shape.n
    second = tiles + points + units(CANDIDATES, scores)
    second = second + units(LISTED, scores * -math.expm1(-expected))
    capacity = min(2 * k + nearest.ROOM, shape.n)
    # pairs.py in float64: both points read and widened, difference, product and sum.
    pairs = passing * k * m * shape.dim
    ranks = Counts(
        conversions=2 * pairs, doubles=2 * pairs, cache=2 * GIVEN_BYTES[shape.kind] * pairs
    )
    # Lists as int64 and keys: filled, widened, masked, sorted by radix (8 passes) and gathered.
    ranks = ranks + {"memory": (8 * 16 + 15 * 8) * m * capacity}
    return [
        Launch("nearest limits", first),
        Launch("k-th smallest", Counts(memory=4 * 4.0 * m * minima)),
        Launch("nearest candidates", second),
        Launch("ranking", ranks),
    ]
