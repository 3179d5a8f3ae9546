"""The lock-step engine shows every layer exactly what an ordinary forward pass would, within its memory; and the
calibration task that is built on it keeps its promises about means, errors and lifetimes."""

from __future__ import annotations

import copy
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.tasks import make_task, rounded, small_task
from torch import Tensor, nn

from coraq.api import QuantizedLayer
from coraq.calibration.lockstep import LockStep, live_bytes
from coraq.calibration.releasable import releasable_inputs
from coraq.calibration.schedule import Schedule
from coraq.calibration.spill import LiveStorages
from coraq.calibration.task import CalibrationTask
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.core.gram import regress
from coraq.core.subsets import spread_out
from coraq.errors import CoraqError
from coraq.events import LayerCommitted, ListSink, Metric, Note
from coraq.network.fold import Structure, fold
from coraq.network.layers import as_matrices, groups_of
from coraq.testing import (
    hook_count,
    mean_output_error,
    plain_inputs,
    random_images,
    randomise_batchnorm,
    small_network,
    state_digest,
)

TEACHER, STUDENT = 0, 1


def two_networks(name: str = "small") -> tuple[nn.Module, nn.Module, list[str], list[Tensor]]:
    """A float network, a coarser one, the layers in order, and micro-batches of different sizes."""
    if name == "small":
        teacher, batches = small_network(), list(random_images(7).split(3))
    else:
        torch.manual_seed(0)
        teacher, batches = timm.create_model(name, num_classes=10).eval(), list(random_images(4, 32).split(2))
        randomise_batchnorm(teacher, torch.Generator().manual_seed(0), random_images(4, 32))
    found = fold(teacher, batches[0])
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for name in found.order:
            weight: Any = student.get_submodule(name).weight
            weight.copy_((weight * 8 / weight.abs().max()).round() * weight.abs().max() / 8)
    return teacher, student, found.order, batches


def collected(engine: LockStep) -> dict[str, list[list[Tensor]]]:
    """All inputs at every stop, by stream and micro-batch."""
    seen = {}
    while (layer_inputs := engine.advance()) is not None:
        seen[layer_inputs.name] = [[x.clone() for x in layer_inputs.inputs(stream)] for stream in (TEACHER, STUDENT)]
    return seen


@pytest.mark.parametrize("name", ["small", "resnet10t", "mobilenetv3_small_050", "repvgg_a0", "densenet121"])
def test_inputs_equal_those_of_a_plain_forward_bit_for_bit_in_both_streams(name: str) -> None:
    teacher, student, order, batches = two_networks(name)
    engine = LockStep([teacher, student], batches, order)
    seen = collected(engine)
    engine.close()
    assert list(seen) == order
    for stream, network in enumerate((teacher, student)):
        for index, images in enumerate(batches):
            plain = plain_inputs(network, images, order)
            assert all(torch.equal(seen[layer][stream][index], plain[layer]) for layer in order)


def test_a_layer_that_is_changed_at_its_stop_runs_on_with_the_change() -> None:
    teacher, student, order, batches = two_networks()
    changed = copy.deepcopy(student)
    changed.get_submodule("grouped").weight.data.mul_(0.5)  # type: ignore[operator,union-attr]
    expected = plain_inputs(changed, batches[0], order)
    engine = LockStep([teacher, student], batches, order)
    while (layer_inputs := engine.advance()) is not None:
        assert torch.equal(next(layer_inputs.inputs(STUDENT)), expected[layer_inputs.name])
        if layer_inputs.name == "grouped":
            student.get_submodule("grouped").weight.data.mul_(0.5)  # type: ignore[operator,union-attr]
    engine.close()


