"""Passes of decoding on accelerators: recorded once for each shape, and from then on started in one call.

A pass over a few tokens is some dozens of kernels per block, and to start one takes longer than most of them run. A CUDA graph holds all of
a pass and starts them as one (Gray 2019, "Getting started with CUDA graphs"); what lies between attention and products is fused by
torch.compile before. A graph reads and writes where it did when it was recorded, so what a pass is given is copied to a place that stays,
and passes are padded to few widths. Where there are no such graphs, the same is run kernel by kernel.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

WIDTHS = (1, 2, 4, 8, 16, 32)
"""Tokens of a lane in passes that are recorded; those of more, which read prompts, run as they are."""
MOST = 128
"""Graphs that are kept, those used last."""
BACKEND = "inductor"
"""What torch.compile fuses with."""

Run = Callable[[Float[Tensor, "b s d"], Int[Tensor, "b s 3"], Bool[Tensor, "b 1 s t"]], Float[Tensor, "b s d"]]


class _Graph(NamedTuple):
    """A pass that was recorded.

    Attributes:
        given: where it reads what it is given.
        replay: runs it, and gives the tensor that it writes its result to.
    """

    given: list[Tensor]
    replay: Callable[[], Tensor]


class Graphs:
    """Passes over one cache, which stays where it is, by a model whose weights do.

    Attributes:
        slots: of every lane of the pass, where in the cache it writes its tokens; layers read it while a pass runs.
    """

    def __init__(self) -> None:
        self.slots = torch.empty(0, 0, dtype=torch.long)
        self._first = 0
        self._kept: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()

    def begin(self, first: int, slots: Int[Tensor, "b s"]) -> None:
        """Readies a pass.

        Args:
            first: lane of the cache that it begins with.
            slots: where its lanes write, as many as :func:`padded_width` makes of its tokens.
        """
        self._first, self.slots = first, slots

    def __call__(
        self, run: Run, x: Float[Tensor, "b s d"], positions: Int[Tensor, "b s 3"], mask: Bool[Tensor, "b 1 s t"]
    ) -> Float[Tensor, "b s d"]:
        """What ``run`` makes of the states of a pass.

        Args:
            run: of states, positions and mask, all blocks. Of one shape it has to start the same kernels every time.
            x: states.
            positions: rotary.
            mask: True where a position may look.
        """
        width, wide = x.shape[1], self.slots.shape[1]
        if width > WIDTHS[-1]:
            return run(x, positions, mask)
        more = wide - width
        # Padding looks everywhere: what it makes is read by nobody, but has to be numbers.
        given = [F.pad(x, (0, 0, 0, more)), F.pad(positions, (0, 0, 0, more)), F.pad(mask, (0, 0, 0, more), value=True), self.slots]
        key = (self._first, len(x), wide, mask.shape[3])
        graph = self._kept.pop(key, None)
        if graph is None:
            places = [each.clone() for each in given]
            self.slots = places[3]
            graph = _Graph(places, record(lambda: run(*places[:3]), x.device))
            if len(self._kept) >= MOST:
                self._kept.popitem(last=False)
        self._kept[key] = graph
        for place, each in zip(graph.given, given, strict=True):
            place.copy_(each)
        return graph.replay()[:, :width].clone()  # the next pass writes where this one did


def padded_width(width: int) -> int:
    """Tokens of a lane that a pass over so many computes."""
    return next((wide for wide in WIDTHS if wide >= width), width)


def record(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Something that does again what ``run`` does, on the same memory: a CUDA graph of it; where there are none, itself."""
    if device.type != "cuda":
        return run
    # Kernels are compiled and chosen, and libraries make room for themselves, on a stream of their own before anything is recorded.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool(device)):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@cache
def _pool(device: torch.device) -> Any:
    """Memory of all graphs of a device: they run one after the other, and what one has made is copied before the next."""
    return torch.cuda.graph_pool_handle()


@cache
def fused(function: Callable[..., Any]) -> Any:
    """A function of modules and tensors, its kernels fused, for lanes and tokens of any number."""
    return torch.compile(function, dynamic=True, backend=BACKEND)
