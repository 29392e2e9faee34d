"""The refiner: what a state would be, had the token before its place been another.

A pass that verifies drafts leaves states behind the first draft that was refused. They are the whole model's, and wrong in what they read
there: the refused token in place of the true one. One small layer, told both tokens, turns such a state into one that draws a draft. Where
the pass has left none, the layer goes on from the state of the place before, as draft heads do that are trained on features of the model
(EAGLE, Li et al., arXiv 2401.15077; Hydra, Ankner et al., arXiv 2402.05109).

It is no part of the model: it is learnt from what a finished one writes (:mod:`mmtp.train.refine`), and kept in a file of its own.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmtp.nn.linear import Derived
from mmtp.nn.refinement import Refinement
from mmtp.types import MmtpError

EPS = 1e-6
"""Of the root mean square."""


class RefinerError(MmtpError):
    """A refiner whose file is damaged, or of another model."""


class Refiner:
    """A gated layer: ``state + outward (silu(a) * b)`` with ``(a, b) = told [state, read, before, token] + kind``.

    Its parameters are plain tensors, so that a model which has one counts, trains and saves its own alone.

    Args:
        told: of what is read, each part of unit root mean square.
        kind: added where the state comes of the place before, and where the pass has left it.
        outward: into the state.
        media: of the tokens that it has learnt to draft; see :class:`mmtp.types.Modality`.
    """

    def __init__(
        self, told: Float[Tensor, "h2 w4"], kind: Float[Tensor, "2 h2"], outward: Float[Tensor, "w h"], media: Collection[str] = ()
    ) -> None:
        self.told, self.kind, self.outward, self.media = told, kind, outward, frozenset(media)
        self._compiled = Derived()

    @classmethod
    def begin(cls, width: int, hidden: int, seed: int = 0) -> "Refiner":
        """One that leaves states as they are.

        Args:
            width: of the model.
            hidden: numbers between.
            seed: of the weights that read.
        """
        generator = torch.Generator().manual_seed(seed)
        told = torch.randn(2 * hidden, 4 * width, generator=generator) * (4 * width) ** -0.5
        return cls(told, torch.zeros(2, 2 * hidden), torch.zeros(width, hidden))

    @property
    def parameters(self) -> list[Tensor]:
        """All of them."""
        return [self.told, self.kind, self.outward]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Refiner":
        """The same elsewhere, or itself where it is there already."""
        if self.told.device == device and self.told.dtype == dtype:
            return self
        return Refiner(*(weight.detach().to(device, dtype) for weight in self.parameters), media=self.media)

    def __call__(
        self,
        state: Float[Tensor, "n w"],
        read: Float[Tensor, "n w"],
        before: Float[Tensor, "n w"],
        token: Float[Tensor, "n w"],
        left: Bool[Tensor, " n"],
    ) -> Float[Tensor, "n w"]:
        """States that predict what comes at some places, from such as were made for another stream.

        Args:
            state: what the last pass has left for a place, or ``before``.
            read: embedding of what ``state`` has read before its place.
            before: state of the place before, refined itself where it was not true.
            token: embedding of the token before the place.
            left: whether ``state`` was left by the pass.
        """
        told = torch.stack((state, read, before, token), 1)
        told = F.rms_norm(told, told.shape[-1:], eps=EPS).flatten(1)
        gate, value = (F.linear(told, self.told) + self.kind[left.long()]).chunk(2, -1)
        return state + F.linear(F.silu(gate) * value, self.outward)

    def compiled(self, embedding: Float[Tensor, "v w"], last_norm: Float[Tensor, " w"], last_eps: float) -> Refinement:
        """The same by compiled kernels on the CPU, in float32 with weights in bfloat16, for a model's embeddings and last norm."""
        weights = (*self.parameters, embedding, last_norm)

        def build() -> Refinement:
            return Refinement(*(weight.detach().float() for weight in weights), eps=EPS, last_eps=last_eps)

        return self._compiled.get(weights, build)

    def save(self, path: Path) -> None:
        """Writes a file of safetensors, in bfloat16: drafts need no more."""
        weights = {name: weight.detach().bfloat16().contiguous() for name, weight in zip(_NAMES, self.parameters, strict=True)}
        save_file(weights, path, {"media": " ".join(sorted(self.media))})

    @classmethod
    def load(cls, path: Path, width: int) -> "Refiner":
        """Reads what :meth:`save` wrote, in float32.

        Args:
            path: of the file.
            width: of the model.

        Raises:
            RefinerError: the file is damaged, or of a model of another width.
        """
        try:
            with safe_open(path, "pt") as file:
                weights = [file.get_tensor(name).float() for name in _NAMES]
                media = (file.metadata() or {})["media"].split()
        except (SafetensorError, KeyError) as error:
            raise RefinerError(f"{path}: is damaged ({error}); make it again with mmtp refiner, or fetch it again") from error
        hidden = weights[2].shape[-1]
        shapes: Sequence[tuple[int, ...]] = [(2 * hidden, 4 * width), (2, 2 * hidden), (width, hidden)]
        if [tuple(weight.shape) for weight in weights] != shapes:
            raise RefinerError(f"{path}: is of a model of another width than {width}; make one with mmtp refiner")
        return cls(*weights, media=media)


_NAMES = ("told", "kind", "outward")
