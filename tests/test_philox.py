"""Random coordinates: the generator, the frozen counter layout, the promises of the seed."""

from __future__ import annotations

import hashlib

import pytest
import torch
from variants import on_every_backend

from fastcontrast import backends, sample_coords
from fastcontrast.backends.native import _C
from fastcontrast.backends.reference.sample_coords import philox4x32

# kat_vectors of Random123 for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """The algorithm of Salmon et al. (2011), with Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def draw_in_python(
    seed: int, step: int, sample_id: int, k: int, image_size: tuple[int, int],
    size: tuple[int, int], hflip: float, vflip: float,
) -> tuple[list[int], int]:  # fmt: skip
    """One patch by the counter layout, version 1, as the documentation states it."""
    seed %= 2**64
    counter = [
        step & 0xFFFFFFFF,
        step >> 32,  # draw 0 in the upper half
        sample_id & 0xFFFFFFFF,
        sample_id >> 32 | k << 8,
    ]
    w = philox_in_python(counter, [seed & 0xFFFFFFFF, seed >> 32])
    y0 = w[0] * (image_size[0] - size[0] + 1) >> 32
    x0 = w[1] * (image_size[1] - size[1] + 1) >> 32
    flip = (w[2] < int(hflip * 2**32)) | (w[3] < int(vflip * 2**32)) << 1
    return [y0, x0, *size], flip


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    assert philox_in_python(words(counter), words(key)) == words(answer)
    tensors = tuple(torch.tensor(word) for word in words(counter))
    low, high = words(key)
    assert [int(word) for word in philox4x32(tensors, (low, high))] == words(answer)
    if _C is not None:
        assert list(_C.philox4x32(words(counter), low | high << 32)) == words(answer)


def test_vectorised_generator_equals_the_loop() -> None:
    counter = torch.randint(0, 2**32, (4, 2000))
    key = [0xDEADBEEF, 0xFFFFFFFF]
    result = torch.stack(philox4x32(tuple(counter), (key[0], key[1]))).T.tolist()
    assert result == [philox_in_python(c, key) for c in counter.T.tolist()]


@on_every_backend("extract_patches")
def test_zero_counter_is_the_known_answer(backend: str) -> None:
    """Seed, step, sample and patch 0 are Random123's first vector; a side of 2³⁰ shows its bits."""
    w = words(KNOWN_ANSWERS[0][2])

    def zero_draw(hflip: float, vflip: float) -> tuple[list[int], int]:
        coords, flips = sample_coords(
            1, 1, (2**30, 2**31 - 1), 1, hflip=hflip, vflip=vflip, seed=0, backend=backend
        )
        return coords[0, 0].tolist(), int(flips)

    # w2 < floor(p·2³²) is strict, and p is exact: one unit decides.
    box = [w[0] >> 2, w[1] * (2**31 - 1) >> 32, 1, 1]
    assert zero_draw(w[2] / 2**32, (w[3] + 1) / 2**32) == (box, 2)
    assert zero_draw((w[2] + 1) / 2**32, w[3] / 2**32) == (box, 1)


# Values that reach every bit of every field of the counter and the key.
EXTREMES = [
    dict(seed=0, step=0, first_id=0),
    dict(seed=2**64 - 1, step=2**48 - 1, first_id=2**40 - 50),
    dict(seed=-1, step=2**32, first_id=2**32 - 25),
    dict(seed=2**63, step=2**32 - 1, first_id=2**39),
    dict(seed=0x0123456789ABCDEF, step=0xBA9876543210, first_id=0xFEDCBA0000),
]


@pytest.mark.parametrize("extreme", EXTREMES)
@on_every_backend("extract_patches")
def test_layout_version_1(backend: str, extreme: dict[str, int]) -> None:
    ids = torch.arange(extreme["first_id"], extreme["first_id"] + 50)
    seed, step = extreme["seed"], extreme["step"]
    options = dict(image_size=(97, 1000), size=(32, 1), hflip=0.3, vflip=0.8)
    coords, flips = sample_coords(
        50, 6, **options, seed=seed, step=step, sample_ids=ids, backend=backend
    )
    expected = [
        [draw_in_python(seed, step, i, k, **options) for k in range(6)] for i in ids.tolist()
    ]
    assert coords.dtype == torch.int32
    assert flips.dtype == torch.uint8
    assert coords.tolist() == [[box for box, _ in row] for row in expected]
    assert flips.tolist() == [[flip for _, flip in row] for row in expected]


