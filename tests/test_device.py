"""Claims about devices. `meta` stands for an accelerator where none is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coraq.calibration import spill
from coraq.core.draws import uniform_like
from coraq.runtime import system

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class GeneratorsMatch(TorchDispatchMode):
    """Fails where a generator of one device fills a tensor of another, as CUDA does; `meta` alone lets it pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        generators = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Generator)}
        tensors = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if generators and tensors and generators != tensors:
            raise AssertionError(f"{func}: generators on {generators} fill tensors on {tensors}")
        return func(*args, **(kwargs or {}))


def test_the_check_of_generators_fails_on_another_devices_generator() -> None:
    with GeneratorsMatch(), pytest.raises(AssertionError, match="generators on"):
        torch.empty(3, device="meta").uniform_(generator=torch.Generator())


def test_draws_for_another_device_come_from_the_generators_own() -> None:
    with GeneratorsMatch():
        assert uniform_like(torch.empty(4, 3, device="meta"), torch.Generator()).device.type == "meta"


def test_draws_on_the_cpu_are_what_uniform_gives() -> None:
    x = torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last)
    wanted = torch.empty_like(x).uniform_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(uniform_like(x, torch.Generator().manual_seed(3)), wanted)


def test_the_files_system_calls_never_get_another_devices_address() -> None:
    with pytest.raises(ValueError, match="on meta"):
        spill._bytes_of(torch.empty(8, device="meta").untyped_storage())


def test_the_memory_bound_of_a_cuda_device_is_half_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 8 << 30))
    assert system.default_memory_bound("cuda") == 3 << 30


@needs_cuda
def test_the_draws_on_cuda_are_the_cpus() -> None:
    drawn = [uniform_like(torch.empty(9, device=d), torch.Generator().manual_seed(1)).cpu() for d in ("cpu", "cuda")]
    assert torch.equal(*drawn)
