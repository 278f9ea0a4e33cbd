"""Error against float64 over pair distance and temperature: ours, eager, torch.compile, peers.

``python -m benchmarks.numerics --out DIR`` writes numerics.json and two pictures, which
docs/numerics.md shows. Every implementation gets the same float32 points; the truth is the same
equation in float64, by direct differences and softplus. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcontrast
from benchmarks.environment import describe

ROWS, DIM = 256, 128
DISTANCES = [10.0**-k for k in (0, 1, 2, 3, 4, 5, 6)]
TEMPERATURES = [5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2, 3e-2, 0.1, 0.3, 1.0, 10.0, 100.0]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x, y and a temperature
# Colours that stand out from white and from the dark page alike.
STYLES = {
    "fastcontrast": ("#2f81c7", "o", "-"),
    "eager": ("#d0464b", "s", "--"),
    "torch.compile": ("#d4772a", "^", "--"),
    "pytorch-metric-learning": ("#3f8f3f", "v", ":"),
    "sentence-transformers": ("#9466bd", "d", ":"),
    "info-nce-pytorch": ("#808080", "x", ":"),
}


def eager_l2(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    return F.cross_entropy(-torch.cdist(x, y) / temperature, torch.arange(len(x)))


def eager_cosine(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    s = F.normalize(x) @ F.normalize(y).T
    return F.cross_entropy(s / temperature, torch.arange(len(x)))


def truth(x: Tensor, y: Tensor, temperature: Tensor, metric: str) -> Tensor:
    y, temperature = y.double(), temperature.double()
    if metric == "cosine":
        s = F.normalize(x) @ F.normalize(y).T / temperature
    else:
        s = -(x[:, None] - y[None]).square().sum(2).sqrt() / temperature
    others = s.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    return F.softplus(others.logsumexp(1) - s.diagonal(), threshold=700.0).mean()


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def implementations(metric: str) -> dict[str, Loss]:
    """Losses with the pair on the diagonal, under one metric."""
    eager = eager_l2 if metric == "l2" else eager_cosine
    found: dict[str, Loss] = {
        "fastcontrast": lambda x, y, t: fastcontrast.info_nce_loss(
            x, y, metric=metric, temperature=t
        ),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    pml = installed("pytorch_metric_learning.losses")
    if pml is not None:
        kinds = importlib.import_module("pytorch_metric_learning.distances")
        distance = kinds.LpDistance(normalize_embeddings=False)
        distance = distance if metric == "l2" else kinds.CosineSimilarity()
        rows = torch.arange(ROWS)
        found["pytorch-metric-learning"] = lambda x, y, t: pml.NTXentLoss(
            temperature=t.item(), distance=distance
        )(x, rows, ref_emb=y, ref_labels=rows.clone())
    ranking = installed("sentence_transformers.sentence_transformer.losses")
    if ranking is not None:
        util = importlib.import_module("sentence_transformers.util")
        similarity = util.euclidean_sim if metric == "l2" else util.cos_sim

        def rank(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
            loss = ranking.MultipleNegativesRankingLoss(
                torch.nn.Identity(), scale=1 / t.item(), similarity_fct=similarity
            )
            return loss.compute_loss_from_embeddings([x, y], torch.empty(0))

        found["sentence-transformers"] = rank
    peer = installed("info_nce")
    if peer is not None and metric == "cosine":
        found["info-nce-pytorch"] = lambda x, y, t: peer.info_nce(x, y, temperature=t)
    return found


def errors(metric: str, x: Tensor, y: Tensor, temperature: float) -> dict[str, list[float]]:
    """Relative error of the loss and of the gradient by x, of every implementation."""
    t = torch.tensor(temperature)
    x, exact = x.requires_grad_(), x.detach().double().requires_grad_()
    value = truth(exact, y, t, metric)
    (gradient,) = torch.autograd.grad(value, exact)
    result = {}
    for name, loss in implementations(metric).items():
        mine = loss(x, y, t)
        (own,) = torch.autograd.grad(mine, x)
        difference = (own.double() - gradient).norm() / gradient.norm()
        result[name] = [abs(mine.item() / value.item() - 1), difference.item()]
    return result


def measure() -> dict[str, Any]:
    """Errors of both series, on CPU."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(ROWS, DIM, generator=generator)
    noise = torch.randn(ROWS, DIM, generator=generator)
    noise = noise / noise.norm(dim=1, keepdim=True)
    near = [errors("l2", y + d * noise, y, 1.0) for d in DISTANCES]
    x = y + 11 * noise  # a cosine of about 0.7
    sharp = [errors("cosine", x, y, t) for t in TEMPERATURES]
    return {
        "environment": describe(),
        "rows": ROWS,
        "dim": DIM,
        "distance": {"values": DISTANCES, "errors": near},
        "temperature": {"values": TEMPERATURES, "errors": sharp},
    }


def draw_errors(axes: Any, series: dict[str, Any], what: str, label: str) -> None:
    """Errors of the "loss" or the "gradient" over a series, on logarithmic axes."""
    column = ("loss", "gradient").index(what)
    for name, (color, marker, line) in STYLES.items():
        if name not in series["errors"][0]:
            continue
        values = [max(e[name][column], 1e-9) for e in series["errors"]]
        values = [v if v == v else float("inf") for v in values]
        axes.plot(
            series["values"], values, color=color, marker=marker, linestyle=line, label=name,
            markersize=5, zorder=3 if name == "fastcontrast" else 2,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=f"relative error of the {what}")
    axes.axhline(1.0, color="#8a8a8a", linewidth=0.8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw(series: dict[str, Any], label: str, title: str, path: Path) -> None:
    """Loss and gradient errors side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for column, what in enumerate(("loss", "gradient")):
        draw_errors(figure.add_subplot(1, 2, column + 1), series, what, label)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    result = measure()
    (out / "numerics.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(
        result["distance"], "distance of a pair", "InfoNCE on distances, temperature 1, float32",
        out / "numerics_distance.png",
    )  # fmt: skip
    draw(
        result["temperature"], "temperature", "InfoNCE on cosines, pairs at about 0.7, float32",
        out / "numerics_temperature.png",
    )  # fmt: skip
    for name in ("distance", "temperature"):
        for value, found in zip(result[name]["values"], result[name]["errors"], strict=True):
            row = "  ".join(f"{k} {e[0]:.1e}/{e[1]:.1e}" for k, e in found.items())
            print(f"{name} {value:g}: {row}")


if __name__ == "__main__":
    main()
