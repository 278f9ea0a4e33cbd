"""Signatures and constants with which ahead_of_time.py compiles the Triton kernels of patches.

Images and patches are contiguous, sides and strides multiples of 16, as they mostly are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton.language as tl

from fastcontrast.backends.triton import launch as launches
from fastcontrast.backends.triton.extract_patches import gather_gradients_kernel
from fastcontrast.backends.triton.patch_cuts import cut_patches_kernel, random_patches_kernel
from fastcontrast.backends.triton.patch_draws import NOT_SPECIALIZED, sample_coords_kernel

if TYPE_CHECKING:
    from benchmarks.ahead_of_time import Entry

KERNELS = {
    "patches cut": cut_patches_kernel,
    "patches gathered": gather_gradients_kernel,
    "patches drawn": sample_coords_kernel,
    "patches drawn and cut": random_patches_kernel,
}
# What becomes of a box, as the column "metric" of the table names it. Other than plain ones are
# flipped, normalised and of an index.
METHODS = {
    "patches cut": ("plain", "nearest", "bilinear"),
    "patches gathered": ("plain", "bilinear", "bilinear, reflected"),
    "patches drawn": ("plain", "of random size"),
    "patches drawn and cut": ("plain", "bilinear"),
}
IMAGE_SIDE = 224
ALIGNED = (
    "width", "image_width", "image_stride", "image_channel", "image_row", "out_stride",
    "out_channel", "out_row", "grad_batch", "grad_patch", "grad_channel", "grad_row",
)  # fmt: skip
# Types of images; patches and numbers of their channels are of the type of arithmetic.
_TYPES = {"float64": ("fp64", "fp64"), "ieee": ("u8", "fp32"), "bfloat16": ("bf16", "fp32")}


def launch_of(entry: Entry) -> launches.Launch:
    """Sizes of a launch over many patches of 3 channels, in the terms of the table."""
    sizes = _sizes(entry)
    rows = sizes.outer * sizes.lines
    return launches.Launch(rows, sizes.columns, sizes.columns, 0, sizes.warps, 3)


def type_of(name: str, kind: str) -> str:
    """Triton's name of the type of an argument."""
    given, acc = _TYPES[kind]
    pointers = {
        "images": given, "out": "bf16" if given == "bf16" else acc, "maps": acc,
        "grad": acc, "grad_images": acc if given == "u8" else given,
        "coords": "i32", "flips": "u8",
        **dict.fromkeys(("index", "order", "starts", "key", "sample_ids", "factors"), "i64"),
    }  # fmt: skip
    if name in pointers:
        return "*" + pointers[name]
    return "i64" if name in NOT_SPECIALIZED else "i32"


def constants_of(entry: Entry, _: launches.Launch) -> dict[str, Any]:
    """Constants of a launch."""
    plain, sizes = entry.metric == "plain", _sizes(entry)
    if entry.kernel == "patches drawn":
        found = {"key": None, "sample_ids": None, "BLOCK": sizes.columns}
        return found | ({"factors": None} if plain else {})
    reflected = entry.metric.endswith("reflected")
    found = {
        "METHOD": "none" if plain else "nearest" if entry.metric == "nearest" else "bilinear",
        "ANTIALIAS": True, "PADDING": "reflect" if reflected else "error", "SCALE": entry.many,
        "INT": tl.int32, "ACC": tl.float64 if entry.kind == "float64" else tl.float32,
        "LINES": sizes.lines, "COLUMNS": sizes.columns,
    }  # fmt: skip
    absent = ("flips", "maps", "index", "order", "starts") if plain else ()
    own = {
        "image_column": 1, "out_column": 1, "COPY": False, "OFFSET": entry.many, "FILL": False,
        "CHANNELS_LAST": False, "PATCHES": sizes.outer,
    }  # fmt: skip
    if entry.kernel == "patches drawn and cut":  # of random size where they are resized
        own |= {"FLIPS": entry.many, "key": None, "sample_ids": None}
        absent = ("maps", "index", "factors") if plain else ()
    if entry.kernel == "patches gathered":
        own = {"grad_column": 1, "FOLDS": 9 if reflected else 1, "CHANNELS": sizes.outer}
    taken = KERNELS[entry.kernel].arg_names
    return found | own | {name: None for name in absent if name in taken}


def _sizes(entry: Entry) -> launches.PatchLaunch:
    side, plain = entry.dim, entry.metric == "plain"
    reflected, capability = entry.metric.endswith("reflected"), divmod(entry.architecture, 10)
    gather = launches.gathering(plain, reflected, entry.kind == "float64", capability)
    name, *shape = {
        "patches cut": ("cut", 1 << 20, 3 * side, side),
        "patches drawn and cut": (
            "draw and cut" if plain else "draw and resize",
            1 << 20,
            3 * side,
            side,
        ),
        "patches gathered": (gather, 3, IMAGE_SIDE, IMAGE_SIDE),
        "patches drawn": ("draw", 1, 1, 1 << 30),
    }[entry.kernel]
    return launches.patch_launch(name, *shape, interpreted=False)