class RunsTwice(nn.Module):
    """One convolution at two depths, with an in-place activation on its input in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.last = nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.shared(x)
        self.act(x)  # what the first call was given is overwritten here
        y = self.shared(self.act(y) + x)
        out: Tensor = self.last(y)
        return out


def test_a_module_that_runs_twice_is_stopped_at_once_and_sees_its_first_input() -> None:
    torch.manual_seed(0)
    network = RunsTwice().eval()
    images = random_images(2)
    order = ["stem", "shared", "last"]
    plain = plain_inputs(network, images, order)
    engine = LockStep([network, copy.deepcopy(network)], [images], order)
    seen = collected(engine)
    engine.close()
    assert list(seen) == order
    assert all(torch.equal(seen[name][stream][0], plain[name]) for name in order for stream in (TEACHER, STUDENT))


def test_inputs_can_be_read_again_before_an_in_place_activation_overwrites_them() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)).eval()
    images = random_images(2)
    engine = LockStep([network, network], [images], ["0", "2"])
    engine.advance()
    layer_inputs = engine.advance()
    assert layer_inputs is not None
    first, again = next(layer_inputs.inputs(TEACHER)).clone(), next(layer_inputs.inputs(TEACHER))
    assert torch.equal(first, again)
    assert torch.equal(first, plain_inputs(network, images, ["2"])["2"])
    engine.close()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_spilling_to_a_file_changes_no_bit(share: float, tmp_path: Path) -> None:
    teacher, student, order, batches = two_networks("resnet10t")
    unbounded = LockStep([teacher, student], batches, order)
    expected = collected(unbounded)
    unbounded.close()
    probe = LockStep([teacher, student], batches, order, memory_bytes=1 << 60)
    bound = int(share * probe.live_bytes_needed)
    assert probe.spilled == 0
    probe.close()
    engine = LockStep([teacher, student], batches, order, memory_bytes=bound, folder=tmp_path)
    assert engine.spilled > 0
    assert list(tmp_path.iterdir()) == []  # the files have no names: a kill leaves nothing
    seen = collected(engine)
    engine.close()
    for name in order:
        for stream in (TEACHER, STUDENT):
            assert all(map(torch.equal, seen[name][stream], expected[name][stream]))
    assert list(tmp_path.iterdir()) == []


def test_the_others_join_when_all_take_no_more_memory_than_the_early_ones_did() -> None:
    live = {"a": 10, "b": 40, "c": 12, "d": 20, "e": 5, "f": 30}
    plan = Schedule.plan(live, [4, 4, 4, 4, 4, 4, 3], early=6)
    # two micro-batches make up six images; at their widest they take 80; "f" is the last, where all are
    assert plan.present == {"a": 2, "b": 2, "c": 2, "d": 2, "e": 2, "f": 7}
    assert plan.bytes_needed == 210
    plan = Schedule.plan({**live, "f": 3}, [4] * 20, early=6)
    assert plan.present == {"a": 2, "b": 2, "c": 4, "d": 4, "e": 16, "f": 20}
    assert plan.bytes_needed == 80  # however many images there are
    assert plan.order == spread_out(20)
    assert Schedule.plan(live, [4] * 7).order == list(range(7))
    # the micro-batch that is not full is not always the last to join
    assert Schedule.plan(live, [4] * 4 + [1], early=8).present["a"] == 3
    assert set(Schedule.plan(live, [4] * 7).present.values()) == {7}
    assert set(Schedule.plan(live, [4] * 7, early=28).present.values()) == {7}
    assert Schedule.plan({}, [4]).bytes_needed == 0


def test_every_beginning_of_the_order_is_spread_over_all() -> None:
    for count in (1, 2, 3, 7, 16, 31):
        order = spread_out(count)
        assert sorted(order) == list(range(count))
        for size in range(1, count + 1):
            gaps = torch.tensor([-1, *sorted(order[:size]), count]).diff()
            assert int(gaps.max()) <= 4 * count / (size + 1) + 1
    assert spread_out(8) == [0, 4, 2, 6, 1, 5, 3, 7]


def early(network: nn.Module, batches: list[Tensor], order: list[str], images: int) -> Schedule:
    return Schedule.plan(live_bytes(network, batches[0], order), list(map(len, batches)), images)


@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_those_that_join_have_seen_what_those_that_were_there_saw(share: float | None, tmp_path: Path) -> None:
    """Layers change at their stops, as commits change them; a late micro-batch runs through the changed ones."""
    teacher, student, order, _ = two_networks("resnet10t")
    batches = list(random_images(9, 32).split(1))
    changed = copy.deepcopy(student)
    with torch.no_grad():
        for name in order:
            changed.get_submodule(name).weight.mul_(0.9)  # type: ignore[operator,union-attr]
    expected = [[plain_inputs(network, images, order) for images in batches] for network in (teacher, changed)]
    schedule = early(teacher, batches, order, 3)
    bound = None if share is None else int(share * 2 * schedule.bytes_needed)
    engine = LockStep([teacher, student], batches, order, bound, tmp_path, schedule=schedule)
    assert (engine.spilled > 0) == (share is not None)
    seen = {}
    while (layer_inputs := engine.advance()) is not None:
        seen[layer_inputs.name] = list(layer_inputs.taken)
        assert layer_inputs.sizes == [1] * len(layer_inputs.taken)
        for stream in (TEACHER, STUDENT):
            inputs = [x.clone() for x in layer_inputs.inputs(stream)]
            for index, x in zip(layer_inputs.taken, inputs, strict=True):
                assert torch.equal(x, expected[stream][index][layer_inputs.name])
        with torch.no_grad():
            student.get_submodule(layer_inputs.name).weight.mul_(0.9)  # type: ignore[operator,union-attr]
    engine.close()
    assert {name: len(taken) for name, taken in seen.items()} == schedule.present
    counts = [len(taken) for taken in seen.values()]
    assert (counts[0], counts[-1]) == (3, 9)
    assert len(set(counts)) > 2
    for fewer, more in zip(seen.values(), list(seen.values())[1:], strict=False):
        assert more[: len(fewer)] == fewer


def test_joining_late_keeps_activations_as_few_as_those_of_the_early_ones() -> None:
    teacher, student, order, _ = two_networks("resnet10t")
    batches = list(random_images(16, 32).split(1))
    schedule = early(teacher, batches, order, 4)
    needed = {}
    for plan in (schedule, None):
        live, widest = LiveStorages([teacher, student], batches), 0
        with live:
            engine = LockStep([teacher, student], batches, order, schedule=plan)
            while engine.advance() is not None:
                widest = max(widest, live.bytes_alive())
            engine.close()
        needed[plan is None] = widest
    assert needed[False] == 2 * schedule.bytes_needed == 2 * 4 * max(schedule.live.values())
    assert needed[False] <= needed[True] / 4


def coarse_task(images: int, **more: Any) -> CalibrationTask:
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=10).eval()
    batches = list(random_images(images, 32).split(2))
    randomise_batchnorm(network, torch.Generator().manual_seed(0), batches[0])
    return make_task(network, Scheme.of(bits=3), batches, found=fold(network, batches[0]), **more)


def test_a_resumed_pass_has_the_images_that_an_undisturbed_one_has() -> None:
    grams: list[dict[str, Tensor]] = []
    done: dict[str, Any] = {}
    for _ in range(2):
        task = coarse_task(18, early_images=4, done=dict(done))
        grams.append({})
        for index, layer in enumerate(task.layers):
            squares = task.least_squares(layer.name)
            grams[-1][layer.name] = squares.gram
            task.commit(layer.name, rounded(layer))
            if len(grams) == 1 and index < 4:
                done[layer.name] = task.committed[layer.name]
        task.close()
    assert len(grams[1]) == len(grams[0]) - 4
    assert all(torch.equal(gram, grams[0][name]) for name, gram in grams[1].items())
    images = [metrics.get("images") for _, metrics in task.committed.values()]
    assert (images[0], images[-1]) == (4, None)  # None: all


def test_images_that_all_are_there_from_the_start_make_no_other_run() -> None:
    """A run's folder keeps its name where `calib_early` changes nothing."""

    def digest(size: int, early: int) -> str:
        return RunConfig(model="demo", data=DataConfig(calib_size=size, calib_early_images=early)).digest()

    assert digest(256, 256) == digest(256, 0) == digest(256, 1024)
    assert len({digest(1024, 0), digest(1024, 256), digest(1024, 512)}) == 3