@on_every_backend("extract_patches")
def test_many_patches(backend: str) -> None:
    options = dict(image_size=(512, 512), size=(32, 32), hflip=0.5, vflip=0.5)
    coords, flips = sample_coords(1, 70_000, **options, seed=3, backend=backend)
    for k in (69_999, 65_536, 256):
        assert (coords[0, k].tolist(), int(flips[0, k])) == draw_in_python(3, 0, 0, k, **options)


def test_backends_agree_bit_for_bit() -> None:
    """Over 10⁵ draws, at large seeds, steps and ids; the digest holds the layout for ever."""
    ids = torch.arange(2000) * 549755813 % 2**40
    digests = {}
    for name in backends.available_backends("extract_patches"):
        coords, flips = sample_coords(
            2000, 64, (480, 641), (37, 224), hflip=0.5, vflip=0.25, seed=2**63 + 12345,
            step=2**47 + 99, sample_ids=ids, backend=name,
        )  # fmt: skip
        digest = hashlib.sha256(coords.numpy().tobytes() + flips.numpy().tobytes())
        digests[name] = digest.hexdigest()[:16]
    assert set(digests.values()) == {"4c47dc418ce46758"}, digests


@on_every_backend("extract_patches")
def test_larger_k_keeps_the_first_patches(backend: str) -> None:
    options = dict(image_size=64, size=8, hflip=0.5, vflip=0.5, seed=5, step=7, backend=backend)
    many, many_flips = sample_coords(16, 40, **options)
    few, few_flips = sample_coords(16, 3, **options)
    assert torch.equal(many[:, :3], few)
    assert torch.equal(many_flips[:, :3], few_flips)


@on_every_backend("extract_patches")
def test_patches_follow_the_sample_not_the_batch(backend: str) -> None:
    """Any batch size, order or rank: the same sample has the same patches."""
    options = dict(image_size=64, size=8, hflip=0.5, seed=5, step=7, backend=backend)
    whole, whole_flips = sample_coords(12, 4, **options)
    order = torch.randperm(12)
    shuffled, shuffled_flips = sample_coords(12, 4, sample_ids=order, **options)
    assert torch.equal(shuffled, whole[order])
    assert torch.equal(shuffled_flips, whole_flips[order])
    ranks = [sample_coords(6, 4, sample_ids=torch.arange(r, 12, 2), **options) for r in (0, 1)]
    assert torch.equal(torch.stack([c for c, _ in ranks], 1).flatten(0, 1), whole)
    strided = torch.stack([order, order], 1)[:, 0]  # ids that are not contiguous
    assert torch.equal(sample_coords(12, 4, sample_ids=strided, **options)[0], whole[order])


@on_every_backend("extract_patches")
def test_seed_and_step_change_the_patches(backend: str) -> None:
    def draw(seed: int, step: int) -> torch.Tensor:
        return sample_coords(8, 4, 512, 8, seed=seed, step=step, backend=backend)[0]

    assert torch.equal(draw(1, 2), draw(1, 2))
    assert torch.equal(draw(-1, 2), draw(2**64 - 1, 2))
    assert not torch.equal(draw(1, 2), draw(1, 3))
    assert not torch.equal(draw(1, 2), draw(1 + 2**40, 2))
    step = torch.tensor(2)
    assert torch.equal(draw(1, 2), sample_coords(8, 4, 512, 8, seed=1, step=step)[0])


def chi_square(counts: torch.Tensor) -> float:
    """Number of standard deviations by which the counts are farther from uniform than expected."""
    expected = counts.sum().double() / counts.numel()
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@on_every_backend("extract_patches")
def test_positions_and_flips_are_uniform(backend: str) -> None:
    """Chi-square at a fixed seed, 10⁵ draws: a good generator is within 4 deviations."""
    coords, flips = sample_coords(
        1000, 100, (40, 96), (32, 32), hflip=0.5, vflip=0.25, seed=42, backend=backend
    )
    y0, x0 = coords[..., 0].flatten().long(), coords[..., 1].flatten().long()
    assert (int(y0.min()), int(y0.max())) == (0, 8)
    assert (int(x0.min()), int(x0.max())) == (0, 64)
    assert abs(chi_square(torch.bincount(y0, minlength=9))) < 4
    assert abs(chi_square(torch.bincount(x0, minlength=65))) < 4
    assert abs(chi_square(torch.bincount(y0 * 65 + x0, minlength=585))) < 4  # independent
    for bit, probability in ((1, 0.5), (2, 0.25)):
        share = float(((flips & bit) != 0).double().mean())
        assert abs(share - probability) < 4 * (probability * (1 - probability) / 1e5) ** 0.5


