"""Any timm ConvNet: one network of every family is folded, quantized, written, read back and compared bit for bit.

The families are those of `examples/families.py`, which also writes the table in `examples/results/families.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from support.examples_folder import example
from torch import nn

from coraq.network.fold import fold, relative_error

families = example("families")
LIGHT = [pytest.param(family, id=family.name) for family in families.FAMILIES if not family.heavy]
HEAVY = [pytest.param(family, id=family.name) for family in families.FAMILIES if family.heavy]
CUT_DOWN = [pytest.param(family, id=family.name) for family in families.FAMILIES if family.smaller]

# fmt: off
PROMISED = [
    "resnet", "resnetv2", "resnest", "res2net", "resnext", "seresnet", "sknet", "senet",
    "regnetx", "regnety", "regnetz", "efficientnet", "efficientnet_lite", "tf_efficientnet", "mobilenetv1",
    "mobilenetv2",
    "mobilenetv3", "mobilenetv4", "mixnet", "mnasnet", "tinynet", "fbnet", "hardcorenas", "lcnet",
    "lcnetv2", "ghostnet", "repghost", "convnext", "convnextv2", "convmixer", "inception_next", "inception_v3",
    "inception_v4", "inception_resnet_v2", "densenet", "dla", "dpn", "vgg", "xception", "xception_aligned",
    "nasnet", "pnasnet", "hrnet", "hgnet", "hgnetv2", "cspnet", "cspnext", "darknet",
    "vovnet", "selecsls", "tresnet", "nfnet", "nf_resnet", "repvgg", "mobileone", "gernet",
    "repvit", "fasternet", "starnet", "rexnet", "rdnet", "mambaout", "edgenext",
]
# fmt: on


def test_no_promised_family_is_missing() -> None:
    names = {family.name for family in families.FAMILIES}
    assert not [name for name in PROMISED if name not in names]
    assert any(name.startswith("efficientvit") for name in names)
    assert len(names) == len(families.FAMILIES)


def test_the_committed_table_has_every_family_and_no_failure() -> None:
    table = families.RESULT.read_text()
    missing = [family.name for family in families.FAMILIES if f"| {family.name} | {family.architecture}" not in table]
    assert not missing
    assert "| fails |" not in table


def quantized(family: Any, methods: Sequence[str]) -> None:
    """Folded to the same function, written, read back with equal outputs, no layer worse by comq than by rtn."""
    outcome = families.check(family, methods)
    assert outcome.layers > 0
    assert all(map(math.isfinite, outcome.sqnr_db.values()))
    assert outcome.sqnr_db.get("comq", 1) > 0  # better than answering zero; a random deep network may defeat rtn


@pytest.mark.parametrize("family", LIGHT)
def test_a_network_is_quantized_written_and_read_back_bit_for_bit(family: Any) -> None:
    quantized(family, ("rtn", "comq"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", HEAVY)
def test_a_large_network_is_quantized_written_and_read_back_bit_for_bit(family: Any) -> None:
    quantized(family, ("rtn", "comq"))


@pytest.mark.parametrize("family", HEAVY)
def test_a_large_network_is_folded_to_the_same_function(family: Any) -> None:
    network, images = families.build(family), families.images(family)[:2]
    found = fold(network, images)  # which asserts it
    assert len(found.order) > 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", CUT_DOWN)
def test_the_published_depth_and_width_works_too(family: Any) -> None:
    assert math.isfinite(families.check(family, ["rtn"], published=True).sqnr_db["rtn"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_convolutional_architecture_of_timm_s_test_size_folds() -> None:
    for name in timm.list_models("test_*", exclude_filters=["*vit*", "*coatnet*"]):
        torch.manual_seed(0)
        network: nn.Module = timm.create_model(name, num_classes=10).eval()
        images = torch.randn(2, *network.pretrained_cfg["input_size"])  # type: ignore[index,misc]
        with torch.no_grad():
            before = network(images)
            fold(network, images)
            assert relative_error(network(images), before) < 1e-4
