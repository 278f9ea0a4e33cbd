"""The drop-ins against the libraries that they stand for: values and gradients, all options."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR
from torch import Tensor, nn

from fastcontrast.compat import grad_cache, info_nce, lightly, open_clip

# float64: the peers' own rounding, over sums of a few hundred terms of size 30.
EXACT = 1e-10
DTYPES = (torch.float64, torch.float32)


def compare(ours: Any, theirs: Any, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Values and gradients of both, where float32 is held to the truth of theirs in float64."""
    results = []
    for function, as_dtype in ((ours, dtype), (theirs, torch.float64)):
        leaves = [t.detach().to(as_dtype).requires_grad_() for t in inputs]
        value = function(*leaves)
        gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        results.append([value, *(g if g is not None else torch.zeros(1) for g in gradients)])
    floors = (EXACT, EXACT) if dtype == torch.float64 else (
        2 * VALUE_FLOOR[dtype], 2 * GRADIENT_FLOOR[dtype],
    )  # fmt: skip
    for k, (mine, peer) in enumerate(zip(*results, strict=True)):
        error = (mine.double() - peer).norm().item()
        # A gradient that cancels to nothing is compared with 1e-3, the size of its terms here.
        assert error <= floors[min(k, 1)] * max(peer.norm().item(), 1e-3), k


def points(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).float().double()  # exact in both dtypes


def test_a_required_peer_that_is_missing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCONTRAST_REQUIRED_PEERS", "math no_such_library")
    assert peers.peer("math").pi > 3
    with pytest.raises(ImportError, match="no_such_library"):
        peers.peer("no_such_library.losses")
    monkeypatch.setenv("FASTCONTRAST_REQUIRED_PEERS", "math")
    with pytest.raises(pytest.skip.Exception):
        peers.peer("no_such_library.losses")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", ["none", "unpaired", "paired"])
def test_info_nce(mode: str, reduction: str, dtype: torch.dtype) -> None:
    theirs = peers.peer("info_nce")
    inputs = [points(9, 5), points(9, 5)]
    inputs += {"none": [], "unpaired": [points(11, 5)], "paired": [points(9, 4, 5)]}[mode]
    options = {"temperature": 0.2, "reduction": reduction}
    if mode != "none":
        options["negative_mode"] = mode
    compare(info_nce.InfoNCE(**options), theirs.InfoNCE(**options), inputs, dtype)


def test_info_nce_names_mistakes() -> None:
    x = points(9, 5)
    with pytest.raises(TypeError, match="negative_keys must be a tensor, got list"):
        info_nce.info_nce(x, x, [x])
    with pytest.raises(ValueError, match="negative_keys must have 3 dimensions"):
        info_nce.info_nce(x, x, x, negative_mode="paired")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_open_clip(bias: bool, dtype: torch.dtype) -> None:
    theirs = peers.open_clip_loss().ClipLoss()
    u, v = F.normalize(points(9, 5)), F.normalize(points(9, 5))
    inputs = [u.float().double(), v.float().double(), torch.tensor(14.0)]
    inputs += [torch.tensor(0.3)] if bias else []
    compare(open_clip.ClipLoss(), theirs, inputs, dtype)
    assert open_clip.ClipLoss()(u, v, 2.0, output_dict=True).keys() == {"contrastive_loss"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lightly(dtype: torch.dtype) -> None:
    theirs = peers.lightly_loss().NTXentLoss(temperature=0.3)
    compare(lightly.NTXentLoss(temperature=0.3), theirs, [points(9, 5), points(9, 5)], dtype)


def test_lightly_names_a_temperature_that_is_no_number() -> None:
    with pytest.raises(TypeError, match="temperature must be a number or a 0-dim tensor, got str"):
        lightly.NTXentLoss(temperature="a")  # pyright: ignore[reportArgumentType]


def test_lightly_with_a_memory_bank() -> None:
    """Over batches that fill the bank, cut one at its end, and begin anew."""
    theirs = peers.lightly_loss().NTXentLoss(temperature=0.3, memory_bank_size=(20, 5))
    ours = lightly.NTXentLoss(temperature=0.3, memory_bank_size=(20, 5))
    ours.memory_bank.bank.copy_(theirs.memory_bank.bank)
    for step in range(4):
        x, y = torch.randn(9, 5, requires_grad=step != 2), torch.randn(9, 5, requires_grad=True)
        a, b = ours(x, y), theirs(x, y)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*(torch.autograd.grad(v, y)[0] for v in (a, b)))
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hard", [0, 2])
def test_grad_cache(hard: int, dtype: torch.dtype) -> None:
    """The library is not on PyPI: its equation."""
    x, y = points(7, 5), points(7 * (hard + 1), 5)
    target = torch.arange(7) * (hard + 1)
    ours = grad_cache.SimpleContrastiveLoss(n_hard_negatives=hard)
    compare(ours, lambda x, y: F.cross_entropy(x @ y.T, target), [x, y], dtype)
    flipped = target.flip(0)
    compare(
        lambda x, y: ours(x, y, target=flipped, reduction="sum"),
        lambda x, y: F.cross_entropy(x @ y.T, flipped, reduction="sum"),
        [x, y], dtype,
    )  # fmt: skip