def test_the_run_says_how_many_images_its_first_layers_saw() -> None:
    sink = ListSink()
    task = coarse_task(18, early_images=4, sink=sink)
    task.stats(task.layers[0].name)
    (note,) = [event.message for event in sink.events if isinstance(event, Note)]
    assert "fewer of the 18 images, 4 of them at first" in note
    task.close()
    sink = ListSink()
    task = coarse_task(18, early_images=18, sink=sink)
    task.stats(task.layers[0].name)
    assert not [event for event in sink.events if isinstance(event, Note)]
    task.close()


@pytest.mark.parametrize("early", [0, 4, 18])
def test_a_pass_of_fewer_images_has_these_alone_spread_over_all_and_the_next_has_all(early: int) -> None:
    task = coarse_task(18, early_images=early)
    first, last = task.layers[0].name, task.layers[-1].name
    with torch.no_grad():
        pooled = [task.teacher.forward_head(task.teacher.forward_features(x), pre_logits=True) for x in task.batches()]
    with task.calibration_subset(5) as images:
        assert images == 6  # whole micro-batches
        assert len(task.stats(first).paired) == (2 if early == 4 else 3)
        stats = task.stats(last)
        assert stats.count == 6
        chosen = torch.cat([pooled[index] for index in spread_out(9)[:3]])
        assert torch.allclose(stats.teacher_mean[0].float(), chosen.mean(0), atol=1e-5)
        assert len(task.stats(first).paired) == (2 if early == 4 else 3)  # and back
    assert task.stats(last).count == 18
    assert torch.allclose(task.stats(last).teacher_mean[0].float(), torch.cat(pooled).mean(0), atol=1e-5)
    with task.calibration_subset(100) as images:
        assert images == task.stats(last).count == 18
    task.close()


def test_a_pass_of_fewer_images_needs_room_for_these_alone() -> None:
    small = coarse_task(2)
    live = live_bytes(small.teacher, random_images(2, 32), [layer.name for layer in small.layers])
    task = coarse_task(18, memory_bytes=2 * 4 * max(live.values()))  # four micro-batches of nine, in both streams
    with task.calibration_subset(4):
        task.stats(task.layers[-1].name)
        assert task.traversal.spilled == 0
    task.stats(task.layers[-1].name)
    assert task.traversal.spilled > 0
    task.close()


