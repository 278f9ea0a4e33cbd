"""What users pass to ``fastcontrast/patches.py``, checked and turned into what the op takes.

Every check names the argument, what came and what was wanted. Nothing here reads a GPU's memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Generator, Tensor

from fastcontrast.backends.patch_sets import PADDING_MODES
from fastcontrast.ops.extract_patches import PATCH_BITS, check_step

IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COORDS_LIMIT = 1 << 31  # coordinates are int32


def check_images(images: Tensor) -> None:
    """Raise unless ``images`` is [B, C, H, W] of a dtype that the op takes."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images must have shape [B, C, H, W], got {list(images.shape)}")


def check_tensor(
    name: str, value: Tensor, dtype: torch.dtype, shape: str, device: torch.device
) -> None:
    """Raise unless ``value`` is a tensor of that dtype on that device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape} of {dtype}, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be a tensor {shape} of {dtype}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} with the images, got {value.device}")


def check_size(size: int | Sequence[int], name: str = "size") -> tuple[int, int]:
    """Height and width of ``size``, at least one pixel each."""
    pair = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(pair, (tuple, list, torch.Size)) and len(pair) == 2
    if not is_pair or any(not isinstance(n, int) or isinstance(n, bool) for n in pair):
        raise TypeError(f"{name} must be an int or a pair (height, width) of ints, got {size!r}")
    height, width = pair
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be at least 1x1 pixels, got {height}x{width}")
    return height, width


def check_fits(size: tuple[int, int], image_size: Sequence[int]) -> tuple[int, int]:
    """Height and width of the image, once patches of ``size`` fit into it."""
    height, width = image_size
    if size[0] > height or size[1] > width:
        raise ValueError(
            f"size must fit into the image: patches of {size[0]}x{size[1]} pixels are larger than "
            f"images of {height}x{width}"
        )
    if height >= _COORDS_LIMIT or width >= _COORDS_LIMIT:
        raise ValueError(f"images must be smaller than 2^31 pixels a side, got {height}x{width}")
    return height, width


def size_of(coords: Tensor) -> tuple[int, int]:
    """Height and width of the first box; the op checks that the others are equal."""
    if coords.device.type != "cpu":
        raise ValueError(
            f"size must be given for coords on {coords.device}: reading it waits for the device"
        )
    if coords.numel() == 0:
        raise ValueError(f"size must be given for empty coords, got {list(coords.shape)}")
    height, width = coords[0, 0, 2:].tolist()
    if height < 1 or width < 1:
        raise ValueError(f"coords must have height and width of at least 1, got {height}x{width}")
    return height, width


def check_num_patches(num_patches: int) -> None:
    """Raise unless the counter has room for the number of patches."""
    if not isinstance(num_patches, int) or isinstance(num_patches, bool):
        raise TypeError(f"num_patches must be an int, got {type(num_patches).__name__}")
    if not 0 <= num_patches <= 1 << PATCH_BITS:
        raise ValueError(
            f"num_patches must be at least 0 and at most 2^{PATCH_BITS}, got {num_patches}"
        )


def check_index(index: Tensor | None, images: Tensor) -> None:
    """Raise unless ``index`` is None or [B] int64; the op checks its values."""
    if index is None:
        return
    check_tensor("index", index, torch.int64, "[B]", images.device)
    if index.dim() != 1:
        raise ValueError(f"index must have shape [B], got {list(index.shape)}")


def check_sample_ids(sample_ids: Tensor | None, batch: int, device: torch.device) -> None:
    """Raise unless ``sample_ids`` is None or [B] int64; the op checks their values."""
    if sample_ids is None:
        return
    check_tensor("sample_ids", sample_ids, torch.int64, "[B]", device)
    if sample_ids.shape != (batch,):
        raise ValueError(f"sample_ids must have shape [{batch}], got {list(sample_ids.shape)}")


def threshold(name: str, probability: float) -> int:
    """The probability in units of 2^-32, rounded down: 1 is always, 0 is never."""
    if not isinstance(probability, (int, float)):
        raise TypeError(f"{name} must be a probability, got {type(probability).__name__}")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"{name} must be a probability from 0 to 1, got {probability}")
    return int(probability * 2**32)


def signed_seed(seed: int) -> int:
    """The seed as the int64 that has its 64 bits."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be at least -2^63 and below 2^64, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def random_key(
    seed: int | Tensor | None,
    step: int | Tensor,
    generator: Generator | None,
    device: torch.device,
) -> tuple[Tensor | None, int, int]:
    """(seed, step) as a tensor ``key`` where a tensor must hold them, else as two numbers."""
    compiling = torch.compiler.is_compiling()
    seed_value: int | Tensor
    if generator is not None:
        if seed is not None:
            raise ValueError(f"generator and seed exclude each other, got seed={seed}")
        if not isinstance(generator, Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        seed_value = int(_drawn_seed(generator))
    elif seed is None:
        seed_value = _drawn_seed(None)
        seed_value = seed_value if compiling else int(seed_value)
    elif isinstance(seed, Tensor):
        seed_value = _number("seed", seed, device)
    else:
        seed_value = signed_seed(seed)
    if isinstance(step, Tensor):
        step = _number("step", step, device)
    elif not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step must be an int, got {type(step).__name__}")
    if not isinstance(step, Tensor):
        check_step(step)
        if not isinstance(seed_value, Tensor):
            return None, seed_value, step
    # Both are put into one tensor on the device, without waiting for it.
    parts = [
        part.to(device) if isinstance(part, Tensor) else torch.full((), part, device=device)
        for part in (seed_value, step)
    ]
    return torch.stack(parts), 0, 0


def _number(name: str, value: Tensor, device: torch.device) -> int | Tensor:
    """The number in an int64 tensor, where reading it does not wait for a device."""
    if value.dtype != torch.int64 or value.dim() != 0:
        raise TypeError(
            f"{name} must be an int or an int64 tensor without axes, "
            f"got {value.dtype} of shape {list(value.shape)}"
        )
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        return int(value)
    if value.device != device:
        raise ValueError(f"{name} must be on {device} with the images, got {value.device}")
    return value


def _drawn_seed(generator: Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=device)


def result_dtype(
    images: Tensor, dtype: torch.dtype | None, mean: object, std: object
) -> torch.dtype:
    """Dtype of the patches; uint8 only as a plain copy of uint8."""
    if dtype is None:
        return images.dtype if images.is_floating_point() else torch.float32
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    if dtype not in IMAGE_DTYPES:
        raise TypeError(f"dtype must be uint8 or floating point, got {dtype}")
    if dtype == torch.uint8:
        if images.dtype != torch.uint8:
            raise TypeError(f"dtype must be floating point for images of {images.dtype}, got uint8")
        if mean is not None or std is not None:
            raise ValueError("dtype must be floating point with mean or std, got torch.uint8")
    return dtype


def affine_map(
    images: Tensor,
    dtype: torch.dtype,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
) -> tuple[list[float], list[float]]:
    """Scale and offset of the channels: C numbers, one for all, or none (identity)."""
    channels = images.shape[1]
    means = _per_channel("mean", mean, channels)
    stds = _per_channel("std", std, channels)
    if min(stds, default=1.0) <= 0.0:
        raise ValueError(f"std must be positive, got {std}")
    unit = 255.0 if images.dtype == torch.uint8 and dtype != torch.uint8 else 1.0
    scale = [1.0 / (unit * s) for s in stds] if stds else [1.0 / unit] if unit != 1.0 else []
    if stds and means:
        count = max(len(means), len(stds))
        pairs = zip(_spread(means, count), _spread(stds, count), strict=True)
        return scale, [-m / s for m, s in pairs]
    return scale, [-m for m in means]


def _spread(values: list[float], count: int) -> list[float]:
    return values * count if len(values) == 1 else values


def _per_channel(name: str, values: float | Sequence[float] | None, channels: int) -> list[float]:
    if values is None:
        return []
    numbers = [values] if isinstance(values, (int, float)) else values
    if not isinstance(numbers, (tuple, list)):
        _refuse_numbers(name, values, channels)
    for number in numbers:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            _refuse_numbers(name, values, channels)
    if numbers is values and len(numbers) != channels:
        raise ValueError(
            f"{name} must have one number or one per channel of the images, {channels}, "
            f"got {len(numbers)}"
        )
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {values}")
    return [float(number) for number in numbers]


def _refuse_numbers(name: str, values: object, channels: int) -> NoReturn:
    raise TypeError(
        f"{name} must be a number or a list of {channels} numbers, one per channel, got {values!r}"
    )


def check_out(
    out: Tensor, images: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout
) -> Tensor:
    """``out`` as [B, K, C, h, w], once the patches can be written with nobody else noticing."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype} (or pass dtype=), got {out.dtype}")
    if out.device != images.device:
        raise ValueError(f"out must be on {images.device} with the images, got {out.device}")
    wanted = layout.shown(shape)
    if tuple(out.shape) != wanted:
        raise ValueError(f"out must have shape {list(wanted)}, got {list(out.shape)}")
    out = out.permute(0, 1, 4, 2, 3) if layout.nhwc else out
    if layout.channels_last:
        if not out.permute(0, 1, 3, 4, 2).is_contiguous():
            raise ValueError(f"out must have channels last in memory, got strides {out.stride()}")
    elif not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if torch.is_grad_enabled() and (images.requires_grad or out.requires_grad):
        name = "images" if images.requires_grad else "out"
        raise ValueError(
            f"out cannot be used where {name} requires a gradient; use torch.no_grad()"
        )
    check_apart(out, {"images": images})
    return out


class Layout(NamedTuple):
    """Order of the result's axes and of its memory."""

    nhwc: bool
    channels_last: bool

    def shown(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape [B, K, C, h, w] as the user sees it."""
        b, k, c, h, w = shape
        return (b, k, h, w, c) if self.nhwc else (b, k, c, h, w)

    def show(self, data: Tensor) -> Tensor:
        """Patches [B, K, C, h, w] as the user sees them."""
        return data.permute(0, 1, 3, 4, 2) if self.nhwc else data


def check_layout(layout: str, memory_format: torch.memory_format) -> Layout:
    """Raise unless both are known and do not contradict each other."""
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f"layout must be 'NCHW' or 'NHWC', got {layout!r}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "memory_format must be torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )
    nhwc = layout == "NHWC"
    if nhwc and memory_format == torch.channels_last:
        raise ValueError("memory_format must be left out with layout='NHWC', which implies it")
    return Layout(nhwc, nhwc or memory_format == torch.channels_last)


def check_interpolation(interpolation: str, antialias: bool) -> str:
    """Raise unless the op knows the interpolation."""
    names = ("nearest", "bilinear")
    if interpolation not in names:
        raise ValueError(f"interpolation must be one of {', '.join(names)}, got {interpolation!r}")
    if not isinstance(antialias, bool):
        raise TypeError(f"antialias must be a bool, got {type(antialias).__name__}")
    return interpolation


def fill_values(images: Tensor, padding_mode: str, fill: float | Sequence[float]) -> list[float]:
    """The fill value of each channel, or none where nothing is filled or it is 0."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
        )
    values = _per_channel("fill", fill, images.shape[1])
    if padding_mode != "constant":
        if any(values):
            raise ValueError(f"fill needs padding_mode='constant', got {padding_mode!r}")
        return []
    if images.dtype == torch.uint8 and any(v != int(v) or not 0 <= v <= 255 for v in values):
        raise ValueError(f"fill must be an integer from 0 to 255 for uint8 images, got {fill}")
    return values if any(values) else []


def check_apart(out: Tensor, others: dict[str, Tensor | None]) -> None:
    """Raise if ``out`` lies between the first and the last element of another tensor."""
    if torch.compiler.is_compiling():
        return  # Addresses are not known yet.
    for name, other in others.items():
        if other is None or other.numel() == 0 or out.numel() == 0:
            continue
        extent = sum((n - 1) * s for n, s in zip(other.shape, other.stride(), strict=True)) + 1
        start = other.data_ptr()
        end = start + extent * other.element_size()
        if start < out.data_ptr() + out.numel() * out.element_size() and out.data_ptr() < end:
            raise ValueError(f"out must share no memory with {name}, but the two overlap")
