"""All drafts of a row in one call, by a layer that refines states: the kernel of ``native.cpp`` behind :mod:`mmtp.models.refiner`.

A draft is some small products of one row, each draft hanging on the one before; by calls of torch they take several times as long as their
arithmetic. Weights are in bfloat16: reading them is what takes the time, and drafts need not agree with anything to the bit.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.nn.native import library, panels, stale

_POINTER = ctypes.c_void_p


class Place(NamedTuple):
    """A place that :class:`Refinement` is to draft.

    Attributes:
        logits: weights of the ids that may stand there, in panels of bfloat16.
        ids: that may.
        weight: of guidance.
        states: what is left for it, and what guides that; none where nothing is.
        read: the token that they have read before it.
        chosen: what was chosen there, as index of ``ids``.
        drawn_of: probabilities of which it was; None where nothing is left, or nobody asks.
        noise: to add to what decides; None for none.
        uniforms: in place of noise, two numbers from 0 to below 1, where a draft is to be a sample of its probabilities and they are asked
            for: whether what was chosen is kept, where it may be, and what else is drawn.
    """

    logits: Float[Tensor, "p w n"]
    ids: Int[Tensor, " n"]
    weight: float
    states: Sequence[Float[Tensor, " w"]] = ()
    read: int = 0
    chosen: int = 0
    drawn_of: Float[Tensor, " n"] | None = None
    noise: Float[Tensor, " n"] | None = None
    uniforms: tuple[float, float] | None = None


class Refinement:
    """Drafts by a layer that refines states (:mod:`mmtp.models.refiner`), all of a row in one call.

    Args:
        told: reads state, token that it has read, state before and its token, each of unit root mean square.
        kind: added to that.
        outward: into the state.
        embedding: of all ids.
        last_norm: gain before logits.
        eps: of the root mean square.
        last_eps: of that before logits.

    Raises:
        NativeError: this machine cannot compile it.
    """

    def __init__(
        self,
        told: Float[Tensor, "h2 w4"],
        kind: Float[Tensor, "2 h2"],
        outward: Float[Tensor, "w h"],
        embedding: Float[Tensor, "v w"],
        last_norm: Float[Tensor, " w"],
        eps: float,
        last_eps: float,
    ) -> None:
        self._run = _kernel()
        self.width, self.hidden = outward.shape
        products = (panels(weight.bfloat16()) for weight in (told, outward))
        self._kept = [*products, *(each.contiguous() for each in (kind, embedding, last_norm))]
        self._refiner = _Refiner(self.width, self.hidden, *(each.data_ptr() for each in self._kept), eps, last_eps)

    def __call__(
        self,
        before: Sequence[Float[Tensor, " w"]],
        newest: int,
        second: int,
        places: Sequence[Place],
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> tuple[list[int], list[Float[Tensor, " n"] | None], Float[Tensor, "b w"]]:
        """Drafts places in turn.

        Args:
            before: state that predicted the newest token, and what guides it.
            newest: the last token.
            second: the one before it.
            places: those after it.
            temperature: 0 takes the most probable, and neither noise nor numbers.
            top_k: cuts as of :class:`mmtp.decode.sample.Sampling`, all of them of the whole distribution.
            top_p: likewise.
            min_p: likewise.

        Returns:
            Ids, the probabilities of which they are samples where they are such (not of what was left and is drafted as it is), and the
            states that have drafted the last.
        """
        states, drafts = torch.stack(list(before)).float(), torch.empty(len(places), dtype=torch.long)
        kept = [[state.float().contiguous() for state in place.states] for place in places]
        asked = [None if place.uniforms is None else torch.empty(len(place.ids)) for place in places]
        given = (_Place * len(places))(
            *(
                _Place(
                    (_POINTER * 2)(*(state.data_ptr() for state in own)), place.read, place.chosen, place.logits.data_ptr(),
                    place.ids.data_ptr(), len(place.ids), _address(place.noise), _address(place.drawn_of), _address(probabilities),
                    *(place.uniforms or (0, 0)), place.weight,
                )
                for place, own, probabilities in zip(places, kept, asked, strict=True)
            )
        )  # fmt: skip
        how = _Choosing(1 / temperature, top_p, min_p, top_k) if temperature else _Choosing(1, 1, 0, 0)
        work = torch.empty(6 * self.width + 2 * self.hidden + 2 * max((len(place.ids) for place in places), default=0))
        self._run(
            self._refiner, how, given, len(places), len(states), states.data_ptr(), newest, second, drafts.data_ptr(), work.data_ptr()
        )
        return drafts.tolist(), asked, states


def _address(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()


class _Refiner(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "hidden")),
        *((name, _POINTER) for name in ("told", "outward", "kind", "embedding", "last_norm")),
        *((name, ctypes.c_float) for name in ("eps", "last_eps")),
    )


class _Choosing(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_float) for name in ("sharpness", "top_p", "min_p")), ("top_k", ctypes.c_int64))


class _Place(ctypes.Structure):
    _fields_ = (
        ("states", _POINTER * 2),
        *((name, ctypes.c_int64) for name in ("read", "chosen")),
        *((name, _POINTER) for name in ("logits", "ids")),
        ("outputs", ctypes.c_int64),
        *((name, _POINTER) for name in ("noise", "drawn_of", "probabilities")),
        *((name, ctypes.c_float) for name in ("keep", "draw", "weight")),
    )


@cache
def _kernel() -> Any:
    found = library()
    found.mmtp_refine_layout.restype, found.mmtp_refine_layout.argtypes = ctypes.c_int64, ()
    structures = (_Refiner, _Choosing, _Place)
    layout = 0
    for structure in structures:
        layout = 1000 * layout + ctypes.sizeof(structure)
    if found.mmtp_refine_layout() != layout:
        raise stale()
    pointer, number = _POINTER, ctypes.c_int64
    found.mmtp_refine.restype = None
    found.mmtp_refine.argtypes = (
        *(ctypes.POINTER(structure) for structure in structures),
        *(number, number, pointer, number, number, pointer, pointer),
    )
    return found.mmtp_refine
