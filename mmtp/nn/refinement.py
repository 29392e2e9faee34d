"""All drafts of rows in one call, by a layer that refines states: the kernel of ``native.cpp`` behind :mod:`mmtp.models.refiner`.

A draft is some small products of one row, each draft hanging on the one before; by calls of torch they take several times as long as their
arithmetic. Weights are in bfloat16, and so is what they are multiplied by: reading them is what takes the time, and drafts need not agree
with anything to the bit. Rows are divided among the threads, and what a row is drafted does not hang on the others.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.nn.native import library, pairs, stale
from mmtp.nn.picking import Choosing

_POINTER = ctypes.c_void_p


class Place(NamedTuple):
    """A place that :class:`Refinement` is to draft.

    Attributes:
        logits: weights of the ids that may stand there, as :func:`mmtp.nn.native.pairs` lays them out.
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

    logits: Float[Tensor, "p w2 n 2"]
    ids: Int[Tensor, " n"]
    weight: float
    states: Sequence[Float[Tensor, " w"]] = ()
    read: int = 0
    chosen: int = 0
    drawn_of: Float[Tensor, " n"] | None = None
    noise: Float[Tensor, " n"] | None = None
    uniforms: tuple[float, float] | None = None


class Trail(NamedTuple):
    """What :class:`Refinement` is to draft of a row.

    Attributes:
        before: state that predicted the newest token, and what guides it.
        newest: the last token.
        second: the one before it.
        places: those after it.
        temperature: 0 takes the most probable, and neither noise nor numbers.
        top_k: cuts as of :class:`mmtp.decode.sample.Sampling`, all of them of the whole distribution.
        top_p: likewise.
        min_p: likewise.
    """

    before: Sequence[Float[Tensor, " w"]]
    newest: int
    second: int
    places: Sequence[Place]
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Drafted(NamedTuple):
    """What was drafted of a row.

    Attributes:
        tokens: of the places.
        probabilities: of which they are samples, where they are such and are asked for; not of what was left and is drafted as it is.
        before: states that have drafted the last.
    """

    tokens: list[int]
    probabilities: list[Float[Tensor, " n"] | None]
    before: Float[Tensor, "b w"]


class Refinement:
    """Drafts by a layer that refines states (:mod:`mmtp.models.refiner`), all of some rows in one call.

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
        state, read, state_before, token = told.chunk(4, 1)
        # What it makes of a token is the same whenever that is met. NumPy's zeros take no memory before they are written.
        met = [np.zeros((len(embedding), 2 * self.hidden), np.float32) for _ in range(2)]
        known = [np.zeros(len(embedding), np.uint8) for _ in range(2)]
        products = [pairs(weight) for weight in (torch.cat((state, state_before), 1), outward, read, token)]
        rest = [each.contiguous() for each in (kind, embedding, last_norm)]
        told_by, outward_by, *tokens_by = (each.data_ptr() for each in products)
        self._kept = [*products, *met, *known, *rest]
        self._refiner = _Refiner(
            self.width, self.hidden, told_by, outward_by, *((_POINTER * 2)(*two) for two in (
                tokens_by, (each.ctypes.data for each in met), (each.ctypes.data for each in known)
            )), *(each.data_ptr() for each in rest), eps, last_eps,
        )  # fmt: skip

    def __call__(self, trails: Sequence[Trail], threads: int = 1) -> list[Drafted]:
        """Drafts the places of rows, each row's in turn."""
        befores = [torch.stack(list(trail.before)).float() for trail in trails]
        drafts = [torch.empty(len(trail.places), dtype=torch.long) for trail in trails]
        kept = [[[_plain(state) for state in place.states] for place in trail.places] for trail in trails]
        asked = [[None if place.uniforms is None else torch.empty(place.ids.shape[0]) for place in trail.places] for trail in trails]
        given = (_Trail * len(trails))()
        for i, (trail, before, ids, states, wanted) in enumerate(zip(trails, befores, drafts, kept, asked, strict=True)):
            sharpness = 1 / trail.temperature if trail.temperature else 1
            cuts = (trail.top_p, trail.min_p, trail.top_k) if trail.temperature else (1, 0, 0)
            places = (_Place * len(trail.places))(
                *(
                    _Place(
                        (_POINTER * 2)(*[state.data_ptr() for state in own]), place.read, place.chosen, place.logits.data_ptr(),
                        place.ids.data_ptr(), place.ids.shape[0], _address(place.noise), _address(place.drawn_of), _address(probabilities),
                        *(place.uniforms or (0, 0)), place.weight,
                    )
                    for place, own, probabilities in zip(trail.places, states, wanted, strict=True)
                )
            )  # fmt: skip
            given[i] = _Trail(
                Choosing(sharpness, *cuts), places, len(places), len(before), before.data_ptr(), trail.newest, trail.second, ids.data_ptr()
            )
        room = 4 * self.width + 3 * self.hidden + 2 * max((place.ids.shape[0] for trail in trails for place in trail.places), default=0) + 1
        threads = min(threads, len(trails))
        work = torch.empty(max(1, threads) * room)
        self._run(self._refiner, given, len(trails), work.data_ptr(), room, threads)
        return [Drafted(ids.tolist(), wanted, before) for ids, wanted, before in zip(drafts, asked, befores, strict=True)]


def _plain(values: Tensor) -> Tensor:
    """In float32, without gaps."""
    return values if values.dtype == torch.float32 and values.is_contiguous() else values.float().contiguous()


def _address(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()


class _Refiner(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "hidden")),
        *((name, _POINTER) for name in ("told", "outward")),
        *((name, _POINTER * 2) for name in ("tokens", "met", "known")),
        *((name, _POINTER) for name in ("kind", "embedding", "last_norm")),
        *((name, ctypes.c_float) for name in ("eps", "last_eps")),
    )


class _Place(ctypes.Structure):
    _fields_ = (
        ("states", _POINTER * 2),
        *((name, ctypes.c_int64) for name in ("read", "chosen")),
        *((name, _POINTER) for name in ("logits", "ids")),
        ("outputs", ctypes.c_int64),
        *((name, _POINTER) for name in ("noise", "drawn_of", "probabilities")),
        *((name, ctypes.c_float) for name in ("keep", "draw", "weight")),
    )


class _Trail(ctypes.Structure):
    _fields_ = (
        ("how", Choosing),
        ("places", ctypes.POINTER(_Place)),
        *((name, ctypes.c_int64) for name in ("count", "branches")),
        ("before", _POINTER),
        *((name, ctypes.c_int64) for name in ("newest", "second")),
        ("drafts", _POINTER),
    )


@cache
def _kernel() -> Any:
    found = library()
    found.mmtp_refine_layout.restype, found.mmtp_refine_layout.argtypes = ctypes.c_int64, ()
    layout = 0
    for structure in (_Refiner, _Place, _Trail):
        layout = 1000 * layout + ctypes.sizeof(structure)
    if found.mmtp_refine_layout() != layout:
        raise stale()
    pointer, number = _POINTER, ctypes.c_int64
    found.mmtp_refine.restype = None
    found.mmtp_refine.argtypes = (ctypes.POINTER(_Refiner), ctypes.POINTER(_Trail), number, pointer, number, number)
    return found.mmtp_refine