def test_fisher_information_is_of_the_images_that_a_unit_has() -> None:
    task = coarse_task(18, early_images=4)
    unit = task.partition()[0]
    data = task.block_io(unit)
    assert len(data.student_input) == len(data.teacher_output) < 18
    assert len(task.fisher(unit)) == len(data.teacher_output)
    task.close()


class Calls(nn.Module):
    """A Sequential between two convolutions, whose input is perhaps read again behind it."""

    def __init__(self, again: str, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.again, first = again, nn.Conv2d(4, 4, 3, padding=1)
        inner = [nn.ReLU(inplace=True), first] if in_place else [first, nn.ReLU(inplace=True)]
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.blocks = nn.Sequential(*inner, nn.Conv2d(4, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.blocks(x)
        if self.again == "value":
            y = y + x.mean()
        if self.again == "shape":
            y = y.reshape(x.shape[0], 4, -1, 1)
        if self.again == "silently" and x.numel():
            y = -y
        result: Tensor = self.head(y)
        return result


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("again", ["never", "value", "shape", "silently"])
def test_a_sequential_s_input_is_let_go_of_only_where_nobody_reads_it_again(again: str, in_place: bool) -> None:
    network, images = Calls(again, in_place).eval(), random_images(2)
    order = ["stem", "blocks.2", "blocks.3", "head"]
    found = releasable_inputs(network, images)
    # an activation in place makes its output of its input: nothing is let go of, whoever reads it
    assert found == (["blocks"] if again == "never" or in_place else [])
    assert hook_count(network) == 0
    engine = LockStep([network, copy.deepcopy(network)], [images], order, release=found)
    seen = collected(engine)
    plain = plain_inputs(network, images, order)
    assert all(torch.equal(seen[name][stream][0], plain[name]) for name in order for stream in (TEACHER, STUDENT))
    engine.close()
    assert hook_count(network) == 0
    held, let_go = live_bytes(network, images, order), live_bytes(network, images, order, found)
    one = network.stem(images).nbytes
    saved = [held[name] - let_go[name] for name in order]
    assert saved == ([0, one, one, one] if again == "never" and not in_place else [0] * 4)


def test_images_are_never_let_go_of_nor_what_others_run_meanwhile() -> None:
    network, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval(), random_images(2)
    network = nn.Sequential(network, nn.Conv2d(4, 2, 1))
    before, expected = images.clone(), network(images)
    found = releasable_inputs(network, images)
    assert found == ["", "0"]
    engine = LockStep([network, copy.deepcopy(network)], [images], ["0.1", "1"], release=found)
    engine.advance()
    assert torch.equal(network(images), expected)
    while engine.advance() is not None:
        pass
    engine.close()
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "densenet121"])
def test_letting_go_of_inputs_changes_no_bit_and_saves_memory(name: str) -> None:
    teacher, student, order, batches = two_networks(name)
    found = releasable_inputs(teacher, batches[0])
    assert found
    seen = []
    for release in ([], found):
        engine = LockStep([teacher, student], batches, order, release=release)
        seen.append(collected(engine))
        engine.close()
    assert list(seen[0]) == list(seen[1])
    for stop, streams in seen[0].items():
        for stream, inputs in enumerate(streams):
            assert all(map(torch.equal, inputs, seen[1][stop][stream]))
    held, let_go = (live_bytes(teacher, batches[0], order, release) for release in ([], found))
    assert all(let_go[stop] <= held[stop] for stop in order)
    assert name == "densenet121" or sum(let_go.values()) < 0.9 * sum(held.values())


class Waits(nn.Module):
    """A tensor waits through two stops to be added; perhaps it is changed in place meanwhile."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.layers
        waits = first(x)
        y = second(waits)
        if self.in_place:
            waits.relu_()
        y = third(y)
        result: Tensor = fourth(y + waits)
        return result


@pytest.mark.parametrize("in_place", [False, True])
def test_what_waits_is_spilled_again_only_if_it_was_written_to(
    in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            written.append(super().write(data))
            return written[-1]

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Counted(os.memfd_create("spilled"), "w+"))
    torch.manual_seed(0)
    network, images = Waits(in_place).eval(), random_images(4, 8)
    order = [f"layers.{i}" for i in range(4)]
    engine = LockStep([network, network], [images[:2], images[2:]], order, memory_bytes=0, folder=tmp_path)
    assert engine.spilled == 4
    seen = collected(engine)
    engine.close()
    for name, expected in plain_inputs(network, images, order).items():
        assert torch.equal(torch.cat(seen[name][TEACHER]), expected)
    # the outputs of three layers, and the sum; a second time the first layer's, which waits
    assert sum(written) == 2 * (4 + in_place) * images.nbytes


def test_spilling_keeps_live_activations_within_the_bound(tmp_path: Path) -> None:
    teacher, student, order, _ = two_networks("resnet10t")
    batches = list(random_images(16, 32).split(1))
    probe = LockStep([teacher, student], batches, order, memory_bytes=1 << 60)
    needed = probe.live_bytes_needed
    probe.close()
    bound = needed // 3
    live = LiveStorages([teacher, student], batches)
    with live:  # sees every tensor that is made, whoever makes it
        engine = LockStep([teacher, student], batches, order, memory_bytes=bound, folder=tmp_path)
        assert engine.spilled > 0
        widest = 0
        while (layer_inputs := engine.advance()) is not None:
            widest = max(widest, live.bytes_alive())
            for _ in layer_inputs.pairs():
                widest = max(widest, live.bytes_alive())
        engine.close()
    assert 0 < widest <= bound


def test_nothing_is_left_behind_after_closing_in_the_middle() -> None:
    teacher, student, order, batches = two_networks()
    with torch.no_grad():
        expected = teacher(batches[0])
    threads = threading.active_count()
    engine = LockStep([teacher, student], batches, order)
    assert hook_count(teacher) == hook_count(student) == len(order)
    engine.advance()
    engine.advance()
    engine.close()
    assert hook_count(teacher) == hook_count(student) == 0
    assert threading.active_count() == threads
    with torch.no_grad():
        assert torch.equal(teacher(batches[0]), expected)
    engine.close()  # twice does no harm


def test_a_network_can_be_run_as_usual_while_a_pass_is_parked_in_it() -> None:
    teacher, student, order, batches = two_networks()
    with torch.no_grad():
        expected = teacher(batches[0])
    engine = LockStep([teacher, student], batches, order)
    engine.advance()
    with torch.no_grad():
        assert torch.equal(teacher(batches[0]), expected)
    engine.close()


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bright, self.dark = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bright if x.mean() > 0 else self.dark
        out: Tensor = branch(self.first(x))
        return out


def test_control_flow_that_depends_on_the_data_is_an_error_that_says_so() -> None:
    network = DataDependent().eval()
    batches = [torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)]
    engine = LockStep([network, copy.deepcopy(network)], batches, ["first", "bright", "dark"])
    engine.advance()
    with pytest.raises(CoraqError, match="different layers for different images"):
        engine.advance()
    engine.close()
    assert hook_count(network) == 0


def test_an_error_in_the_network_reaches_the_caller() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.conv(x)
            raise ArithmeticError("a bug of the network's own")

    network = Breaks().eval()
    engine = LockStep([network, network], [random_images(1)], ["conv"])
    engine.advance()
    with pytest.raises(ArithmeticError, match="of the network's own"):
        engine.advance()
    engine.close()
    assert hook_count(network) == 0


# -- the calibration task


@pytest.fixture
def task() -> Iterator[CalibrationTask]:
    made = small_task()
    yield made
    made.close()


@torch.no_grad()
def outputs_by_channel(network: nn.Module, name: str, batches: list[Tensor], inputs_of: nn.Module) -> Tensor:
    """A layer's outputs [channels, positions] in float64, on the inputs that it gets in `inputs_of`."""
    layer = copy.deepcopy(network.get_submodule(name)).double()
    outputs = [layer(plain_inputs(inputs_of, x, [name])[name].double()) for x in batches]
    return torch.cat(
        [y.transpose(0, 1).flatten(1) if y.dim() == 4 else y.reshape(-1, y.shape[-1]).t() for y in outputs], 1
    )


def mean_close(a: Tensor, b: Tensor) -> bool:
    """Means agree to the float32 rounding of bias, weights and sums: 1e-5 of the size of the outputs."""
    size = float(torch.cat([a, b]).abs().max())
    return bool((a.mean(1) - b.mean(1)).abs().max() < 1e-5 * size)


def test_bias_correction_makes_every_mean_output_equal_the_float_network_s(task: CalibrationTask) -> None:
    batches = list(task.batches())
    for layer in task.layers:
        task.commit(layer.name, rounded(layer))
        of_float = outputs_by_channel(task.teacher, layer.name, batches, task.teacher)
        of_student = outputs_by_channel(task.student, layer.name, batches, task.student)
        assert mean_close(of_student, of_float), layer.name
    assert not torch.equal(of_student, of_float)  # the means only


def test_bias_correction_by_layer_makes_the_mean_that_of_float_weights_on_the_same_inputs() -> None:
    task = small_task(scheme=Scheme.of(bits=3, bias_correction="layer"))
    batches = list(task.batches())
    for layer in task.layers:
        task.commit(layer.name, rounded(layer))
        of_float = outputs_by_channel(task.teacher, layer.name, batches, task.student)
        of_student = outputs_by_channel(task.student, layer.name, batches, task.student)
        assert mean_close(of_student, of_float), layer.name
    task.close()


def test_the_gain_makes_every_channel_vary_as_in_the_float_network(task: CalibrationTask) -> None:
    """All positions are sampled here, so it does so exactly, wherever the factor is within its bounds."""
    batches = list(task.batches())
    shrunk = 0
    for layer in task.layers:
        own = rounded(layer)
        task.commit(layer.name, own)
        of_float = outputs_by_channel(task.teacher, layer.name, batches, task.teacher)
        of_student = outputs_by_channel(task.student, layer.name, batches, task.student)
        gain = (task.committed[layer.name][0].weight.scale / own.weight.scale).flatten()
        assert float(gain.min()) >= 0.5
        assert float(gain.max()) <= 2.0
        inside = (gain > 0.5) & (gain < 2.0) & (of_float.var(1) > 1e-6)
        torch.testing.assert_close(of_student.var(1)[inside], of_float.var(1)[inside], rtol=1e-4, atol=0.0)
        shrunk += int(inside.sum())
    assert shrunk > 20


def test_gain_keep_leaves_every_scale_alone() -> None:
    task = small_task(scheme=Scheme.of(bits=3, scale_correction="off"))
    for layer in task.layers:
        own = rounded(layer)
        task.commit(layer.name, own)
        assert torch.equal(task.committed[layer.name][0].weight.scale, own.weight.scale)
    task.close()


def test_bias_keep_leaves_every_bias_alone() -> None:
    task = small_task(scheme=Scheme.of(bits=3, bias_correction="off"))
    for layer in task.layers:
        task.commit(layer.name, rounded(layer))
        committed = task.committed[layer.name][0].bias
        assert (committed is None and layer.bias is None) or torch.equal(committed, layer.bias)  # type: ignore[arg-type]
    task.close()


def test_a_bias_that_the_method_gives_is_taken_as_it_is(task: CalibrationTask) -> None:
    layer = task.layers[0]
    bias = torch.arange(8, dtype=torch.float32)
    task.commit(layer.name, QuantizedLayer(rounded(layer).weight, bias=bias))
    assert torch.equal(task.student.get_submodule(layer.name).bias, bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", ["network", "layer", "off"])
def test_the_least_squares_error_is_the_true_output_error_of_every_kind_of_layer(bias: str) -> None:
    """`Σ δHδᵀ` against the convolution itself, in float64: grouped, depthwise, strided, "same"-padded, 1×1, Linear."""
    task = small_task(scheme=Scheme.of(bits=3, bias_correction=bias))
    batches = list(task.batches())
    for layer in task.layers:
        squares = task.least_squares(layer.name, 0.0)
        assert squares.weight is layer.weight or torch.equal(squares.weight, layer.weight)
        inputs = [plain_inputs(task.student, x, [layer.name])[layer.name] for x in batches]
        candidate = rounded(layer)
        module = task.teacher.get_submodule(layer.name)
        true = mean_output_error(module, inputs, layer.weight - candidate.dequantize(), centred=bias != "off")
        found = squares.error(candidate.dequantize())
        # Grams are summed in float32 products (relative 1e-6 of the uncentred energy), then read in float64
        raw = mean_output_error(module, inputs, layer.weight - candidate.dequantize(), centred=False)
        assert (found - true).abs().max() <= 1e-5 * raw.max(), layer.name
        task.commit(layer.name, candidate)
    task.close()


def test_a_transposed_gram_would_be_noticed() -> None:
    # the planted fault of the test above: taps and channels in the wrong order
    task = small_task()
    for layer in task.layers:
        squares = task.least_squares(layer.name, 0.0)
        if layer.name == "grouped":
            delta = squares.weight - rounded(layer).dequantize()
            groups, out, _ = delta.shape
            wrong = delta.reshape(groups, out, 2, 9).transpose(2, 3).reshape(delta.shape)
            right = squares.error(squares.weight - delta)
            assert not torch.allclose(squares.error(squares.weight - wrong), right, rtol=0.01)
        task.commit(layer.name, rounded(layer))
    task.close()


def test_the_float_target_is_the_weight_that_best_gives_the_float_outputs_on_the_student_s_inputs() -> None:
    task = small_task(scheme=Scheme.of(bits=2), batches=list(random_images(64, seed=1).split(16)))
    batches = list(task.batches())
    checked = 0
    for layer in task.layers:
        squares = task.least_squares(layer.name, 1.0)
        module = task.teacher.get_submodule(layer.name)
        inputs = [plain_inputs(task.student, x, [layer.name])[layer.name] for x in batches]
        wanted = outputs_by_channel(task.teacher, layer.name, batches, task.teacher)

        def error(weight: Tensor, module: Any = module, inputs: Any = inputs, wanted: Tensor = wanted) -> float:
            own = copy.deepcopy(module).double()
            own.weight.data.copy_(weight.reshape(own.weight.shape))
            with torch.no_grad():
                outputs = [own(x.double()) for x in inputs]
            rows = [y.transpose(0, 1).flatten(1) if y.dim() == 4 else y.reshape(-1, y.shape[-1]).t() for y in outputs]
            difference = torch.cat(rows, 1) - wanted
            return float((difference - difference.mean(1, keepdim=True)).square().mean())

        start, best = error(layer.weight), error(squares.weight)
        if start > 1e-9:  # behind the first layers, whose inputs are the float network's
            checked += 1
            assert best <= start * (1 + 1e-6), layer.name
            generator = torch.Generator().manual_seed(0)
            for _ in range(5):  # no step away from the optimum helps, damping aside
                step = 0.05 * squares.weight.std() * torch.randn(squares.weight.shape, generator=generator)
                assert error(squares.weight + step) > best
        task.commit(layer.name, rounded(layer))
    assert checked >= 4
    task.close()


def test_on_unquantized_inputs_the_float_target_is_the_float_weight(task: CalibrationTask) -> None:
    squares = task.least_squares("stem", 1.0)
    assert torch.allclose(squares.weight, task.layers[0].weight, atol=1e-5)


def test_an_input_that_hardly_varies_has_no_variance_rather_than_a_negative_one() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 3)).eval()
    with torch.no_grad():
        network[0].weight[:24] *= 1e-7  # below the rounding of what the bias makes of it  # type: ignore[operator]
        network[0].bias.mul_(1000)  # type: ignore[union-attr,operator]
    batches = list(random_images(8, seed=1).split(4))
    for rows in (0, 1):
        task = make_task(network, Scheme.of(bits=4), batches, found=fold(network, batches[0]), rows_per_input=rows)
        for layer in task.layers:
            squares = task.least_squares(layer.name, 0.0)
            moments = task.stats(layer.name)._student.student
            plain = moments.gram - moments.mean[:, :, None] * moments.mean[:, None, :]
            diagonal = squares.gram.diagonal(dim1=1, dim2=2)
            still = diagonal[0] == 0
            assert bool((diagonal >= 0).all())
            assert not bool(squares.gram[0, still].any())
            assert torch.equal(squares.gram[0, ~still][:, ~still], plain[0, ~still][:, ~still])
            task.commit(layer.name, rounded(layer))
        task.close()
        assert int(still.sum()) == 24 * 9
        assert bool((plain.diagonal(dim1=1, dim2=2) < 0).any())  # rounding does make them


