"""Importing torch and timm for a command: without torch's compiler, and nothing of them lost by that."""

import subprocess
import sys
import textwrap

import pytest


def run_python(code: str) -> str:
    """What a process of its own prints: what is imported here stays."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=240, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_run_leaves_torchs_compiler_out_and_whoever_wants_it_gets_it(tmp_path):
    code = f"""
        import sys
        from coraq.cli.app import run
        assert run(["quantize", "demo", "--method", "rtn", "--calib-size", "8", "-q", "-O", {str(tmp_path)!r}]) == 0
        assert "torch._dynamo" not in sys.modules and "timm.data" in sys.modules

        import timm, torch
        from torchvision.ops import roi_align
        boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
        assert roi_align(torch.ones(1, 1, 8, 8), boxes, 2).unique().tolist() == [1.0]  # asks is_compile_supported
        image = torch.ones(1, 3, 32, 32)
        assert torch.compile(torch.nn.Conv2d(3, 4, 3), backend="eager")(image).shape == (1, 4, 30, 30)
        from torch._dynamo import disable
        assert disable.__module__.startswith("torch._dynamo") and torch._dynamo.disable is disable
        from timm.models import naflexvit  # whose decorator did nothing
        assert callable(naflexvit.NaFlexRopeIterator)
        print("all there")
    """
    assert run_python(code).endswith("all there\n")


@pytest.mark.parametrize("lacking", ["disable", "utils"])
def test_a_timm_that_asks_more_of_the_compiler_gets_the_real_one(lacking):
    code = f"""
        import sys
        from contextlib import contextmanager
        from coraq.cli import loading

        whole = loading.compiler_left_out

        @contextmanager
        def less():
            with whole():
                if {lacking!r} == "utils":
                    del sys.modules["torch._dynamo.utils"]
                else:
                    del sys.modules["torch._dynamo"].disable
                yield

        loading.compiler_left_out = less
        loading.load_networks()
        import timm
        from torchvision.ops import roi_align
        assert hasattr(sys.modules["torch._dynamo"], "eval_frame")  # no stand-in
        assert timm.create_model("resnet18").fc.out_features == 1000
        print("all there")
    """
    assert run_python(code).endswith("all there\n")


def test_a_compiler_that_is_there_already_stays():
    code = """
        import sys, torch._dynamo
        before = sys.modules["torch._dynamo"]
        from coraq.cli.loading import load_networks
        load_networks()
        assert sys.modules["torch._dynamo"] is before and "timm.data" in sys.modules
        print("all there")
    """
    assert run_python(code).endswith("all there\n")
