"""Schedules, layers of configuration, presets, and what a batch is cut to."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcontrast import cli
from fastcontrast.train.batches import Pixels, hold_out, pixels_of, shuffled_batch
from fastcontrast.train.clock import Clock
from fastcontrast.train.config import SemisupConfig, SpatialConfig, TripletConfig
from fastcontrast.train.presets import PRESETS
from fastcontrast.train.schedules import Schedule, plateaus
from fastcontrast.train.settings import configure, layered


def test_schedules_are_their_formulas():
    def schedule(kind, **options):
        return Schedule(kind, 0.8, 100, **options)

    cosine = [schedule("cosine").at(step) for step in (0, 25, 50, 100)]
    np.testing.assert_allclose(cosine, [0.8, 0.4 * (1 + math.sqrt(0.5)), 0.4, 0], atol=1e-15)
    steps = schedule("step", drops=(10, 20))
    np.testing.assert_allclose([steps.at(s) for s in (9, 10, 20)], [0.8, 0.08, 0.008])
    decayed = schedule("constant", decay=0.5)
    np.testing.assert_allclose([decayed.at(s) for s in (0, 2, 4)], [0.8, 0.4, 0.8 / 3])
    plateau = schedule("plateau", patience=2, max_drops=2)
    watched = [3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    rates = [plateau.at(0, watched[:n]) for n in range(9)]
    np.testing.assert_allclose(rates, [0.8] * 4 + [0.08] * 3 + [0.008] * 2)
    assert not plateau.is_over(watched)
    assert plateau.is_over([*watched, 1.0])
    assert not steps.is_over(watched)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 4))
def test_plateaus_are_counted_as_by_hand(figures, patience):
    count, since = 0, 0
    for i, figure in enumerate(figures):
        since = 0 if all(figure < earlier for earlier in figures[:i]) else since + 1
        if since == patience:
            count, since = count + 1, 0
    assert plateaus(figures, patience) == count


def test_layers_go_over_each_other(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'preset = "mnist-paper"\nbatch_size = 16\nlearning-rate = 1\nlr_drops = [5, 9]\n'
    )
    flags = ["--config", str(file), "--batch-size", "8", "--seed=3"]
    config = configure(SemisupConfig, "", flags)
    assert config.batch_size == 8  # flag over file
    assert (config.learning_rate, config.lr_drops) == (1.0, (5, 9))  # file over preset
    assert (config.squared, config.steps) == (True, 168_480)  # preset over defaults
    assert (config.momentum, config.seed) == (0.9, 3)
    other = configure(SemisupConfig, "", ["--preset=mnist-code", "--config", str(file)])
    assert (other.batches, other.batch_size) == ("code", 16)  # a flag chooses another preset
    assert layered(SemisupConfig, None, None) == SemisupConfig()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("stepz = 3", "unknown key 'stepz'"),
        ("steps = 3.5", "steps is 3.5; wanted int"),
        ("steps = true", "steps is True; wanted int"),
        ('squared = "yes"', "squared is 'yes'; wanted bool"),
        ("lr_drops = 3", "lr_drops is 3; wanted a list"),
        ('lr_drops = ["a"]', "lr_drops is 'a'; wanted int"),
        ('schedule = "linear"', "wanted 'step' or 'cosine' or 'plateau' or 'constant'"),
        ("steps = 0", "steps is 0; wanted at least 1"),
        ("steps =", "not TOML"),
        ('preset = "mnist"', "preset is 'mnist'; semisup has mnist-paper"),
        (None, "no such file"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, content, said):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "run.toml").write_text(content)
    assert cli.main(["train", "semisup", "--config", "run.toml"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "run.toml" in error or "preset" in said
    assert not (tmp_path / "runs").exists()


def test_presets_are_the_papers():
    for recipe, presets in PRESETS.items():
        assert all(config.recipe == recipe for config in presets.values())
    paper = PRESETS["triplet"]["cifar10-paper"]
    assert isinstance(paper, TripletConfig)
    assert paper.steps * paper.batch_size == 30 * 640_000
    assert (paper.learning_rate, paper.momentum, paper.dampening) == (0.5, 0.9, 0.9)
    code = PRESETS["triplet"]["stl10-code"]
    assert (code.dropout, code.lr_decay, code.rates.at(150_000)) == (0.25, 1e-6, 0.1 / 1.15)
    semisup = PRESETS["semisup"]["mnist-paper"]
    assert isinstance(semisup, SemisupConfig)
    assert (semisup.squared, semisup.nesterov, semisup.steps) == (True, True, 90 * 1872)
    np.testing.assert_allclose(semisup.rates.at(60 * 1872), 0.001)
    assert {c.schedule for c in PRESETS["spatial"].values()} == {"plateau"}
    assert PRESETS["spatial"]["cifar10-paper"].labels_per_class == 400


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        (TripletConfig, {"held_out": 0.0, "schedule": "plateau"}, "held_out is 0"),
        (TripletConfig, {"dropout": 1.0}, "dropout"),
        (TripletConfig, {"margin": 0.0}, "margin"),
        (TripletConfig, {"nesterov": True}, "nesterov wants"),
        (SpatialConfig, {"batch_size": 1}, "batch_size"),
        (SpatialConfig, {"patch_size": 0}, "patch_size"),
        (SpatialConfig, {"slope": 2.0}, "slope"),
        (SemisupConfig, {"label_seed": -2}, "label_seed"),
    ],
)
def test_configurations_refuse_by_name(kind, wrong, said):
    with pytest.raises(ValueError, match=said):
        kind(**wrong)


def test_global_statistics_and_cutting_are_the_formula():
    images = torch.randint(0, 256, (7, 3, 6, 5), dtype=torch.uint8)
    pixels = pixels_of(images, "global")
    assert pixels.mean == pytest.approx(images.double().mean().item(), rel=1e-12)
    assert pixels.std == pytest.approx(images.double().std(unbiased=False).item(), rel=1e-12)
    index = torch.tensor([6, 0, 0])
    expected = ((images[index].double() - pixels.mean) / pixels.std).float()
    # One rounding of a product and a sum in float32, of numbers below 3.
    torch.testing.assert_close(pixels.cut(images, index), expected, atol=1e-6, rtol=0)


def test_shifted_images_show_the_mean_beyond_their_border():
    images = torch.full((40, 1, 8, 8), 200, dtype=torch.uint8)
    images[:, :, :, 0] = 255
    pixels = Pixels(100.0, 50.0)
    shifted = pixels.cut(images, torch.arange(40), shift=2, mirror=True, seed=1, step=4)
    again = pixels.cut(images, torch.arange(40), shift=2, mirror=True, seed=1, step=4)
    assert torch.equal(shifted, again)
    assert not torch.equal(shifted, pixels.cut(images, torch.arange(40), shift=2, seed=1, step=5))
    values = {round(v, 4) for v in shifted.unique().tolist()}
    assert values == {0.0, 2.0, 3.1}  # beyond the border, inside, the bright column
    bright = (shifted[:, 0] > 3).any(1).float().argmax(1)  # its place in each image
    assert bright.min() <= 1
    assert bright.max() >= 6  # mirrored


def test_an_epoch_takes_every_image_once():
    steps = [shuffled_batch(10, 3, seed=0, step=step) for step in range(6)]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert len(set(first)) == len(set(second)) == 9
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(shuffled_batch(10, 3, seed=0, step=1), steps[1])
    assert sorted(shuffled_batch(4, 9, seed=0, step=2)) == [0, 1, 2, 3]


def test_a_tenth_of_every_class_is_held_out():
    labels = torch.arange(300) % 3
    kept, held = hold_out(labels, 0.1, seed=0)
    assert labels[held].bincount().tolist() == [10, 10, 10]
    assert sorted([*kept, *held]) == list(range(300))
    assert len(hold_out(labels, 0.0, seed=0)[1]) == 0
    assert len(hold_out(torch.tensor([0] * 4 + [1]), 0.1, seed=0)[1]) == 2


def test_the_clock_leaves_the_first_step_out(monkeypatch):
    times = iter([0.0, 5.0, 9.0, 10.0, 10.0, 10.5, 13.5, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"), images_per_step=12)
    for _ in range(2):
        clock.start()
        for part in ("data", "model", "loss"):
            clock.lap(part)
        clock.end()
    assert clock.read() == {"images_per_second": 3.0, "data": 0.125, "model": 0.75, "loss": 0.125}
    assert clock.read() == {}


def test_torch7s_sgd_is_ours_with_dampening():
    """Constant gradient 1, 400 steps at 0.5: x = -200.0; undamped at 0.05, -195.5."""
    ends = []
    for rate, dampening in ((0.5, 0.9), (0.05, 0.0)):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=rate, momentum=0.9, dampening=dampening)
        for _ in range(400):
            x.grad = torch.ones_like(x)
            optimizer.step()
        ends.append(x.item())
    assert ends == pytest.approx([-200.0, -195.5], abs=0.05)


def test_every_field_of_a_preset_can_be_said_in_a_file(tmp_path):
    """The saved form of a preset is a file that gives the same configuration back."""
    for recipe, presets in PRESETS.items():
        for name, preset in presets.items():
            lines = []
            for field in dataclasses.fields(preset):
                value = getattr(preset, field.name)
                if isinstance(value, bool):
                    value = str(value).lower()
                elif isinstance(value, tuple):
                    value = list(value)
                elif not isinstance(value, (int, float)):
                    value = f'"{value}"'
                lines.append(f"{field.name} = {value}\n")
            file = tmp_path / f"{recipe}-{name}.toml"
            file.write_text("".join(lines))
            assert layered(type(preset), None, str(file)) == preset
