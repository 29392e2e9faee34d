"""Copies of other libraries' networks that give the same numbers sooner: what an adapter runs, beside the model that it saves.

A copy differs from its original in memory order and in what need not be done anew in every call:

- weight normalisation is multiplied out;
- channels lie together in memory, which is the order that the kernels of oneDNN work in: others are turned around before and after;
- a transposed convolution whose kernel is a multiple of its stride is a convolution over frames, dealt out over time (Shi et al.,
  arXiv 1609.07009), which in this order costs no copy;
- ELU and snake are fewer and cheaper passes over memory.

In float32 that leaves rounding (sums in another order, about 1e-6). In bfloat16 it is another precision, for whoever chooses it.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.tokenizers.pretrained.base import WrappedQuantizer
from mmtp.types import MmtpError

NUMBERS = ("float32", "bfloat16")

FEW = 256
"""Up to so many outputs a convolution over time is a matrix product: a convolution's kernels would turn its weights around in every
call, which for wide layers takes longer than the sums (a third of the time for the last stride of DAC, 50 outputs)."""


class PrecisionError(MmtpError, ValueError):
    """A precision that there is not."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The numbers that an adapter's networks run in. It says how codes are made and read, not what they are: no folder holds it.

    Attributes:
        encode: of the encoder, ``"float32"`` or ``"bfloat16"``. Codes are defined by float32; in bfloat16 some of them are others.
        decode: of the decoder, one of these or ``"auto"``: bfloat16 on processors that multiply it (AVX-512 BF16, AMX), else float32.
    """

    encode: str = "float32"
    decode: str = "auto"

    def __post_init__(self) -> None:
        for name, value, choices in (("encode", self.encode, NUMBERS), ("decode", self.decode, ("auto", *NUMBERS))):
            if value not in choices:
                raise PrecisionError(f"precision of {name} is {value!r}, one of {', '.join(choices)} is wanted")

    def dtype(self, part: Literal["encoder", "decoder"], device: torch.device) -> torch.dtype:
        """The data type of a part on a device."""
        chosen = self.encode if part == "encoder" else self.decode
        if chosen == "auto":
            chosen = "bfloat16" if device.type == "cpu" and multiplies_bfloat16() else "float32"
        return getattr(torch, chosen)


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, with which they are quicker than those of float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class QuickQuantizer(WrappedQuantizer):
    """Adapters of models whose ``encoder`` and ``decoder`` are networks of their own: these run as quick copies.

    Copies are made when they are first needed, and anew when a weight has changed; they take memory beside the model's.

    Attributes:
        precision: what the copies compute in; may be set at any time.
    """

    def __init__(self, config: WrappedQuantizer.Config, model: Any = None) -> None:
        super().__init__(config, model)
        self.precision = Precision()
        self._copies: dict[str, tuple[object, nn.Module]] = {}

    def run(self, part: Literal["encoder", "decoder"], x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c2 *size2"]:
        """What the model's encoder or decoder gives, in float32."""
        original, dtype = getattr(self.model, part), self.precision.dtype(part, x.device)
        version = (dtype, *((t.data_ptr(), t._version) for tensors in (original.parameters(), original.buffers()) for t in tensors))
        made, network = self._copies.get(part, (None, original))
        if made != version:
            network = quick_copy(original, dtype)
            self._copies[part] = (version, network)
        return network(x.to(dtype)).float().contiguous()


def quick_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network that gives the same output sooner, in evaluation mode and without gradients.

    Args:
        network: convolutions over pictures or time; layers that are not known here are copied as they are.
        dtype: of its weights and of what it takes and gives.
    """
    quick = _replaced(copy.deepcopy(network)).to(dtype).to(memory_format=torch.channels_last)
    return quick.eval().requires_grad_(False)


def _replaced(module: nn.Module) -> nn.Module:
    """A module with every layer in it that has a quick form in that form. Layers of other libraries are known by name."""
    kind = type(module).__name__
    if kind == "EncodecConv1d":
        return _PaddedConv(module)
    if kind == "Snake1d":
        return _Snake(module)
    if isinstance(module, nn.ELU) and module.alpha == 1:
        return _ELU()
    if isinstance(module, nn.Conv1d) and module.padding_mode == "zeros" and isinstance(module.padding, tuple):
        return _Conv(module)
    if isinstance(module, nn.ConvTranspose1d) and _deals_out(module):
        return _Upsample(module)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child))
    return module


class _Conv(nn.Module):
    """A convolution over time, as one over pictures of height 1 with channels last."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        # What the layer around it may ask for.
        self.kernel_size, self.stride, self.dilation, self.padding = conv.kernel_size, conv.stride, conv.dilation, conv.padding
        self.groups = conv.groups
        self.weight = nn.Parameter(conv.weight.detach()[:, :, None])
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach())

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b c2 t2"]:
        return _convolve(x, self.weight, self.bias, self.stride[0], int(self.padding[0]), self.dilation[0], self.groups)