def test_statistics_expire_when_the_next_layer_is_asked_for(task: CalibrationTask) -> None:
    first, second = task.layers[:2]
    kept, unread = task.stats(first.name), task.stats(first.name)
    gram = kept.gram
    task.commit(first.name, rounded(first))
    task.stats(second.name)
    assert torch.equal(kept.gram, gram)  # what has been read stays
    with pytest.raises(CoraqError, match=f"statistics of layer {first.name} are gone"):
        _ = unread.cross_gram


def test_going_back_to_an_earlier_layer_costs_a_pass_and_gives_the_same_statistics(task: CalibrationTask) -> None:
    first, second = task.layers[0], task.layers[1]
    gram = task.stats(second.name).gram.clone()
    task.stats(first.name)
    assert task.traversal.passes == 2
    assert torch.equal(task.stats(second.name).gram, gram)


def test_a_task_runs_one_pass_whatever_the_depth(task: CalibrationTask) -> None:
    for layer in task.layers:
        task.least_squares(layer.name)
        task.commit(layer.name, rounded(layer))
    task.finish("test")
    assert task.traversal.passes == 1
    assert hook_count(task.teacher) == hook_count(task.student) == 0


def test_a_memory_bound_changes_no_committed_bit_and_is_reported(tmp_path: Path) -> None:
    digests, sinks = [], []
    for bound in (None, 1 << 12):
        sinks.append(ListSink())
        task = small_task(memory_bytes=bound, folder=tmp_path, sink=sinks[-1])
        for layer in task.layers:
            task.least_squares(layer.name, 1.0)
            task.commit(layer.name, rounded(layer))
        task.finish("test")
        digests.append(state_digest(task.student))
    assert digests[0] == digests[1]
    assert [note for note in sinks[0].events if isinstance(note, Note)] == []
    notes = [note for note in sinks[1].events if isinstance(note, Note)]
    assert len(notes) == 1
    assert "temporary file" in notes[0].message


