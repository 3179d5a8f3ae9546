"""Claims about networks that guess, and about networks of one logit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.answers import Lookup, batches_of, one_hot_table
from support.pictures import evaluation, opened, write_digits, write_images
from torch import Tensor

from coraq.cli.app import run
from coraq.evaluate import compare_networks, evaluate_network
from coraq.evaluate.accuracy import proportion
from coraq.evaluate.chance import Answers, answers_at_chance, top1_at_chance
from coraq.events import ListSink, Note


@pytest.mark.parametrize(
    ("right", "count", "classes", "guesses"),
    [
        (0, 100, 1000, True),
        (1, 100, 1000, True),
        (3, 100, 1000, False),
        (10, 100, 10, True),
        (0, 100, 10, True),  # a reversed class map is worse than chance
        (30, 100, 10, False),
        (52, 100, 2, True),
        (70, 100, 2, False),
        (4, 10, 10, False),
        (0, 5, 1000, False),  # too few to say
        (740, 1000, 1000, False),
    ],
)
def test_a_top1_of_chance_is_told_from_a_better_one(right: int, count: int, classes: int, guesses: bool) -> None:
    warning = top1_at_chance(proportion(right, count), classes)
    assert (warning is not None) == guesses
    if warning:
        assert f"of {count} images" in warning
        assert "--class-map" in warning
        assert "--mean" in warning


def test_answers_without_labels_are_those_of_chance_where_uniform_or_all_the_same() -> None:
    def warning(logits: Tensor) -> str | None:
        answers = Answers()
        for part in logits.split(7):
            answers.add(part)
        return answers_at_chance(answers)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 10, generator=generator)
    assert "entropy is 2.3 nats" in (warning(0.05 * noise) or "")
    assert "class 3 to all of 40 images" in (warning(noise + 20 * torch.eye(10)[3]) or "")
    assert warning(one_hot_table([index % 10 for index in range(40)])) is None
    assert warning(one_hot_table([3] * 20)) is None  # twenty images may be of one class
    assert warning(5 * noise) is None


def test_entropy_is_the_mean_over_images() -> None:
    answers = Answers()
    answers.add(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf]]).clamp_min(-1e4))
    assert answers.entropy_nats == pytest.approx((math.log(4) + math.log(2)) / 2)


def notes_of(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_reversed_class_map_gives_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "digits", 8)
    (tmp_path / "map.txt").write_text("".join(f"{9 - digit}\n" for digit in range(10)))
    command = ["quantize", "demo", "--method", "rtn", "--bits", "8", "--calib-size", "8", "--data-dir", "digits"]
    assert run(command) == 0
    assert "chance" not in notes_of(capsys)
    assert run([*command, "--class-map", "map.txt"]) == 0
    assert notes_of(capsys).count("is that of chance (10 % with 10 classes)") == 1


# --- one logit


def test_one_logit_is_counted_as_the_two_of_its_sigmoid() -> None:
    teacher, student = torch.tensor([[2.0], [-1.0], [0.5], [-3.0]]), torch.tensor([[1.0], [1.0], [0.25], [-3.0]])
    labels = torch.tensor([1, 0, 0, 0])
    sink = ListSink()
    result = compare_networks(Lookup(teacher), Lookup(student), batches_of(labels, 2), sink=sink)
    assert result.agreement.value_pct == 75
    assert result.float_top1 is not None
    assert result.quantized_top1 is not None
    assert (result.float_top1.value_pct, result.quantized_top1.value_pct) == (75, 50)
    p, q = teacher.double().sigmoid(), student.double().sigmoid()
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert result.kl_nats == pytest.approx(float(kl), rel=1e-6)
    assert result.sqnr_db == pytest.approx(10 * math.log10(14.25 / (1 + 4 + 0.0625)))
    assert sum("one logit" in event.message for event in sink.events if isinstance(event, Note)) == 1
    accuracy = evaluate_network(Lookup(student), batches_of(labels, 2))
    assert accuracy.top1 is not None
    assert accuracy.top1.value_pct == 50


def test_images_of_two_classes_fit_a_network_of_one_logit(tmp_path: Path) -> None:
    images = opened(1, data_dir=write_images(tmp_path, {"no": 4, "yes": 4}), calib_size=2)
    assert sorted({int(label) for _, labels in evaluation(images).batches() for label in labels}) == [0, 1]