def _convolve(
    x: Float[Tensor, "b c t"],
    weight: Float[Tensor, "c2 c 1 k"],
    bias: Float[Tensor, " c2"] | None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Float[Tensor, "b c2 t2"]:
    """A convolution over time of what lies channels last in memory, or is brought into that order."""
    steps = x.transpose(1, 2).contiguous()
    seen = (weight.shape[3] - 1) * dilation + 1
    count = (steps.shape[1] + 2 * padding - seen) // stride + 1
    pointwise = seen == stride == 1 and padding == 0
    if groups == 1 and count > 0 and (pointwise or count <= FEW):
        if padding:
            steps = F.pad(steps, (0, 0, padding, padding))
        if not pointwise:
            steps = steps.unfold(1, seen, stride)[..., ::dilation].transpose(2, 3).flatten(2)
        return F.linear(steps, weight.permute(0, 2, 3, 1).flatten(1), bias).transpose(1, 2)
    plane = steps.transpose(1, 2)[:, :, None]
    return F.conv2d(plane, weight, bias, (1, stride), (0, padding), (1, dilation), groups)[:, :, 0]


def _deals_out(conv: nn.ConvTranspose1d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1,) and conv.output_padding == (0,)
    return plain and conv.kernel_size[0] % conv.stride[0] == 0


class _Upsample(nn.Module):
    """A transposed convolution as a convolution over frames, of as many channels per frame as it has outputs."""

    def __init__(self, conv: nn.ConvTranspose1d) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        stride = conv.stride[0]
        self.reach = conv.kernel_size[0] // stride  # frames of input in an output
        # [in, out, reach x stride] to [stride x out, in, 1, reach], the latest frame first: convolutions here do not flip their kernels.
        weight = conv.weight.detach().unflatten(2, (self.reach, stride)).permute(3, 1, 0, 2).flatten(0, 1).flip(2)
        self.weight = nn.Parameter(weight[:, :, None])
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().repeat(stride))

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b c2 t2"]:
        frames = _convolve(x, self.weight, self.bias, padding=self.reach - 1).transpose(1, 2)
        whole = frames.unflatten(2, (self.stride[0], -1)).flatten(1, 2).transpose(1, 2)
        cut = int(self.padding[0])
        return whole[..., cut : whole.shape[-1] - cut]


class _PaddedConv(nn.Module):
    """EnCodec's convolution, with its padding in the order of memory that convolutions want."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.conv = _Conv(original.conv)
        self.norm = original.norm if original.norm_type == "time_group_norm" else nn.Identity()
        self.pad, self.mode = original._pad1d, original.pad_mode
        stride = original.conv.stride[0]
        seen = (original.conv.kernel_size[0] - 1) * original.conv.dilation[0] + 1 - stride
        self.padding, self.stride = (seen, 0) if original.causal else (seen - seen // 2, seen // 2), stride

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b c2 t2"]:
        left, right = self.padding[0], self.padding[1] + -x.shape[-1] % self.stride
        if self.mode == "reflect" and x.shape[-1] > max(left, right):
            if left or right:
                steps = x.transpose(1, 2)
                before, after = steps[:, 1 : left + 1].flip(1), steps[:, steps.shape[1] - right - 1 : -1].flip(1)
                x = torch.cat([before, steps, after], 1).transpose(1, 2)
        else:
            x = self.pad(x, (left, right), self.mode)
        return self.norm(self.conv(x))


class _ELU(nn.Module):
    """ELU by exp, which is several times as quick as the expm1 of ``F.elu`` and in float32 as exact beside activations of order 1.

    It is taken in float32 whatever comes in, for exp(x) - 1 in bfloat16 would lose small numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = torch.maximum(wide, wide.clamp_max(0).exp_().sub_(1))  # exp(x) - 1 is never below x, and 0 where x is above it
        return y.to(x.dtype)


class _Snake(nn.Module):
    """DAC's snake in four passes over memory instead of five."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.alpha = nn.Parameter(original.alpha.detach())
        self.scale = nn.Parameter((original.alpha.detach() + 1e-9).reciprocal())

    def forward(self, x: Float[Tensor, "b c t"]) -> Float[Tensor, "b c t"]:
        return torch.addcmul(x, (self.alpha * x).sin_().square_(), self.scale)