def test_commits_logs_and_notes_are_events(task: CalibrationTask) -> None:
    sink = ListSink()
    task = small_task(scheme=Scheme.of(bits=8), sink=sink)
    task.log("loss", 0.5, 3)
    layer = task.layers[0]
    task.commit(layer.name, rounded(layer), sweeps=2)
    assert sink.events[0] == Metric("loss", 0.5, 3)
    committed = sink.events[1]
    assert isinstance(committed, LayerCommitted)
    assert (committed.name, committed.index, committed.total) == (layer.name, 1, 7)
    assert committed.metrics["sweeps"] == 2
    assert committed.metrics["weight_sqnr_db"] > 20  # type: ignore[operator]  # eight bits
    task.close()


def test_a_wrong_shape_or_name_is_refused_with_the_layer_s_name(task: CalibrationTask) -> None:
    first, second = task.layers[:2]
    with pytest.raises(CoraqError, match=f"result for layer {first.name} is invalid"):
        task.commit(first.name, rounded(second))
    with pytest.raises(CoraqError, match="no layer 'nowhere'"):
        task.commit("nowhere", rounded(first))
    with pytest.raises(CoraqError, match="no layer 'nowhere'"):
        task.stats("nowhere")


def test_layers_are_views_of_the_folded_weights_with_their_own_bits() -> None:
    scheme = Scheme.of(bits=3, first_bits=8, overrides={})
    task = small_task(scheme=scheme)
    assert [layer.bits for layer in task.layers] == [8, 3, 3, 3, 3, 3, 3]
    kinds = {layer.name: layer.kind for layer in task.layers}
    assert kinds == {
        "stem": "conv", "grouped": "conv", "depthwise": "depthwise", "pointwise": "conv", "dense": "conv",
        "hidden": "linear", "head": "linear",
    }  # fmt: skip
    for layer in task.layers:
        module: Any = task.teacher.get_submodule(layer.name)
        assert torch.equal(layer.weight, as_matrices(module.weight, groups_of(module)))
    macs = {layer.name: layer.macs for layer in task.layers}
    assert macs["stem"] == 8 * 8 * 8 * 27
    assert macs["depthwise"] == 4 * 4 * 16 * 25
    assert macs["head"] == 160
    task.close()