@on_every_backend("extract_patches")
def test_certain_and_impossible_flips(backend: str) -> None:
    def flips(hflip: float, vflip: float) -> set[int]:
        drawn = sample_coords(50, 50, 9, 3, hflip=hflip, vflip=vflip, seed=0, backend=backend)[1]
        return set(drawn.flatten().tolist())

    assert flips(0.0, 0.0) == {0}
    assert flips(1.0, 0.0) == {1}
    assert flips(0.0, 1.0) == {2}
    assert flips(1, 1) == {3}
    assert flips(0.5, 0.5) == {0, 1, 2, 3}


@on_every_backend("extract_patches")
def test_patch_as_large_as_the_image_and_empty_draws(backend: str) -> None:
    coords, _ = sample_coords(3, 2, (8, 9), (8, 9), seed=0, backend=backend)
    assert torch.equal(coords, torch.tensor([0, 0, 8, 9], dtype=torch.int32).expand(3, 2, 4))
    for batch, num_patches in ((0, 3), (3, 0), (0, 0)):
        coords, flips = sample_coords(batch, num_patches, 8, 4, seed=0, backend=backend)
        assert coords.shape == (batch, num_patches, 4)
        assert flips.shape == (batch, num_patches)
    ids = torch.empty(0, dtype=torch.int64)
    assert sample_coords(0, 2, 8, 4, seed=0, sample_ids=ids, backend=backend)[0].shape == (0, 2, 4)


ERRORS = [
    (dict(batch=-1), ValueError, "batch must be at least 0, got -1"),
    (dict(batch=2.0), TypeError, "batch must be an int, got float"),
    (dict(num_patches=-1), ValueError, r"num_patches must be at least 0 and at most 2\^24, got -1"),
    (dict(num_patches=2**24 + 1), ValueError, "num_patches must be .* got 16777217"),
    (dict(num_patches=True), TypeError, "num_patches must be an int, got bool"),
    (dict(size=9), ValueError, "patches of 9x9 pixels are larger than images of 8x8"),
    (dict(size=(8, 9)), ValueError, "patches of 8x9 pixels are larger than images of 8x8"),
    (dict(size=0), ValueError, "size must be at least 1x1 pixels, got 0x0"),
    (dict(size=(1, 2, 3)), TypeError, "size must be an int or a pair"),
    (dict(size=4.0), TypeError, "size must be an int or a pair .* got 4.0"),
    (dict(image_size=2**31), ValueError, r"smaller than 2\^31 pixels a side, got 2147483648x"),
    (dict(image_size="8"), TypeError, "image_size must be an int or a pair"),
    (dict(hflip=1.5), ValueError, "hflip must be a probability from 0 to 1, got 1.5"),
    (dict(vflip=-0.1), ValueError, "vflip must be a probability from 0 to 1, got -0.1"),
    (dict(vflip=float("nan")), ValueError, "vflip must be a probability from 0 to 1, got nan"),
    (dict(hflip="1"), TypeError, "hflip must be a probability, got str"),
    (dict(seed=2**64), ValueError, r"seed must be at least -2\^63 and below 2\^64"),
    (dict(seed=0.5), TypeError, "seed must be an int, got float"),
    (dict(seed=None), TypeError, "seed must be an int, got None"),
    (dict(step=-1), ValueError, r"step must be at least 0 and below 2\^48, got -1"),
    (dict(step=2**48), ValueError, r"step must be at least 0 and below 2\^48"),
    (dict(step=torch.tensor(2**48)), ValueError, r"step must be at least 0 and below 2\^48"),
    (dict(step=torch.tensor(1.0)), TypeError, "step must be an int or an int64 tensor"),
    (dict(step=1.5), TypeError, "step must be an int, got float"),
    (dict(sample_ids=torch.tensor([0, -1])), ValueError, "sample_ids must be .* from -1 to 0"),
    (dict(sample_ids=torch.tensor([0, 2**40])), ValueError, r"sample_ids must be .* below 2\^40"),
    (dict(sample_ids=torch.zeros(3).long()), ValueError, r"sample_ids must have shape \[2\], got"),
    (dict(sample_ids=torch.zeros(2)), TypeError, r"sample_ids .* torch.int64, got torch.float32"),
    (dict(sample_ids=[0, 1]), TypeError, "sample_ids must be a tensor .* got list"),
    (dict(backend="nobody"), ValueError, "backend must be None or one of"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors(wrong: dict, error: type[Exception], message: str) -> None:
    arguments = dict(batch=2, num_patches=3, image_size=8, size=4, seed=0) | wrong
    with pytest.raises(error, match=message):
        sample_coords(**arguments)
