"""Clips, their resumption and errors; folders of sequences, and moving digits."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcontrast.data import load_sequences, mnist_sample, moving_digits
from fastcontrast.temporal import ClipSampler


def sequences(lengths: tuple[int, ...] = (9, 30, 12)) -> list[torch.Tensor]:
    """Frames that tell where they are from: 100 · sequence + time, twice."""
    return [
        (100 * s + torch.arange(length, dtype=torch.float32))[:, None].expand(-1, 2)
        for s, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("stride", [1, 3])
def test_clips_are_of_their_sequences(stride: int) -> None:
    sampler = ClipSampler(sequences(), clips=4, length=3, stride=stride, seed=1)
    chosen, starts = [], set()
    for step in range(60):
        found = sampler.batch(step)
        assert found.frames.shape == (4, 3, 2)
        told = 100 * found.sequence_ids + found.times
        assert torch.equal(found.frames, told[..., None].float().expand(-1, -1, 2))
        assert (found.times.diff(dim=1) == stride).all()
        chosen += found.sequence_ids[:, 0].tolist()
        first = torch.stack([found.sequence_ids[:, 0], found.times[:, 0]], 1)
        starts |= {tuple(pair) for pair in first.tolist()}
        assert found.flat().frames.shape == (12, 2)
    turns = torch.tensor(chosen).view(-1, 3)
    assert (turns.sort(1).values == torch.arange(3)).all()  # each once a turn
    assert len({tuple(turn) for turn in turns.tolist()}) == 6  # in every order
    reach = 2 * stride + 1
    for s, length in ((0, 9), (2, 12)):  # from the first start to the last
        assert {t for q, t in starts if q == s} == set(range(length - reach + 1))


def test_a_sampler_resumes_bit_for_bit() -> None:
    sampler = ClipSampler(sequences(), clips=2, length=4, seed=2**63 + 9)
    before = [next(sampler) for _ in range(5)]
    state = sampler.state_dict()
    assert state == {"seed": 2**63 + 9, "step": 5}
    after = [next(sampler) for _ in range(5)]
    resumed = ClipSampler(sequences(), clips=2, length=4, seed=0)
    resumed.load_state_dict(state)
    for one, other in zip(after, resumed, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[3], sampler.batch(3), strict=True))
    assert not all(torch.equal(a.times, b.times) for a, b in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="state must hold seed and step, got step"):
        resumed.load_state_dict({"step": 3})


def test_mistakes_are_named() -> None:
    named = {"walk": torch.zeros(9, 2), "jump": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match="sequence 'jump' has 4 frames, fewer than the 5 of a"):
        ClipSampler(named, clips=1, length=3, stride=2, seed=0)
    ClipSampler(named, clips=1, length=4, seed=0)  # exactly as long
    with pytest.raises(ValueError, match="at least one sequence"):
        ClipSampler([], clips=1, length=3, seed=0)
    with pytest.raises(ValueError, match=r"float32 \[3\] as sequence 1 and float32 \[2\] as"):
        ClipSampler([torch.zeros(9, 2), torch.zeros(9, 3)], clips=1, length=3, seed=0)
    with pytest.raises(TypeError, match="got int64 as sequence 0"):
        ClipSampler([torch.zeros(9, dtype=torch.int64)], clips=1, length=3, seed=0)
    with pytest.raises(TypeError, match="got list as sequence 0"):
        ClipSampler([[1.0, 2.0]], clips=1, length=1, seed=0)
    with pytest.raises(ValueError, match="clips must be at least 1"):
        ClipSampler(sequences(), clips=0, length=1, seed=0)


def test_folders_of_arrays(tmp_path: Path) -> None:
    arrays = {
        name: np.arange(20 * k, dtype=np.uint8).reshape(-1, 2, 2)
        for k, name in ((1, "b"), (3, "a"))
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    found = load_sequences(tmp_path)
    assert list(found) == ["a", "b"]
    clip = ClipSampler(found, clips=2, length=5, seed=0).batch(0)
    assert clip.frames.dtype == torch.uint8
    for frames, ids, times in zip(*clip, strict=True):
        array = list(found.values())[int(ids[0])]
        assert np.array_equal(frames.numpy(), array[times.numpy()])
    np.save(tmp_path / "c.npy", np.zeros((5, 3), np.uint8))
    with pytest.raises(ValueError, match=r"c\.npy: frames uint8 \[3\], but those of a\.npy"):
        load_sequences(tmp_path)
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY and no more")
    with pytest.raises(ValueError, match=r"a\.npy: not an array in \.npy form"):
        load_sequences(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_sequences(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.npy file"):
        load_sequences(tmp_path / "empty")


def test_moving_digits_move_and_bounce() -> None:
    found = moving_digits(12, 5, length=30, seed=3)
    frames = found.train_sequences
    assert frames.shape == (12, 30, 1, 48, 48)
    images, labels = mnist_sample().train_images[:, 0], mnist_sample().train_labels
    for sequence, label in zip(frames[:, :, 0], found.train_labels, strict=True):
        # A frame holds a digit of the sample, whole, at each time a few pixels further.
        corners = []
        for frame in sequence:
            inked = frame.nonzero()
            corners.append(inked.min(0).values)
        ink = torch.stack(corners)
        moved = ink.diff(dim=0).abs()
        assert (moved <= 3).all()
        assert moved.sum() > 0
        (y, x), shape = ink[0].tolist(), sequence[0].nonzero().max(0).values - ink[0] + 1
        digit = sequence[0][y : y + shape[0], x : x + shape[1]]
        same = images[labels == label].flatten(1).long().sum(1) == digit.long().sum()
        assert same.any()
        for (y, x), frame in zip(ink.tolist(), sequence, strict=True):
            assert torch.equal(frame[y : y + shape[0], x : x + shape[1]], digit)
            assert frame.long().sum() == digit.long().sum()
    assert not torch.equal(moving_digits(12, 5, length=30, seed=4).train_sequences, frames)


def test_moving_digits_are_the_same_bytes_everywhere() -> None:
    found = moving_digits(8, 2, length=6, digits=2, seed=11)
    assert found.train_labels.shape == (8, 2)
    parts = (found.train_sequences, found.train_labels, found.test_sequences, found.test_labels)
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    assert digest[:16] == "a22b8577c59fedff"
    with pytest.raises(ValueError, match=r"size must lie in 28\.\.4096, got 20"):
        moving_digits(1, 1, size=20)
    with pytest.raises(TypeError, match="length must be an integer, got float"):
        moving_digits(1, 1, length=2.5)  # pyright: ignore[reportArgumentType]
