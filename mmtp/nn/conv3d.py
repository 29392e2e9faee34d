"""Layers over frames, causal in time: a frame of output depends on frames up to its own, so that the first frame stands alone.

``1 + n s`` frames become ``1 + n`` where a layer shortens time by ``s``, and these become ``1 + n s`` frames again (Yu et al., arXiv
2310.05737, section 3.2). Before the first frame lies the first frame, over and over. Every layer works on a whole video at once or, with
a state, on the frames as they come; both are the same sums, up to the order in which a kernel of another shape adds them (about 1e-6).
"""

from fractions import Fraction

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.nn.conv import ChannelNorm
from mmtp.nn.conv1d import State, TimeLayer


class FrameConv(nn.Conv2d):
    """A convolution within each frame by itself; zeros lie around the frame where the kernel is larger than the stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        assert kernel >= stride and (kernel - stride) % 2 == 0, "inputs would be skipped, or borders be unlike each other"
        super().__init__(inputs, outputs, kernel, stride, padding=(kernel - stride) // 2)

    def forward(self, input: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c2 t h2 w2"]:
        frames = rearrange(input, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        return rearrange(super().forward(frames), "(b t) c h w -> b c t h w", b=len(input))


class CausalConv(TimeLayer):
    """A convolution over the frames up to each one, at each pixel by itself; one output per ``stride`` frames, the first of the first."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        assert kernel > stride, "a window must reach back to the one before it, so that motion shows between them"
        # With rows and columns as one axis it is a convolution over a plane, for which kernels are quicker than for a volume.
        self.conv = nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1))
        self.padding = (kernel - 1, 0)
        self.rate = Fraction(1, stride)

    def forward(self, x: Float[Tensor, "b c t h w"], state: State | None = None) -> Float[Tensor, "b c2 t2 h w"]:
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        past = x[:, :, :1].expand(-1, -1, kernel - 1, -1, -1) if state is None or self not in state else state[self]
        x = torch.cat([past, x], 2)
        if state is not None:
            # The next window begins a stride after the last one began. A copy: a view would keep all frames in memory.
            state[self] = x[:, :, x.shape[2] - (kernel - stride) :].clone()
        plane = rearrange(x, "b c t h w -> b c t (h w)").contiguous(memory_format=torch.channels_last)
        return rearrange(self.conv(plane), "b c t (h w) -> b c t h w", h=x.shape[3])


class Downsample(TimeLayer):
    """One output for a square of ``stride[1]`` pixels a side in each of ``stride[0]`` frames."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.space = FrameConv(inputs, outputs, stride[1], stride=stride[1])
        self.time = CausalConv(outputs, outputs, stride[0] + 1, stride=stride[0]) if stride[0] > 1 else None

    def forward(self, x: Float[Tensor, "b c t h w"], state: State | None = None) -> Float[Tensor, "b c2 t2 h2 w2"]:
        x = self.space(x)
        return x if self.time is None else self.time(x, state)


class Upsample(TimeLayer):
    """``stride`` outputs per input in time and along both sides: convolutions of as many times the channels, dealt out.

    The first frame becomes one frame: those that would lie before it are dropped (arXiv 2310.05737, section 3.2).
    """

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.step, self.pace = stride
        self.space = FrameConv(inputs, outputs * self.pace**2, 3)
        self.time = CausalConv(outputs, outputs * self.step, 2) if self.step > 1 else None

    def forward(self, x: Float[Tensor, "b c t h w"], state: State | None = None) -> Float[Tensor, "b c2 t2 h2 w2"]:
        x = rearrange(self.space(x), "b (c p q) t h w -> b c t (h p) (w q)", p=self.pace, q=self.pace)
        if self.time is None:
            return x
        before = self.step - 1 if state is None or self.time not in state else 0
        return rearrange(self.time(x, state), "b (c s) t h w -> b c (t s) h w", s=self.step)[:, :, before:]


class FactorisedResidual(TimeLayer):
    """Pre-norm residual block: a convolution within each frame, then one over time (Cosmos, arXiv 2501.03575, section 4).

    The second convolution starts at zero, so that a deep stack starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.space = FrameConv(channels, channels, 3)
        self.time = CausalConv(channels, channels, 3)
        nn.init.zeros_(self.time.conv.weight)
        nn.init.zeros_(self.time.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b c t h w"], state: State | None = None) -> Float[Tensor, "b c t h w"]:
        y = self.space(F.silu(self.norm1(x)))
        return x + self.time(F.silu(self.norm2(y)), state)
