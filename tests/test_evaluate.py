"""Accuracy and fidelity: closed forms, hand-worked numbers, and brute-force references."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.answers import Lookup, batches_of, one_hot_table
from torch import nn

from coraq.errors import CoraqError
from coraq.evaluate import compare_networks, evaluate_network
from coraq.evaluate.accuracy import hits, kl_divergence, sqnr_db
from coraq.evaluate.intervals import Z95, mcnemar_p, paired_difference, wilson
from coraq.events import ListSink, StageAdvanced, StageFinished, StageStarted
from coraq.results import Comparison

# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(("successes", "count"), [(1, 10), (5, 10), (81, 263), (761, 1000), (9, 10)])
def test_wilson_ends_solve_the_score_equation(successes: int, count: int) -> None:
    for end in wilson(successes, count):
        # 1e-9: the equation's residual at ends correct to float64's last digits
        assert abs(successes / count - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / count), rel=1e-9)


def test_wilson_agrees_with_the_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263 → 0.2553 to 0.3662, and 0 of 20 → 0 to 0.1611
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_of_all_or_none_closes_exactly_at_the_end() -> None:
    assert wilson(0, 50)[0] == 0.0
    assert wilson(50, 50)[1] == 1.0


def test_wilson_covers_the_truth_in_about_95_percent_of_samples() -> None:
    count, share = 60, 0.3  # exact coverage by summing the binomial distribution
    inside = sum(
        math.comb(count, k) * share**k * (1 - share) ** (count - k)
        for k in range(count + 1)
        if wilson(k, count)[0] <= share <= wilson(k, count)[1]
    )
    assert 0.93 < inside < 0.97


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match="successes of"):
        wilson(successes, count)


def test_mcnemar_equals_enumerating_all_outcomes() -> None:
    for b, c in itertools.product(range(6), repeat=2):
        n = b + c
        # every way in which n fair coins fall, counted if at least as uneven as (b, c)
        uneven = sum(abs(2 * sum(coins) - n) >= abs(b - c) for coins in itertools.product((0, 1), repeat=n))
        assert mcnemar_p(b, c) == pytest.approx(uneven / 2**n, rel=1e-12)


def test_mcnemar_survives_counts_of_a_whole_imagenet() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(5000, 5000) == 1.0
    assert 0 < mcnemar_p(9_900, 10_100) < 0.2  # normal approximation: z = 1.407, p = 0.159
    assert mcnemar_p(9_900, 10_100) == pytest.approx(math.erfc((200 - 1) / math.sqrt(2 * 20_000)), rel=0.01)


def test_paired_difference_agrees_with_the_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, table III, method 10: cells 36, 12, 2, 0 → 0.0569 to 0.3404
    assert paired_difference(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_paired_difference_mirrors_when_the_networks_change_places() -> None:
    low, high = paired_difference(30, 9, 4, 7)
    assert paired_difference(30, 4, 9, 7) == pytest.approx((-high, -low), abs=1e-15)


def test_paired_difference_is_narrower_than_unpaired_when_images_agree() -> None:
    low, high = paired_difference(700, 20, 30, 250)
    unpaired = 2 * Z95 * math.sqrt(2 * 0.725 * 0.275 / 1000)
    assert high - low < 0.5 * unpaired
    # ~1e4 images: Wald's interval holds to 3 %
    low, high = paired_difference(7000, 200, 300, 2500)
    wald = 2 * Z95 * math.sqrt(500 - 100**2 / 10_000) / 10_000
    assert high - low == pytest.approx(wald, rel=0.03)


def test_paired_difference_has_width_even_if_no_image_differs() -> None:
    for cells in [(10, 0, 0, 0), (0, 0, 0, 10), (7, 0, 0, 3)]:
        low, high = paired_difference(*cells)
        assert -1 <= low < 0 < high <= 1


# ---------------------------------------------------------------- per-batch measures


def test_kl_equals_the_sum_over_classes() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    by_hand = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    assert float(kl_divergence(p.log()[None], q.log()[None])) == pytest.approx(by_hand, rel=1e-6)  # float32 inputs


def test_kl_ignores_a_constant_added_to_logits_and_never_goes_negative() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    divergence = kl_divergence(logits, logits + 4)
    assert divergence.min() >= 0
    assert divergence.max() < 1e-6  # float32 rounding of the sum logits + 4


def test_kl_stays_finite_where_a_class_is_all_but_impossible() -> None:
    far = torch.tensor([[1000.0, 0.0]])
    assert float(kl_divergence(far, -far)) == pytest.approx(1000, rel=1e-6)
    assert float(kl_divergence(far, far)) == 0


def test_sqnr_sees_scale_where_cosine_would_not() -> None:
    assert sqnr_db(100.0, 1.0) == pytest.approx(20)
    assert sqnr_db(1.0, 0.25) == pytest.approx(6.0206, abs=1e-4)  # logits halved
    assert sqnr_db(1.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == -math.inf


def test_hits_counts_the_k_largest() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5, 0.3]]).repeat(4, 1)
    labels = torch.arange(4)
    assert hits(logits, labels, 1).tolist() == [False, True, False, False]
    assert hits(logits, labels, 2).tolist() == [False, True, True, False]
    assert hits(logits, labels, 3).tolist() == [False, True, True, True]


# ---------------------------------------------------------------- whole comparisons


def test_comparison_of_a_case_worked_by_hand() -> None:
    labels = [0, 1, 2, 3, 4, 5, 6, 7]
    teacher = [0, 1, 2, 3, 4, 0, 0, 0]  # 5 of 8 right
    student = [0, 1, 2, 9, 9, 5, 0, 1]  # 4 of 8 right; only float 3, 4; only quantized 5; same first choice 4
    result = compare_networks(
        Lookup(one_hot_table(teacher)), Lookup(one_hot_table(student)), batches_of(torch.tensor(labels), 3)
    )
    assert result.count == result.labelled_count == 8
    assert result.num_classes == 10
    assert result.float_top1 is not None
    assert result.quantized_top1 is not None
    assert result.float_top1.value_pct == pytest.approx(62.5)
    assert result.quantized_top1.value_pct == pytest.approx(50)
    assert (result.quantized_top1.low_pct, result.quantized_top1.high_pct) == pytest.approx(
        tuple(100 * end for end in wilson(4, 8))
    )
    difference = result.top1_difference
    assert difference is not None
    assert difference.points == pytest.approx(-12.5)
    assert (difference.only_float_right, difference.only_quantized_right) == (2, 1)
    assert difference.low_points < -12.5 < difference.high_points
    assert difference.p_value == 1.0
    assert result.agreement.value_pct == pytest.approx(50)
    # 4 of 8 rows differ, each in two entries of 3: Σ float² = 8·9, Σ noise = 4·18 → 0 dB
    assert result.sqnr_db == pytest.approx(0, abs=1e-6)
    softmax = math.exp(3) / (math.exp(3) + 9)
    rest = 1 / (math.exp(3) + 9)
    assert result.kl_nats == pytest.approx(0.5 * (softmax - rest) * 3, rel=1e-6)


def test_comparison_does_not_depend_on_the_batch_size() -> None:
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(40, 12, generator=generator)
    noisy = table + 0.5 * torch.randn(40, 12, generator=generator)
    labels = torch.randint(12, (40,), generator=generator)
    untimed = [
        compare_networks(Lookup(table), Lookup(noisy), batches_of(labels, size)).model_dump(
            exclude={"float_s", "quantized_s"}
        )
        for size in (40, 7, 1)
    ]
    for other in untimed[1:]:
        for key, value in other.items():
            assert value == (pytest.approx(untimed[0][key], rel=1e-12) if isinstance(value, float) else untimed[0][key])


def test_a_network_compared_with_itself_differs_in_nothing() -> None:
    table = torch.randn(20, 10, generator=torch.Generator().manual_seed(2))
    result = compare_networks(Lookup(table), Lookup(table), batches_of(table.argmax(1)))
    assert result.agreement.value_pct == 100
    assert result.kl_nats == 0
    assert result.sqnr_db == math.inf
    assert result.top1_difference is not None
    assert result.top1_difference.points == 0
    assert result.top1_difference.low_points < 0 < result.top1_difference.high_points
    assert Comparison.model_validate_json(result.model_dump_json()) == result  # an infinite SQNR survives


def test_unlabelled_images_give_fidelity_and_no_accuracy() -> None:
    table = torch.randn(9, 10, generator=torch.Generator().manual_seed(3))
    result = compare_networks(Lookup(table), Lookup(2 * table), batches_of(torch.full((9,), -1)))
    assert not result.labelled
    assert (result.float_top1, result.quantized_top1, result.float_top5, result.top1_difference) == (None,) * 4
    assert result.agreement.value_pct == 100  # doubling changes no decision
    assert result.sqnr_db == pytest.approx(0, abs=1e-6)  # but all of the scale
    assert result.kl_nats > 0


def test_only_labelled_images_count_towards_accuracy() -> None:
    table = one_hot_table([0, 1, 2, 3])
    result = compare_networks(Lookup(table), Lookup(table), batches_of(torch.tensor([0, -1, 5, -1])))
    assert (result.count, result.labelled_count) == (4, 2)
    assert result.float_top1 is not None
    assert result.float_top1.value_pct == 50
    assert result.float_top1.count == 2


@pytest.mark.parametrize(("classes", "has_top5"), [(2, False), (5, False), (6, True), (10, True)])
def test_top5_is_given_only_where_it_says_something(classes: int, has_top5: bool) -> None:
    table = torch.randn(12, classes, generator=torch.Generator().manual_seed(4))
    batches = batches_of(torch.zeros(12, dtype=torch.long))
    assert (compare_networks(Lookup(table), Lookup(table), batches).quantized_top5 is not None) == has_top5
    assert (evaluate_network(Lookup(table), batches).top5 is not None) == has_top5


def test_one_networks_accuracy_is_the_comparisons() -> None:
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(30, 10, generator=generator)
    labels = torch.randint(10, (30,), generator=generator)
    alone = evaluate_network(Lookup(table), batches_of(labels))
    beside = compare_networks(Lookup(-table), Lookup(table), batches_of(labels))
    assert (alone.top1, alone.top5, alone.count) == (beside.quantized_top1, beside.quantized_top5, beside.count)


@pytest.mark.parametrize(("broken", "who"), [("teacher", "float"), ("student", "quantized")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_that_says_whose_and_where(broken: str, who: str, value: float) -> None:
    table = torch.ones(5, 10)
    bad = table.clone()
    bad[3, 2] = value
    networks = {"teacher": Lookup(table), "student": Lookup(table), broken: Lookup(bad)}
    with pytest.raises(CoraqError, match=rf"the {who} network's logits are not finite.*image 3, class 2"):
        compare_networks(networks["teacher"], networks["student"], batches_of(torch.zeros(5, dtype=torch.long)))


def test_no_images_and_labels_of_another_data_set_are_errors() -> None:
    network = Lookup(torch.ones(2, 10))
    with pytest.raises(CoraqError, match="no images"):
        compare_networks(network, network, [])
    with pytest.raises(CoraqError, match="no images"):
        evaluate_network(network, [])
    with pytest.raises(CoraqError, match="label 10 with a network of 10 classes"):
        compare_networks(network, network, batches_of(torch.tensor([3, 10])))


def test_a_network_without_classifier_is_an_error() -> None:
    with pytest.raises(CoraqError, match=r"shape \(2, 3, 2, 2\)"):
        evaluate_network(nn.Identity(), batches_of(torch.zeros(2, dtype=torch.long)))


def test_training_flags_are_used_as_evaluation_and_put_back() -> None:
    network = Lookup(torch.ones(6, 10)).train()
    network.dropout.eval()  # a mixed state must come back as it was
    result = evaluate_network(network, batches_of(torch.zeros(6, dtype=torch.long)))
    assert result.count == 6
    assert network.training
    assert not network.dropout.training
    network.dropout.train()
    with pytest.raises(CoraqError):
        evaluate_network(network, batches_of(torch.tensor([99])))
    assert network.dropout.training


def test_progress_counts_images() -> None:
    sink = ListSink()
    table = torch.ones(10, 10)
    compare_networks(
        Lookup(table), Lookup(table), batches_of(torch.zeros(10, dtype=torch.long), 4), sink=sink, total=10
    )
    assert sink.events[0] == StageStarted("evaluate", 10)
    assert [event.done for event in sink.events if isinstance(event, StageAdvanced)] == [4, 8, 10]
    assert isinstance(sink.events[-1], StageFinished)
