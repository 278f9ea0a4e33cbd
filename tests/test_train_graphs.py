"""--cuda-graphs: a recorded run is the eager one.

Here a stand-in records and replays. As a GPU does, it runs nothing while recording, reads and
writes the same memory at each replay, and touches no ``.grad`` then.
"""

import copy
import dataclasses

import pytest
import torch
from mnist_files import write_mnist
from runs_of import assert_same_run, stop_after

from fastcontrast.train import plots, stage
from fastcontrast.train.config import SemisupConfig, SpatialConfig, TemporalConfig, TripletConfig
from fastcontrast.train.graphs import WARM_UP, CudaRecorder, RecordedStep
from fastcontrast.train.runs import read_metrics
from fastcontrast.train.semisup import train_semisup
from fastcontrast.train.spatial import train_spatial
from fastcontrast.train.triplet import train_triplet

COMMON = {"steps": 7, "batch_size": 8, "threads": 1, "eval_every": 5, "log_every": 1}
# Dropout and a rate that falls; the step's number in the loss; three parts of the loss.
RECIPES = {
    "triplet": (train_triplet, TripletConfig, {"lr_drops": (4, 6), "ema": 0.5, "held_out": 0.3}),
    "spatial": (
        train_spatial,
        SpatialConfig,
        {"pretraining_steps": 7, "labels_per_class": 4, "shift": 1, "head_dropout": 0.5},
    ),
    "semisup": (train_semisup, SemisupConfig, {"labels_per_class": 2, "amp": True}),
}


class StandIn:
    """Records and replays a step of a model on the CPU."""

    def __init__(self, model):
        self.model, self.replays = model, 0

    def warm_up(self, call):
        return call()

    def record(self, call):
        before, random = copy.deepcopy(self.model.state_dict()), torch.get_rng_state()
        parts = call()
        self.model.load_state_dict(before)
        torch.set_rng_state(random)
        parameters = list(self.model.parameters())
        memory = [parts, *[p.grad for p in parameters]]
        for tensor in memory:
            tensor.fill_(torch.nan)  # a graph that was not replayed has written nothing

        def replay():
            self.replays += 1
            others = [p.grad for p in parameters]
            found = call()
            for own, new in zip(memory, [found, *[p.grad for p in parameters]], strict=True):
                own.copy_(new)
            for parameter, other in zip(parameters, others, strict=True):
                parameter.grad = other
            return parts

        return replay


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])
    return str(write_mnist(tmp_path / "data", train=120))


@pytest.fixture
def stand_ins(monkeypatch):
    """A stand-in for each stage that is trained, where the device is not asked for."""
    models, made = [], []
    place = stage.place

    def placed(model, device):
        models.append(model)
        place(model, device)

    monkeypatch.setattr(stage, "place", placed)
    monkeypatch.setattr(stage, "check_switches", lambda *_: None)
    monkeypatch.setattr(stage, "CudaRecorder", lambda: made.append(StandIn(models[-1])) or made[-1])
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recorded_run_is_the_eager_one_to_the_bit(data, tmp_path, stand_ins, recipe, monkeypatch):
    train, kind, options = RECIPES[recipe]
    eager = kind(data=data, out_dir=tmp_path, device="cpu", name="eager", **COMMON, **options)
    truth = train(eager)
    assert not stand_ins
    recorded = dataclasses.replace(eager, name="recorded", cuda_graphs=True)
    assert_same_run(train(recorded).run, truth.run)
    assert [s.replays for s in stand_ins] == [7 - WARM_UP] * len(stand_ins)
    stopped = dataclasses.replace(recorded, name="stopped")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)  # after two replays
        assert train(stopped).interrupted
    assert_same_run(train(dataclasses.replace(stopped, resume=True)).run, truth.run)


def test_a_batch_of_another_shape_runs_eagerly():
    """And the gradients of the next replay are where the optimiser looks for them."""
    model = torch.nn.Linear(3, 2)

    def gradients(images, targets):
        model.zero_grad(set_to_none=True)
        loss = (model(images) * targets[0]).square().sum() * targets[1]
        loss.backward()
        return loss.detach()[None]

    stand_in = StandIn(model)
    recorded = RecordedStep(gradients, model.parameters(), stand_in)
    for step, rows in enumerate([4, 4, 4, 4, 3, 4, 2, 4]):
        images, scale = torch.randn(rows, 3), torch.rand(2)
        found = recorded(images, (scale, step)).clone()
        grads = [p.grad for p in model.parameters()]
        truth = gradients(images, (scale, step))
        assert torch.equal(found, truth)
        true_grads = [p.grad for p in model.parameters()]
        torch.testing.assert_close(grads, true_grads, rtol=0, atol=0)
    assert stand_in.replays == 3  # of six batches of four


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "cuda_graphs is True; wanted a CUDA device, but the device is cpu"),
        ({"compile": "default"}, "compile is 'default'; wanted 'off' with cuda_graphs"),
    ],
)
def test_refused_by_name(data, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        train_semisup(
            SemisupConfig(data=data, out_dir=tmp_path, device="cpu", cuda_graphs=True, **options)
        )
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_queue_is_not_recorded():
    with pytest.raises(ValueError, match="cuda_graphs is True; wanted False, or a contrast other"):
        SpatialConfig(cuda_graphs=True, contrast="queue")
    SpatialConfig(cuda_graphs=True, contrast="hard-negative")


def test_neighbours_in_time_are_not_recorded():
    with pytest.raises(ValueError, match="cuda_graphs is True; wanted False, or objective 'auto"):
        TemporalConfig(cuda_graphs=True)
    TemporalConfig(cuda_graphs=True, objective="autoencoder")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_gpu_the_losses_are_those_of_the_eager_run(data, tmp_path, recipe, monkeypatch):
    train, kind, options = RECIPES[recipe]
    recordings = []
    record = CudaRecorder.record
    monkeypatch.setattr(
        CudaRecorder, "record", lambda self, call: recordings.append(1) or record(self, call)
    )
    eager = kind(data=data, out_dir=tmp_path, device="cuda", name="eager", **COMMON, **options)
    recorded = dataclasses.replace(eager, name="recorded", cuda_graphs=True)
    runs = [train(config).run for config in (eager, recorded)]
    assert recordings
    folders = [[run, *map(type(run), run.stages)] for run in runs]
    for one, other in zip(*folders, strict=True):
        losses = [[r["loss"] for r in read_metrics(f) if "loss" in r] for f in (one, other)]
        # The same kernels; cuDNN's sums of gradients come in any order, and seven steps carry on.
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
