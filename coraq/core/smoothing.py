"""Input scales: factors of a layer's input channels that its activation grid and its weight have in common.

One grid for a whole tensor wastes its levels on channels that are small beside the others. Multiplied by a factor each,
channels use the range alike, and the weight takes the factors off again: `(W/k)(k·x) = Wx`. So what is hard to round
moves from the activations to the weight, as much of it as a power says (SmoothQuant, arXiv 2211.10438, whose 0.5 it is
here). A depthwise layer has a weight scale for every channel as it is: there the factors cost nothing, and the power is
1. They are stored as the weight's column scales: what is multiplied are plain codes on both sides.

A search for the power of least estimated error, as AWQ has one (arXiv 2306.00978), was tried: KL .504 where 0.5
throughout has .464 and no factors .539 (mobilenetv2_100, W4A4, 256 images, comq).
"""

from __future__ import annotations

import torch
from torch import Tensor

from coraq.core.columns import MOST, rounded
from coraq.core.ranges import NORM

SHARED, DEPTHWISE = 0.5, 1.0  # powers
CLIPS, LEAST_CLIP = 40, 0.1  # ranges tried for a channel, and the least, as a share of its extreme
CACHED = 1 << 16  # values searched at once on a CPU: they stay in its cache from clip to clip


def channel_ranges(values: Tensor, bits: int) -> Tensor:
    """The range of each channel's own best grid, float32 [channels], of values [channels, n] of it.

    Of least `Σ |x − round(x)|^2.4`; on one side of zero if no value of any channel is negative, else even on both.
    """
    signed = bool((values < 0).any())
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    extreme = values.abs().amax(1)
    extreme = extreme.clamp(min=float(extreme.max()) / MOST)  # a dead channel's
    clips = torch.logspace(0, torch.log10(torch.tensor(LEAST_CLIP)).item(), CLIPS).tolist()

    def search(values: Tensor, extreme: Tensor) -> Tensor:
        least, best = torch.full_like(extreme, torch.inf), extreme
        for clip in clips:
            step = (extreme * clip / high)[:, None].clamp(min=1e-30)
            error = (values / step).round_().clamp_(-high if signed else 0, high).mul_(step).sub_(values)
            loss = error.abs_().pow_(NORM).sum(1)
            best = torch.where(loss < least, extreme * clip, best)
            least = torch.minimum(loss, least)
        return best

    rows = max(1, CACHED // values.shape[1]) if values.device.type == "cpu" else len(values)
    return torch.cat([search(*part) for part in zip(values.split(rows), extreme.split(rows), strict=True)])


def input_scales(values: Tensor, bits: int, power: float) -> Tensor:
    """Factors of a tensor's channels, float32 [channels]: 1 or more, numbers that column scales can store.

    Args:
        values: float32 [channels, n], some of the tensor's values in the float network.
        bits: of the activation grid.
        power: of the channels' ranges that is taken off: 0 nothing, 1 all.
    """
    ranges = channel_ranges(values, bits)
    top = ranges.max()
    ratio = torch.where(top > 0, top / ranges.clamp(min=1e-30), 1.0).clamp(max=MOST)
    return rounded(ratio.pow(power))
