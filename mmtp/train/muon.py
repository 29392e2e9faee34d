"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024; Liu et al., arXiv 2502.16982).

The optimizer of torch orthogonalises in bfloat16, one matrix at a time: a large part of a training step where a processor only emulates
bfloat16; and in several processes it gathers every matrix anew in each product. Here matrices of one shape go together, in float32 where
bfloat16 is emulated, and a divided matrix is gathered once.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mmtp.train.distributed import whole

STACK = 2**24
"""Numbers in the matrices that are orthogonalised together, at most: they are copied."""


class Muon(torch.optim.Muon):
    """torch's Muon with the rates of AdamW (``match_rms_adamw``); arguments and state are torch's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all weights that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape = defaultdict[torch.Size, list[Tensor]](list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for some in _stacks(weights):
                    updates = torch.stack([whole(self._momentum(weight, group)) for weight in some])
                    for weight, update in zip(some, orthogonal(updates, group), strict=True):
                        weight.mul_(1 - group["lr"] * group["weight_decay"])
                        weight.add_(_divided(update, weight), alpha=-rate)
        return loss

    def _momentum(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient after momentum."""
        assert weight.grad is not None
        state, grad = self.state[weight], weight.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def orthogonal(matrices: Float[Tensor, "n rows columns"], group: dict[str, Any]) -> Float[Tensor, "n rows columns"]:
    """Every matrix with its singular values brought near 1, by the iteration of Newton and Schulz that Muon's authors tuned.

    Args:
        matrices: any number of one shape.
        group: ``ns_coefficients``, ``ns_steps`` and ``eps`` of the optimizer.
    """
    a, b, c = group["ns_coefficients"]
    x = matrices.to(quick_dtype(matrices.device))
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def quick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where a device multiplies it, float32 where that is emulated."""
    if device.type == "cpu":
        supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        supported = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if supported else torch.float32


def _stacks(weights: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Weights of one shape, as many at a time as may be copied."""
    count = max(1, STACK // weights[0].numel())
    for first in range(0, len(weights), count):
        yield weights[first : first + count]


def _divided(update: Tensor, weight: Tensor) -> Tensor:
    """A whole update as its weight is divided among processes."""
    update = update.to(weight.dtype)
    if not isinstance(weight, DTensor):
        return update
    return distribute_tensor(update, weight.device_mesh, weight.placements, src_data_rank=None)