def test_trace_of_an_empty_network_is_empty() -> None:
    found = fold(nn.Sequential(nn.ReLU()), random_images(1))
    assert (found.order, found.outputs, found.structure) == ([], {}, Structure())


@pytest.mark.parametrize("rows", [100, 200, 400])
def test_a_regression_does_not_fit_the_noise_of_few_rows(rows: int) -> None:
    """Outputs that inputs say nothing of: what is fitted to them is error, most of it with as many rows as inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 200, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    gram, drift = inputs.T @ inputs / rows, noise.T @ inputs / rows
    fitted = regress(drift[None], gram[None], rows)[0]
    assert fitted.square().sum(1).mean() < 0.3  # of the noise's variance of 1, on inputs not seen


def test_a_layers_problem_is_posed_once_for_each_correction(task: CalibrationTask) -> None:
    first, second = task.layers[:2]
    half = task.least_squares(first.name, 0.5)
    assert task.least_squares(first.name, 0.5) is half
    assert task.least_squares(first.name, 0.0).weight is not half.weight
    task.commit(first.name, rounded(first))
    assert task.least_squares(second.name, 0.5).weight.shape == second.weight.shape


def test_the_cross_gram_and_the_reported_errors_are_those_of_the_patches(task: CalibrationTask) -> None:
    """With all positions of few images: the definitions, in float64."""
    first, second = task.layers[:2]
    task.commit(first.name, rounded(first))
    stats = task.stats(second.name)
    groups, _, inputs = second.shape
    windows = (torch.cat(z).double().mT for z in zip(*stats.paired, strict=True))  # [rows, channels, taps]
    x, y = (z.reshape(-1, groups, inputs).transpose(0, 1) for z in windows)
    assert not torch.allclose(x, y)
    torch.testing.assert_close(stats.cross_gram, x.mT @ y / x.shape[1], rtol=1e-4, atol=1e-5)
    layer = rounded(second)
    task.commit(second.name, layer)
    committed, numbers = task.committed[second.name]
    bias = [torch.zeros(1) if b is None else b for b in (second.bias, committed.bias)]
    wanted = x @ second.weight.double().mT + bias[0].double().reshape(len(x), 1, -1)
    found = y @ committed.dequantize().double().mT + bias[1].double().reshape(len(x), 1, -1)
    assert numbers["output_error"] == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-4)
    assert numbers["input_error"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-4)
