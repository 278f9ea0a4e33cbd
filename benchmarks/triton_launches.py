"""Launches of the Triton kernels as a compiler wants them: constants, types, sizes, options.

Read by ahead_of_time.py, which compiles them for GPUs that are not here, and by tune.py. A kernel
that is added gets an entry in KERNELS here, and a line in triton_entries.every_entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton.language as tl

from benchmarks import patch_kernels
from benchmarks.triton_entries import BOTH_GRADIENTS, BOTH_SIDES, TRIPLETS, Entry
from fastcontrast.backends.triton import directions, mask, operands, pairs, row_table, wide
from fastcontrast.backends.triton import launch as launches
from fastcontrast.backends.triton.distance_softmax import MERGE_BLOCK
from fastcontrast.backends.triton.launch import Launch
from fastcontrast.backends.triton.nearest import nearest_kernel
from fastcontrast.backends.triton.point_gradients import point_gradients_kernel
from fastcontrast.backends.triton.row_statistics import (
    PAIR_PART,
    merge_splits_kernel,
    row_statistics_kernel,
)
from fastcontrast.backends.triton.row_table import row_table_kernel
from fastcontrast.backends.triton.triplet_distances import (
    WARPS,
    forward_warps,
    triplet_backward_kernel,
    triplet_forward_kernel,
    triplet_tile,
)

# Triton's names of the dtypes of (operands, points as given, sums) of each kind.
DTYPES = {
    "float64": ("fp64", "fp64", "fp64"),
    "ieee": ("fp32", "fp32", "fp32"),
    "tf32": ("fp32", "fp32", "fp32"),
    "bf16x3": ("bf16", "fp32", "fp32"),
    "bfloat16": ("bf16", "bf16", "fp32"),
    "float16": ("fp16", "fp16", "fp32"),
}
ROUNDING = {"bfloat16": "bf16", "bf16x3": "bf16", "tf32": "tf32", "float16": "tf32"}


class Kernel(NamedTuple):
    """A kernel, the constants of an entry, and Triton's types of arguments by name.

    In ``types``, "operand", "given" and "acc" stand for what the kind makes them (DTYPES), and what
    has no type is an int32.
    """

    function: Any
    constants: Callable[[Entry, Launch], dict[str, Any]]
    types: dict[str, tuple[str, ...]]


def function_of(entry: Entry) -> Any:
    """The jitted function of an entry."""
    if entry.kernel in patch_kernels.KERNELS:
        return patch_kernels.KERNELS[entry.kernel]
    return KERNELS[entry.kernel].function


def launch_of(entry: Entry) -> Launch:
    """Sizes of a call on a GPU of the entry's architecture, with rows enough to fill it."""
    if entry.kernel in TRIPLETS:
        block, chunk = triplet_tile(1 << 30, entry.dim, 8 if entry.kind == "float64" else 4, 1)
        forward, half = entry.kernel == "triplets forward", entry.kind in ("bfloat16", "float16")
        warps = forward_warps(2 if half else 4, entry.many) if forward else WARPS
        return Launch(block, chunk, chunk, chunk, warps, 1)
    if entry.kernel in patch_kernels.KERNELS:
        return patch_kernels.launch_of(entry)
    if entry.kernel in OWN_SIZES:
        block, other = OWN_SIZES[entry.kernel]
        return Launch(block, other, other, 0, 4, 3)  # otherwise Triton's own
    capability = (entry.architecture // 10, entry.architecture % 10)
    if entry.kernel.startswith("wide"):
        kernel = entry.kernel.removeprefix("wide ")
        sizes = launches.wide_launch(kernel, entry.kind, capability)
        return sizes if kernel == "statistics" else sizes._replace(stages=3)  # Triton's own
    kernel = entry.kernel.split(" ")[0]
    return launches.launch(
        kernel, entry.kind, entry.dim, capability, metric=entry.metric, many=entry.many,
        symmetric=entry.kernel in (BOTH_SIDES, BOTH_GRADIENTS),
    )  # fmt: skip


def _acc(entry: Entry) -> Any:
    return tl.float64 if entry.kind == "float64" else tl.float32


def _metric_and_mask(entry: Entry) -> dict[str, Any]:
    many = entry.many
    return {
        "METRIC": mask.METRICS.index(entry.metric),
        "EXCLUDE": 2 if many else 1,
        "KEEP": 1 if many else 0,
        "ACC": _acc(entry),
    }


def _products(entry: Entry, sizes: Launch) -> dict[str, Any]:
    width = launches.padded_dimension(entry.dim)
    return _metric_and_mask(entry) | {
        "SPLIT": entry.kind == "bf16x3",
        "PRECISION": "tf32" if entry.kind == "tf32" else "ieee",
        "UPCAST": False,
        "BLOCK_D": width,
        "BLOCK_K": min(sizes.part or width, width),
    }


def _statistics(entry: Entry, sizes: Launch) -> dict[str, Any]:
    return _products(entry, sizes) | {
        "SCORE_SUM": entry.many, "RANK": entry.many, "FROM_DOTS": entry.dim == 0,
        "COLUMNS": entry.kernel == BOTH_SIDES,
        "BLOCK_M": sizes.block, "BLOCK_N": sizes.other, "GROUP": operands.BLOCK,
        "PAIR_PART": PAIR_PART,
    }  # fmt: skip


def _gradients(entry: Entry, sizes: Launch) -> dict[str, Any]:
    """With all options: those of the op, or of a symmetric loss, without ids and entropies."""
    many, symmetric = entry.many, entry.kernel == BOTH_GRADIENTS
    constants = _products(entry, sizes) | {
        "OWNS_ROWS": entry.rows, "HAS_ENTROPY": many and not symmetric, "HAS_SUM": False,
        "HAS_COLUMNS": symmetric,
        "PRODUCT": many, "ROUND": ROUNDING.get(entry.kind, "none"),
        "BLOCK": sizes.block, "BLOCK_OTHER": sizes.other, "GROUP": operands.BLOCK,
    }  # fmt: skip
    return constants | {"EXCLUDE": 1, "KEEP": 0} if symmetric else constants


def _nearest(entry: Entry, sizes: Launch) -> dict[str, Any]:
    constants = _products(entry, sizes) | {
        "COLLECT": entry.kernel == "nearest candidates", "FARTHEST": entry.many,
        "BLOCK_M": sizes.block, "BLOCK_N": sizes.other,
    }  # fmt: skip
    del constants["SPLIT"]
    return constants


def _merge(entry: Entry, sizes: Launch) -> dict[str, Any]:
    return {"SCORE_SUM": entry.many, "RANK": entry.many, "NUMBERS": 4, "BLOCK": sizes.block}


def _row_table(entry: Entry, sizes: Launch) -> dict[str, Any]:
    many = entry.many
    return {
        "TIMES": 1.0, "HAS_LSE": True, "HAS_ENTROPY": many, "HAS_SUM": many,
        "EXCLUDE": 2 if many else 1, "BLOCK": sizes.block,
    }  # fmt: skip


def _weights(entry: Entry, sizes: Launch) -> dict[str, Any]:
    many, kind = entry.many, entry.kind
    return _metric_and_mask(entry) | {
        "HAS_ENTROPY": many, "HAS_SUM": many, "HAS_COLUMNS": many, "NEEDS_X": True,
        "SPLIT": kind == "bf16x3" or (kind == "bfloat16" and many),
        "ROUND": ROUNDING.get(kind, "none"), "BLOCK_M": sizes.block, "BLOCK_N": sizes.other,
    }  # fmt: skip


def _near_columns(entry: Entry, sizes: Launch) -> dict[str, Any]:
    return {"ACC": _acc(entry), "BLOCK_M": sizes.block, "BLOCK_N": sizes.other}


def _pair_values(entry: Entry, sizes: Launch) -> dict[str, Any]:
    """Of a positive per row, or with all options of a list of candidates, in float64."""
    constants = {
        "IS_DOT": entry.metric == "dot", "ACC": tl.float64 if entry.many else _acc(entry),
        "BLOCK": sizes.block, "CHUNK": sizes.other,
    }  # fmt: skip
    return constants if entry.many else constants | {"targets": 1}


def _add_pairs(entry: Entry, sizes: Launch) -> dict[str, Any]:
    return {
        "IS_DOT": entry.metric == "dot", "ACC": _acc(entry), "OWNERS": sizes.block,
        "ENTRIES": pairs.ENTRIES, "CHUNK": sizes.other,
    }  # fmt: skip


def _points(entry: Entry, sizes: Launch) -> dict[str, Any]:
    """Half points are used where they lie, unless their columns are apart."""
    distances, half = entry.metric != "dot", DTYPES[entry.kind][1] in ("bf16", "fp16")
    rounding = {"tf32": "tf32", "bfloat16": "bf16", "bf16x3": "bf16x3"}.get(entry.kind, "none")
    return {
        "CENTRE": distances and not half, "STORE": entry.kind != "bf16x3", "NORM": distances,
        "ROUND": rounding, "ACC": _acc(entry), "BLOCK": sizes.block, "CHUNK": sizes.other,
    }  # fmt: skip


def _directions(entry: Entry, sizes: Launch) -> dict[str, Any]:
    return {"BLOCK": sizes.block, "CHUNK": sizes.other}


def _triplets(entry: Entry, sizes: Launch) -> dict[str, Any]:
    """Distances alone, or with ``many`` the difference with swap; contiguous columns."""
    many = entry.many
    unused = (
        ("grad_positive", "grad_negative", "grad_others") if many
        else ("difference", "slope", "upstream", "grad_others")
    )  # fmt: skip
    return {
        **dict.fromkeys(("a_column", "p_column", "n_column"), 1),
        **dict.fromkeys(unused, None),
        **dict.fromkeys(("HAS_POSITIVE", "HAS_NEGATIVE", "NEEDS_A", "NEEDS_P", "NEEDS_N"), True),
        "L2": entry.metric == "l2",
        "BETWEEN": many,
        "DIFFERENCE": many,
        "HAS_OTHERS": many,
        "ACC": _acc(entry),
        "BLOCK": sizes.block,
        "CHUNK": sizes.other,
    }


_GIVEN_STRIDES = tuple(
    f"given_{side}_{axis}" for side in ("x", "y", "own", "other") for axis in ("row", "column")
)
_STATISTICS_TYPES = {
    "operand": ("x", "x_low", "y", "y_low"),
    "given": ("given_x", "given_y"),
    "acc": ("x_norm", "y_norm", "y_largest", "scale", "threshold", "column_state"),
    "i32": ("row_ids", "column_ids"),
    "i64": ("exclude", "counts"),
    "fp64": ("state",),
    "int64": _GIVEN_STRIDES,
}
_TRIPLET_TYPES = {
    "given": ("a", "p", "n", "da", "dp", "dn"),
    "acc": (
        "difference", "to_positive", "to_negative", "of_others", "grad_positive", "grad_negative",
        "grad_others", "slope", "upstream",
    ),
}  # fmt: skip
KERNELS = {
    **dict.fromkeys(
        ("statistics", BOTH_SIDES), Kernel(row_statistics_kernel, _statistics, _STATISTICS_TYPES)
    ),
    **dict.fromkeys(("gradients", BOTH_GRADIENTS), Kernel(point_gradients_kernel, _gradients, {
        "operand": ("own", "own_low", "other", "other_low"),
        "given": ("given_own", "given_other"),
        "acc": (
            "own_norms", "other_norms", "other_largest", "scale", "table", "column_table", "grad",
        ),
        "i32": ("own_ids", "other_ids", "left_out"),
        "fp64": ("product",),
        "int64": _GIVEN_STRIDES,
    })),
    **dict.fromkeys(("nearest limits", "nearest candidates"), Kernel(nearest_kernel, _nearest, {
        "operand": ("x", "y"),
        "acc": ("x_bound", "y_bound", "limit", "least"),
        "i32": ("row_ids", "column_ids", "columns", "count"),
        "i64": ("exclude",),
    })),
    "row table": Kernel(row_table_kernel, _row_table, {
        "acc": (
            "lse", "lse_residual", "entropy", "grad_lse", "grad_entropy", "grad_sum", "scale",
            "table",
        ),
        "i32": ("left_out",),
        "i64": ("exclude",),
    }),
    "merge of splits": Kernel(merge_splits_kernel, _merge, {
        "acc": ("lse", "lse_residual", "entropy", "score_sum"),
        "i64": ("counts", "column_count", "rank"),
        "fp64": ("state",),
    }),
    "wide statistics": Kernel(
        row_statistics_kernel, _statistics,
        {**_STATISTICS_TYPES, "operand": ("x_low", "y", "y_low"),
         "acc": ("x", *_STATISTICS_TYPES["acc"])},
    ),
    "wide weights": Kernel(wide.weigh_scores_kernel, _weights, {
        "weight": ("weights", "weights_low"),
        "given": ("given_x", "given_y"),
        "acc": ("dots", "x_norm", "y_norm", "scale", "table", "column_table", "grad_x"),
        "i8": ("flags",),
        "i32": ("row_ids", "column_ids"),
        "i64": ("exclude",),
        "fp64": ("weight_sum", "product"),
        "int64": _GIVEN_STRIDES,
    }),
    "wide near columns": Kernel(wide.near_columns_kernel, _near_columns, {
        "given": ("given_x", "given_y"),
        "acc": ("near_weights", "grad_y"),
        "i8": ("flags",),
        "int64": _GIVEN_STRIDES,
    }),
    "pair values": Kernel(pairs.pair_values_kernel, _pair_values, {
        "given": ("x", "y"), "sum": ("values",), "i64": ("target",),
        "int64": ("x_row", "x_column", "y_row", "y_column"),
    }),
    "add pairs": Kernel(pairs.add_pairs_kernel, _add_pairs, {
        "given": ("own", "other"),
        "acc": ("weight", "grad"),
        "i64": ("owner", "partner", "offsets"),
        "int64": ("own_row", "own_column", "other_row", "other_column"),
    }),
    "points": Kernel(operands.prepare_points_kernel, _points, {
        "operand": ("out", "out_low"), "given": ("points",), "acc": ("mean", "sqnorm", "largest"),
        "int64": ("row_stride", "column_stride"),
    }),
    "directions": Kernel(directions.stretch_kernel, _directions, {
        "given": ("points", "out"), "acc": ("inverse_norms", "powers"),
        "int64": ("row_stride", "column_stride"),
    }),
    "gradients of directions": Kernel(directions.turn_kernel, _directions, {
        "given": ("points",), "acc": ("grad", "inverse_norms", "powers"),
    }),
    "triplets forward": Kernel(triplet_forward_kernel, _triplets, _TRIPLET_TYPES),
    "triplets backward": Kernel(triplet_backward_kernel, _triplets, _TRIPLET_TYPES),
}  # fmt: skip
# Kernels without an entry in the launch table: (block, other) of the files they are in.
OWN_SIZES = {
    "merge of splits": (MERGE_BLOCK, MERGE_BLOCK),
    "row table": (row_table.BLOCK, row_table.BLOCK),
    "pair values": (pairs.BLOCK, pairs.CHUNK),
    "add pairs": (pairs.OWNERS, pairs.CHUNK),
    "points": (operands.BLOCK, operands.CHUNK),
    "directions": (directions.BLOCK, directions.CHUNK),
    "gradients of directions": (directions.BLOCK, directions.CHUNK),
}
# Sizes that a call makes multiples of 16, or usually finds to be such.
ALIGNED = (
    "x_stride", "y_stride", "own_stride", "other_stride", "out_stride", "stride", "dim",
    "table_stride", "column_table_stride",
    "a_row", "p_row", "n_row", *patch_kernels.ALIGNED,
)  # fmt: skip


def arguments(
    entry: Entry, sizes: Launch
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Signature, constants and hints of alignment, as triton.compiler.ASTSource wants them."""
    if entry.kernel in patch_kernels.KERNELS:
        constants = patch_kernels.constants_of(entry, sizes)
    else:
        constants = KERNELS[entry.kernel].constants(entry, sizes)
    signature, known, hints = {}, {}, {}
    for position, name in enumerate(function_of(entry).arg_names):
        if name in constants:
            signature[name] = "constexpr"
            known[(position,)] = constants[name]
            continue
        signature[name] = _type(entry, name)
        if signature[name].startswith("*") or name in ALIGNED:
            hints[(position,)] = [["tt.divisibility", 16]]
    return signature, known, hints


def _type(entry: Entry, name: str) -> str:
    """Triton's name of the type of an argument."""
    if entry.kernel in patch_kernels.KERNELS:
        return patch_kernels.type_of(name, entry.kind)
    operand, given, acc = DTYPES[entry.kind]
    half = entry.kind in ("bf16x3", "bfloat16")
    stands_for = {
        "operand": operand, "given": given, "acc": acc, "weight": "bf16" if half else acc,
        "sum": "fp64" if entry.many else acc,
    }  # fmt: skip
    types = KERNELS[entry.kernel].types
    kind = next((kind for kind, names in types.items() if name in names), "int32")
    if kind in ("int32", "int64"):
        return {"int32": "i32", "int64": "i64"}[kind]
    return "*" + stands_for.get(kind, kind)