# sentence-transformers


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RANKING: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 3.0},
    "both ways": {"directions": ALL[::2], "partition_mode": "per_direction"},
    "both ways in one": {"directions": ALL[::2]},
    "queries": {"directions": ("query_to_doc", "query_to_query")},
    "all": {"directions": ALL},
    "in batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    "hard": {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    "all hard": {"hardness_mode": "all_negatives", "hardness_strength": 2.0, "directions": ALL},
}


@pytest.mark.parametrize("hard", [0, 2])
@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score", "euclidean_sim"])
def test_sentence_transformers(similarity: str, name: str, hard: int) -> None:
    theirs = peers.peer("sentence_transformers.sentence_transformer")
    from fastcontrast.compat import sentence_transformers as ours

    options = {
        "similarity_fct": getattr(peers.peer("sentence_transformers.util"), similarity),
        **RANKING[name],
    }
    a = ours.MultipleNegativesRankingLoss(nn.Identity(), **options)
    b = theirs.losses.MultipleNegativesRankingLoss(nn.Identity(), **options)
    assert isinstance(a, type(b))
    for dtype in DTYPES:
        compare(
            lambda *e: a.compute_loss_from_embeddings(list(e), torch.empty(0)),
            lambda *e: b.compute_loss_from_embeddings(list(e), torch.empty(0)),
            [points(7, 5) for _ in range(2 + hard)], dtype,
        )  # fmt: skip


def test_sentence_transformers_symmetric() -> None:
    theirs = peers.peer("sentence_transformers.sentence_transformer")
    from fastcontrast.compat import sentence_transformers as ours

    a = ours.MultipleNegativesSymmetricRankingLoss(nn.Identity(), scale=5.0)
    b = theirs.losses.MultipleNegativesSymmetricRankingLoss(nn.Identity(), scale=5.0)
    compare(
        lambda *e: a.compute_loss_from_embeddings(list(e), torch.empty(0)),
        lambda *e: b.compute_loss_from_embeddings(list(e), torch.empty(0)),
        [points(7, 5), points(7, 5)], torch.float64,
    )  # fmt: skip
    with pytest.raises(ValueError, match="similarity_fct must be one of cos_sim, dot_score"):
        ours.MultipleNegativesRankingLoss(
            nn.Identity(), similarity_fct=peers.peer("sentence_transformers.util").manhattan_sim
        ).compute_loss_from_embeddings([torch.eye(2)] * 2, torch.empty(0))


# pytorch-metric-learning


DISTANCES = ["l2", "squared", "raw l2", "cosine", "dot"]
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 2, 2, 1])
REF_LABELS = torch.tensor([1, 0, 5, 2, 2, 1, 0, 3])


