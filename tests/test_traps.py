"""What losses of this kind get wrong elsewhere: each trap, and the tests that would fall into it.

On every backend, in two places. The kernels meet what they could get wrong in the tests of their
ops, those that are emulated or interpreted too. Losses are plain PyTorch around the ops: each meets
the traps here on the reference and on every instruction set of the CPU, and emulated or interpreted
kernels run one test of each loss (THROUGH_EVERY_LOSS in variants.py).

 1. Square root at 0, duplicates, self-pairs: test_coincident_points_have_gradient_zero,
    test_equal_keys_share_and_ties_do_not_rank, test_a_batch_of_one_point_has_gradient_zero
 2. Cancellation in squared distances: test_an_offset_common_to_all_points_costs_nothing,
    test_near_pairs_in_the_stream
 3. Cancellation in gradients: test_near_positives_keep_their_gradient,
    test_near_pairs_keep_their_gradient
 4. Confident rows: test_confident_rows_keep_their_loss, test_confident_rows_in_other_dtypes,
    test_a_confident_triplet_keeps_its_gradient
 5. Padding read as logit 0: test_scores_far_from_zero, test_logits_far_from_zero_in_every_loss
 6. A fixed maximum: test_temperatures_and_large_norms,
    test_cosine_at_every_temperature_and_size
 7. Rows in which nothing counts: test_rows_in_which_nothing_counts, test_no_row_has_a_positive,
    test_a_lone_positive_costs_nothing
 8. A mask, then a division by a learnt temperature: test_a_mask_and_a_learnt_temperature
 9. Empty batches, every row ignored: test_no_rows, test_all_rows_ignored, test_shapes
10. Rows with upstream gradients of their own: test_rows_with_their_own_upstream_gradients
11. Gradients taken in the forward pass, used twice or scaled:
    test_a_second_backward_pass_gives_the_same, test_a_scaler_scales,
    test_grad_scaler_and_accumulation
12. Second derivatives: test_second_derivatives_are_right,
    test_double_backward_of_the_operator_raises
13. One side frozen, a query that is its key: test_frozen_sides_and_the_temperature,
    test_a_query_that_is_its_key_receives_both_gradients
14. Behaviour by identity of objects: test_a_query_that_is_its_key_receives_both_gradients
15. 32-bit offsets: test_addresses_are_64_bit, test_rows_further_apart_than_32_bits,
    test_a_row_stride_beyond_32_bits, test_offsets_beyond_32_bits
16. Autocast: test_autocast_lowers_nothing, test_autocast_does_not_lower_the_products
17. Half inputs: test_half_inputs_lose_only_their_own_rounding,
    test_squares_that_overflow_float16
18. NaN and inf: test_bad_numbers_show, test_non_finite_inputs_show,
    test_an_excluded_nan_does_not_count,
    test_a_filled_column_that_is_excluded_leaves_gradients_alone
19. Strides, slices, expanded and transposed operands: test_layouts_do_not_matter, test_layouts
20. Zero vectors have no direction: test_zero_vectors_have_no_direction,
    test_cosine_at_every_temperature_and_size
21. Temperatures of any dtype, read without waiting:
    test_a_temperature_is_inverted_in_the_accumulator_dtype,
    test_compiled_whole_for_every_batch_size, test_nothing_waits_for_the_device
22. Gradients over processes: test_two_processes
23. Denormals: test_scores_far_from_zero
24. Determinism: test_two_runs_and_thread_counts_are_bit_equal,
    test_runs_are_bit_equal_without_deterministic_mode
25. Small gradients filtered out: test_small_probabilities_keep_their_gradients
26. Dtype and range of labels and targets: test_integers_of_both_widths,
    test_a_class_id_may_be_any_integer, test_mistakes_are_named
27. Triton's quirks: test_splits_of_the_other_side, test_strides_of_half_points,
    test_the_launch_table_is_whole
28. Ties: test_equal_keys_share_and_ties_do_not_rank,
    test_a_score_that_equals_the_threshold_does_not_rank
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT_FLOOR, VALUE_FLOOR, relative_error
from torch import Tensor, nn
from variants import on_every_backend

import fastcontrast as fc
from fastcontrast.temporal import temporal_contrasting_loss, temporal_prediction_loss

every_backend = on_every_backend("distance_softmax")
IDS = torch.arange(8) % 3

# Every loss of two matrices; a path of its own each.
LOSSES: dict[str, Any] = {
    "mean": fc.info_nce_loss,
    "rows": lambda x, y, **o: fc.info_nce_loss(x, y, reduction="none", **o).sum(),
    "symmetric": lambda x, y, **o: fc.info_nce_loss(x, y, symmetric=True, **o),
    "smoothed": lambda x, y, **o: fc.info_nce_loss(x, y, label_smoothing=0.1, **o),
    "debiased": lambda x, y, **o: fc.info_nce_loss(x, y, tau_plus=0.01, hardness=0.5, **o),
    "bank": lambda x, y, **o: fc.info_nce_loss(x, y[: len(x)], negatives=y, in_batch=False, **o),
    "nt_xent": lambda x, y, **o: fc.nt_xent_loss(x, y[: len(x)], metric="l2", **o),
    "supcon": lambda x, y, **o: fc.supcon_loss(
        x, torch.arange(len(x)) % 3, y, torch.arange(len(y)) % 3, metric="l2", **o
    ),
    "nca": lambda x, y, **o: fc.nca_loss(
        x, torch.arange(len(x)) % 3, y, torch.arange(len(y)) % 3, **o
    ),
}


def temporal_contrasting(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Rows of x and y, far apart in time but for each pair: NT-Xent through windows and margins."""
    places = torch.arange(max(len(x), len(y)), device=x.device)
    ids = torch.cat([places[: len(x)] // 4, places[: len(y)] // 4])
    times = torch.cat([10 * places[: len(x)], 10 * places[: len(y)] + 1])
    return temporal_contrasting_loss(torch.cat([x, y]), ids, times, window=1, margin=2, **options)


def temporal_prediction(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Context i of x picks frame i + 1 of y, by the map that changes nothing."""
    weight = torch.eye(y.shape[1], x.shape[1], dtype=x.dtype, device=x.device)[None]
    times = torch.arange(len(x), device=x.device)
    return temporal_prediction_loss(
        x, y, torch.zeros_like(times), times, weight, **{"metric": "l2", **options}
    )


LOSSES |= {"temporal": temporal_contrasting, "prediction": temporal_prediction}
every_loss = pytest.mark.parametrize("name", LOSSES)


def test_every_trap_has_a_test() -> None:
    """The list above is whole, and its tests are there."""
    parts = re.split(r"^ ?(\d+)\. ", str(__doc__), flags=re.MULTILINE)[1:]
    numbers, texts = parts[::2], parts[1::2]
    index = {int(k): re.findall(r"\btest_\w+", s) for k, s in zip(numbers, texts, strict=True)}
    assert list(index) == list(range(1, 29))
    defined = {
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for number, tests in index.items():
        assert tests, number
        assert not set(tests) - defined, (number, set(tests) - defined)


def pair(m: int = 8, n: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(m, 5, dtype=dtype), torch.randn(n, 5, dtype=dtype)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@every_backend
@every_loss
def test_a_second_backward_pass_gives_the_same(name: str, backend: str) -> None:
    """retain_graph, and autograd.grad twice: gradients taken in the forward pass stay."""
    x, y = (t.requires_grad_() for t in pair())
    loss = LOSSES[name](x, y, backend=backend)
    first, second = gradients(loss, x, y), gradients(loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss.backward()
    assert torch.equal(x.grad, first[0])


@every_backend
@every_loss
def test_a_scaler_scales(name: str, backend: str) -> None:
    """The upstream gradient, 2^16 here, multiplies before float16 rounds."""
    x, y = (t.half().requires_grad_() for t in pair())
    scaler = torch.amp.GradScaler("cpu")
    loss = LOSSES[name](x, y, backend=backend)
    (scaled,) = torch.autograd.grad(scaler.scale(loss), x)
    wide = x.detach().float().requires_grad_()
    truth = 2.0**16 * torch.autograd.grad(LOSSES[name](wide, y.float(), backend=backend), wide)[0]
    representable = truth.abs() < torch.finfo(torch.float16).max
    # One rounding to float16.
    torch.testing.assert_close(
        scaled[representable].float(), truth[representable], rtol=1e-3, atol=1e-2
    )


@every_backend
@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_nothing(dtype: torch.dtype, name: str, backend: str) -> None:
    x, y = (t.requires_grad_() for t in pair())
    plain = LOSSES[name](x, y, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        loss = LOSSES[name](x, y, backend=backend)
    assert torch.equal(loss, plain)
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(loss, x, y), gradients(plain, x, y), strict=True)
    )


@every_backend
@every_loss
def test_second_derivatives_are_right(name: str, backend: str) -> None:
    x, y = (t.requires_grad_() for t in pair(4, 4, torch.float64))
    assert torch.autograd.gradgradcheck(
        lambda x, y: LOSSES[name](x, y, temperature=0.8, backend=backend), (x, y)
    )


@every_backend
@every_loss
def test_a_query_that_is_its_key_receives_both_gradients(name: str, backend: str) -> None:
    """And nothing is left out because two arguments are one object."""
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    copy = x.detach().clone().requires_grad_()
    together = LOSSES[name](x, x, backend=backend)
    apart = LOSSES[name](x, copy, backend=backend)
    torch.testing.assert_close(together, apart)
    (both,) = gradients(together, x)
    torch.testing.assert_close(both, sum(gradients(apart, x, copy)))


@every_backend
@every_loss
def test_layouts_do_not_matter(name: str, backend: str) -> None:
    """Columns of a wider matrix, every other row, transposed, expanded with stride 0."""
    wide, tall, turned = torch.randn(8, 12), torch.randn(17, 5), torch.randn(5, 8)
    row = torch.randn(1, 5)
    for view in (wide[:, 1:11:2], tall[1::2], turned.T, row.expand(8, 5)):
        y = torch.randn(8, 5)
        a = view.clone().requires_grad_()
        base = view.detach().requires_grad_()
        left, right = LOSSES[name](a, y, backend=backend), LOSSES[name](base, y, backend=backend)
        assert torch.equal(left, right)
        assert torch.equal(gradients(left, a)[0], gradients(right, base)[0])


@every_backend
@every_loss
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_numbers_show(value: float, name: str, backend: str) -> None:
    """A NaN key reaches the loss; an infinitely far query alone does not pass unnoticed."""
    x, y = pair()
    y[2, 1] = value
    loss = LOSSES[name](x, y, backend=backend)
    if torch.isnan(torch.tensor(value)):
        assert bool(torch.isnan(loss))
    else:  # the positive at infinity costs infinitely much, or its class goes on without it
        assert bool(torch.isinf(loss) | torch.isnan(loss)) or name in ("supcon", "nca")


@every_backend
def test_a_mask_and_a_learnt_temperature(backend: str) -> None:
    """Masked columns are -inf: dividing those by the temperature gives it a NaN gradient."""
    x, y = pair(8, 11, torch.float64)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, -100, 2, 3, -100, 5, 6, 10])
    own = torch.zeros(8, dtype=torch.int32)
    for loss in (
        lambda t: fc.info_nce_loss(x, y, target, temperature=t, backend=backend),
        lambda t: fc.supcon_loss(x, IDS, temperature=t, backend=backend),
        lambda t: fc.nca_loss(x, own, temperature=t, backend=backend),
        lambda t: fc.info_nce_loss(x[:1], y[:1], label_smoothing=0.5, temperature=t),
    ):
        assert torch.autograd.gradcheck(loss, temperature)


@every_backend
@pytest.mark.parametrize("metric", ["l2", "sqeuclidean", "cosine", "dot"])
def test_equal_keys_share_and_ties_do_not_rank(metric: str, backend: str) -> None:
    x = torch.randn(1, 5).expand(6, 5).contiguous().requires_grad_()
    loss, stats = fc.info_nce_loss(
        x, x, metric=metric, return_stats=("rank", "top1", "entropy"), backend=backend
    )
    assert loss.item() == pytest.approx(torch.log(torch.tensor(6.0)).item(), rel=1e-6)
    assert stats.entropy.tolist() == pytest.approx([loss.item()] * 6, rel=1e-6)
    if metric in ("l2", "sqeuclidean"):
        assert stats.rank.tolist() == [0] * 6  # none is strictly nearer
        assert torch.equal(gradients(loss, x)[0], torch.zeros_like(x))


@every_backend
def test_zero_vectors_have_no_direction(backend: str) -> None:
    """F.normalize gives them a gradient of 1e12; here the cosine is 0 and its gradient too."""
    x, y = pair()
    x[3] = 0
    x.requires_grad_()
    for loss in (fc.nt_xent_loss(x, y, backend=backend), fc.supcon_loss(x, IDS, backend=backend)):
        (gradient,) = gradients(loss, x)
        assert bool(gradient.isfinite().all())
        assert gradient[3].abs().max().item() == 0.0


@every_backend
@pytest.mark.parametrize("scale", [1e3, 1e-20])
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0, 100.0])
def test_cosine_at_every_temperature_and_size(
    temperature: float, scale: float, backend: str
) -> None:
    """A fixed maximum of 1 / temperature underflows below 0.008; a norm squared below 1e-19."""
    x, y = (scale * t for t in pair(20, 20))
    x.requires_grad_()
    loss = fc.nt_xent_loss(x, y, temperature=temperature, backend=backend)
    z = F.normalize(torch.cat([x, y]).detach().double() / scale)
    s = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    truth = F.cross_entropy(s, torch.arange(40).roll(20))
    # Cosines are rounded to eps, scores to eps / temperature.
    assert abs(loss.item() - truth.item()) < 2e-6 * truth.item() + 4e-7 / temperature
    assert bool(gradients(loss, x)[0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_integers_of_both_widths(dtype: torch.dtype) -> None:
    x, y = pair()
    target = torch.tensor([1, 2, -100, 4, 5, 6, 7, 0])
    assert torch.equal(fc.info_nce_loss(x, y, target.to(dtype)), fc.info_nce_loss(x, y, target))
    assert torch.equal(fc.supcon_loss(x, IDS.to(dtype)), fc.supcon_loss(x, IDS))


def test_a_class_id_may_be_any_integer() -> None:
    """-100 is ignore_index of a target; a class id of that value is a class."""
    x, _ = pair()
    assert torch.equal(fc.supcon_loss(x, torch.where(IDS == 0, -100, IDS)), fc.supcon_loss(x, IDS))
    far = torch.where(IDS == 0, torch.iinfo(torch.int64).min, IDS)
    assert torch.equal(fc.supcon_loss(x, far), fc.supcon_loss(x, IDS))


# The others have checks of their own: test_temporal.py.
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith(("temp", "pred"))])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.randn(8, 6), "same number of columns D"),
        (torch.empty(8, 5, device="meta"), "must be on one device"),
    ],
    ids=["D", "device"],
)
def test_operands_that_do_not_fit(bad: Tensor, message: str, name: str) -> None:
    with pytest.raises(ValueError, match=message):
        LOSSES[name](torch.randn(8, 5), bad)


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
}


@every_loss
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms_raise_clearly(transform: str, name: str) -> None:
    x, y = pair()
    with pytest.raises(RuntimeError, match=r"does not run under torch\.func transforms"):
        TRANSFORMS[transform](lambda x: LOSSES[name](x, y), x)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms_of_triplets_and_pairs(transform: str) -> None:
    """Triplets raise as well; pairs are plain PyTorch, and right."""
    x, y = pair()
    with pytest.raises(RuntimeError, match=r"does not run under torch\.func transforms"):
        TRANSFORMS[transform](lambda x: fc.triplet_margin_loss(x, y, y.flip(0)), x)
    same = torch.arange(8) % 2 == 0
    found = TRANSFORMS[transform](lambda x: fc.siamese_contrastive_loss(x, y, same), x)
    x.requires_grad_()
    loss = fc.siamese_contrastive_loss(x, y, same)
    (gradient,) = gradients(loss, x)
    truth = {"grad": gradient, "jvp": (loss, (gradient * x).sum()), "vmap": loss[None]}[transform]
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("name", ["mean", "symmetric", "smoothed", "nt_xent", "supcon"])
def test_compiled_whole_for_every_batch_size(name: str) -> None:
    """Compiled for the first batch, never for 19 other sizes; values and gradients of eager mode.

    No temperature is read on the way: that would break the graph.
    """
    torch._dynamo.reset()
    loss = torch.compile(LOSSES[name], fullgraph=True, dynamic=True, backend="aot_eager")
    temperature = nn.Parameter(torch.tensor(0.7))
    for m in range(6, 26):
        with torch.compiler.set_stance("default" if m == 6 else "fail_on_recompile"):
            x, y = (t.requires_grad_() for t in pair(m, m))
            value = loss(x, y, temperature=temperature)
            found = torch.autograd.grad(value, [x, y, temperature])
    eager = LOSSES[name](x, y, temperature=temperature)
    torch.testing.assert_close(value, eager)
    for a, b in zip(found, torch.autograd.grad(eager, [x, y, temperature]), strict=True):
        torch.testing.assert_close(a, b)


def test_a_recompilation_would_be_noticed() -> None:
    """What the test above rests on: with sizes compiled in, the stance raises."""
    torch._dynamo.reset()
    loss = torch.compile(fc.info_nce_loss, fullgraph=True, dynamic=False, backend="aot_eager")
    loss(*pair(6, 6))
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="fail_on_recompile"),
    ):
        loss(*pair(7, 7))


@every_backend
@every_loss
def test_a_batch_of_one_point_has_gradient_zero(name: str, backend: str) -> None:
    """Every pair is a duplicate, and every row its own: nothing to tell apart."""
    x = torch.full((8, 5), 0.3, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    loss = LOSSES[name](x, y, backend=backend)
    columns = {"nt_xent": 15, "bank": 9, "temporal": 15}.get(name, 8)
    truth = torch.full((8,), float(columns)).log()
    if name == "nca":  # a class has 3, 3 or 2 of the 8 columns
        truth = -torch.tensor([3 / 8, 3 / 8, 2 / 8] * 3)[:8].log()
    if name != "debiased":  # which subtracts from the sum of the others
        expected = truth.sum() if name == "rows" else truth.mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient in gradients(loss, x, y):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@every_backend
@every_loss
@pytest.mark.parametrize("m", [15, 17, 65])
def test_logits_far_from_zero_in_every_loss(m: int, name: str, backend: str) -> None:
    """All of -300: a padded column of score 0 would be all that counts."""
    x, y = torch.randn(m, 5), torch.randn(m, 5) + 300 / 5**0.5
    x, y = x.requires_grad_(), y.requires_grad_()
    options = {"temperature": 300.0} if name == "nca" else {}  # whose distances are squared
    loss = LOSSES[name](x, y, backend=backend, **options)
    truth = LOSSES[name](x.double(), y.double(), backend="reference", **options)
    # Scores are rounded to 300 eps, which is an error of every probability.
    rounding = 2 * 300 * torch.finfo(torch.float32).eps
    assert relative_error(loss, truth) < rounding + VALUE_FLOOR[torch.float32]
    for a, b in zip(gradients(loss, x, y), gradients(truth, x, y), strict=True):
        assert relative_error(a, b) < 4 * rounding + GRADIENT_FLOOR[torch.float32]