def distance_of(name: str) -> Any:
    d = peers.peer("pytorch_metric_learning.distances")
    return {
        "l2": lambda: d.LpDistance(power=1),
        "squared": lambda: d.LpDistance(power=2),
        "raw l2": lambda: d.LpDistance(normalize_embeddings=False),
        "cosine": d.CosineSimilarity,
        "dot": lambda: d.DotProductSimilarity(normalize_embeddings=False),
    }[name]()


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("pairs", ["labels", "triplets", "pairs"])
@pytest.mark.parametrize("loss", ["NTXentLoss", "SupConLoss", "NCALoss"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_pytorch_metric_learning(distance: str, loss: str, pairs: str, references: bool) -> None:
    theirs = peers.peer("pytorch_metric_learning.losses")
    from fastcontrast.compat import pytorch_metric_learning as ours

    reducers = peers.peer("pytorch_metric_learning.reducers")
    miners = peers.peer("pytorch_metric_learning.utils.loss_and_miner_utils")
    width = len(REF_LABELS) if references else len(LABELS)
    columns = REF_LABELS if references else LABELS
    chosen = None
    if pairs != "labels":
        function = miners.get_all_triplets_indices if pairs == "triplets" else (
            miners.get_all_pairs_indices
        )  # fmt: skip
        found = function(LABELS, REF_LABELS) if references else function(LABELS)
        # Every third one, some of them twice.
        chosen = tuple(torch.cat([part[::3], part[:2]]) for part in found)
    options: dict[str, Any] = {"distance": distance_of(distance)}
    options |= {"softmax_scale": 1.7} if loss == "NCALoss" else {"temperature": 0.4}
    references_of = lambda ref: {"ref_emb": ref, "ref_labels": columns} if references else {}  # noqa: E731
    for reducer in (None, reducers.MeanReducer(), reducers.ThresholdReducer(low=0.5)):
        a, b = (getattr(m, loss)(reducer=reducer, **options) for m in (ours, theirs))
        assert isinstance(a, type(b))
        for dtype in DTYPES if reducer is None else DTYPES[:1]:
            inputs = [points(len(LABELS), 4)] + ([points(width, 4)] if references else [])
            compare(
                lambda x, ref=None, a=a: a(x, LABELS, chosen, **references_of(ref)),
                lambda x, ref=None, b=b: b(x, LABELS, chosen, **references_of(ref)),
                inputs, dtype,
            )  # fmt: skip


@pytest.mark.parametrize("pairs", ["labels", "triplets"])
@pytest.mark.parametrize("loss", ["NTXentLoss", "SupConLoss", "NCALoss"])
def test_pytorch_metric_learning_with_a_learnt_temperature(loss: str, pairs: str) -> None:
    theirs = peers.peer("pytorch_metric_learning.losses")
    from fastcontrast.compat import pytorch_metric_learning as ours

    miners = peers.peer("pytorch_metric_learning.utils.loss_and_miner_utils")
    chosen = miners.get_all_triplets_indices(LABELS) if pairs == "triplets" else None
    name = "softmax_scale" if loss == "NCALoss" else "temperature"

    def learnt(module: Any) -> Any:
        # An attribute, where the library's constructor would take it before it is a module.
        made = getattr(module, loss)()
        return lambda x, t: setattr(made, name, t) or made(x, LABELS, chosen)

    inputs = [points(len(LABELS), 4), torch.tensor(0.4)]
    compare(learnt(ours), learnt(theirs), inputs, torch.float64)


@pytest.mark.parametrize("labels", [[0, 1, 2], [4, 4, 4], [0, 0, 1]])
@pytest.mark.parametrize("loss", ["NTXentLoss", "SupConLoss", "NCALoss"])
def test_pytorch_metric_learning_without_pairs(loss: str, labels: list[int]) -> None:
    """No positive, no negative, one pair."""
    theirs = peers.peer("pytorch_metric_learning.losses")
    from fastcontrast.compat import pytorch_metric_learning as ours

    x = points(3, 4).requires_grad_()
    a, b = (getattr(m, loss)()(x, torch.tensor(labels)) for m in (ours, theirs))
    # The library's mean over no row of NCA is NaN.
    assert a.item() == pytest.approx(0.0 if b.isnan() else b.item(), abs=1e-12)
    a.sum().backward()
    assert bool(x.grad.isfinite().all())


def test_pytorch_metric_learning_proxies_and_wrappers() -> None:
    theirs = peers.peer("pytorch_metric_learning.losses")
    from fastcontrast.compat import pytorch_metric_learning as ours

    a, b = ours.ProxyNCALoss(5, 4, softmax_scale=3), theirs.ProxyNCALoss(5, 4, softmax_scale=3)
    a.load_state_dict(b.state_dict())
    labels = torch.tensor([0, 4, 2, 2, 1])
    x = points(5, 4)
    compare(lambda x: a.double()(x, labels), lambda x: b.double()(x, labels), [x], torch.float64)
    wrapped = [theirs.CrossBatchMemory(m.NTXentLoss(), 4, 12) for m in (ours, theirs)]
    for _ in range(4):
        x, labels = torch.randn(5, 4), torch.randint(3, (5,))
        values = [w(x, labels) for w in wrapped]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    views = [theirs.SelfSupervisedLoss(m.NTXentLoss())(x, x + 0.1) for m in (ours, theirs)]
    torch.testing.assert_close(*views, rtol=1e-5, atol=1e-6)
    distances = peers.peer("pytorch_metric_learning.distances")
    with pytest.raises(ValueError, match="distance must be LpDistance"):
        ours.NTXentLoss(distance=distances.SNRDistance())(x, labels)


def test_some_drop_ins_do_without_their_library() -> None:
    code = """
import sys
for gone in ("info_nce", "lightly", "open_clip", "grad_cache"):
    sys.modules[gone] = None  # importing it raises ImportError
from fastcontrast.compat import grad_cache, info_nce, lightly, open_clip
"""
    subprocess.run([sys.executable, "-c", code], check=True)
