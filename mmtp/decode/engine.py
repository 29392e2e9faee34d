"""Decoding: propose, verify, accept. It knows token ids, slots and a Step; nothing of pictures or sound.

A pass of :mod:`mmtp.decode.batcher` reads a window per row: the token chosen last, and the drafts that are proposed to follow it. It
gives the true choice after each of them; drafts are kept as long as they equal it (Leviathan et al. 2023, section 2, with
equality in place of the ratio, since draft and target are drawn with the same noise), and the first true choice that differs is
kept as well. So each pass yields at least one token, and the stream is the one that plain decoding gives. Plain decoding is the
same loop with no drafts. A request may have its drafts judged by rejection sampling instead: then the choice after a draft depends
on it (:func:`mmtp.decode.sample.judge`), the rest is the same, and the stream has plain decoding's distribution.

Rounding can differ between matrix kernels for one row and for several, and for few keys and many. In *exact* mode passes are padded to
widths, and attend to blocks of keys, at which every kernel gives each row the same bits, plain or speculative, alone or among others.
Outside of it plain decoding uses single-row kernels: faster, and equal up to ties within rounding.

A guided row (classifier-free guidance) carries a second lane of the batch, its unconditional branch, which reads the same tokens
and drafts. Both sides are mixed before any choice, of drafts as of true tokens: so guidance costs lanes, and nothing of the promise.
"""

import time
from collections.abc import Callable, Collection, Generator, Sequence

from jaxtyping import Float
from torch import Tensor

from mmtp.decode.batcher import CHUNK, SHARED, Batcher, Piece
from mmtp.decode.by_medium import DraftsByMedium
from mmtp.decode.chooser import Chooser
from mmtp.decode.constrain import Constraint
from mmtp.decode.drafts import Drafts
from mmtp.decode.pace import Experiences
from mmtp.decode.rows import DecodeError, Request
from mmtp.decode.sample import Sampling
from mmtp.decode.stats import Generation
from mmtp.decode.step import Step

__all__ = ["DecodeError", "Engine", "Request"]


class Engine:
    """Decodes streams with a model, plainly or speculatively.

    Args:
        model: in evaluation mode.
        exact: pad every pass so that all kernels agree: plain and speculative output are equal bit for bit, and rows of a batch equal
            those decoded alone.
        drafts: where drafts come from; where none are given, words by the model's n-grams, or its head, and codes by the pass before.
        draft_cost: what one more draft costs, made and verified, in passes of the model; None takes what is known of the model and of where
            drafts come from (:mod:`mmtp.decode.costs`). Each row makes as many as pay (:class:`mmtp.decode.pace.Pace`), none where none
            do; 0 makes all there are.
        cache: what the cache holds keys and values in, ``"bfloat16"`` or ``"int8"``, of each token and head by its own scale; None holds
            them as the model computes them.
        compile: run the blocks of a pass in one call, for models whose blocks are the same for all media and read no vectors beside the
            stream. On CPUs by kernels for models in float32 and bfloat16 (:mod:`mmtp.nn.native`); the first engine on a machine waits for a
            C++ compiler. On accelerators by kernels that torch.compile has fused, recorded (:mod:`mmtp.nn.graphs`); the first passes wait
            for it. None does so on a CPU that can, for models and caches that allow it.
        chunk: tokens of prompts that a pass reads at most, those of all rows that read together; each reads one at least, and a span of
            vectors at once. Between such passes the other rows go on. Output is that of prompts read at once.
        clock: what times are told by; ``time.process_time`` counts the process's own seconds on all cores, where others use them too.
    """

    def __init__(
        self,
        model: Step,
        *,
        exact: bool = False,
        drafts: Drafts | None = None,
        draft_cost: float | None = None,
        cache: str | None = None,
        compile: bool | None = False,
        chunk: int = CHUNK,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if draft_cost is not None and not 0 <= draft_cost < float("inf"):
            raise DecodeError(f"draft_cost {draft_cost}: a number from 0 up is wanted")
        if chunk < 1:
            raise DecodeError(f"chunk {chunk}: 1 or more is wanted")
        self.model = model
        self.exact, self.draft_cost, self.chunk, self.clock = exact, draft_cost, chunk, clock
        self.drafts = drafts or DraftsByMedium()
        self.drafts.length(model)  # refuses what does not fit
        self.experiences = Experiences()
        self.chooser = Chooser(model, cache, compile)
        self.grammar, self.device = self.chooser.grammar, self.chooser.device

    def batcher(
        self, *, max_lanes: int = 16, context: int = 4096, kept: int = 0, shared: int | None = SHARED, speculative: bool = True
    ) -> Batcher:
        """A batch that requests join and leave as they come and go.

        Args:
            max_lanes: rows at a time, where a guided row counts twice.
            context: tokens that a row may have, its prompt among them.
            kept: lanes more, for what rows that are done have left.
            shared: tokens in common from which on rows share them; None shares nothing.
            speculative: use drafts; the output is the same, sooner.
        """
        return Batcher(
            self.chooser,
            self.drafts if speculative else None,
            exact=self.exact,
            draft_cost=self.draft_cost,
            max_lanes=max_lanes,
            context=context,
            kept=kept,
            shared=shared,
            chunk=self.chunk,
            clock=self.clock,
            experiences=self.experiences,
        )

    def generate(
        self,
        prefix: Sequence[int],
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
        speculative: bool = True,
        stop: Collection[int] = (),
        vectors: Float[Tensor, "n d"] | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Goes on from a prefix until a stop token, the end of the document, or the limit.

        Args:
            prefix: see :class:`mmtp.decode.rows.Request`, with all but the next.
            sampling: likewise.
            max_new_tokens: likewise.
            speculative: use drafts; the output is the same, sooner.
            stop: likewise.
            vectors: likewise.
            constraint: likewise.

        Raises:
            MmtpError: the request is not in order; see :class:`mmtp.decode.rows.Row`.
        """
        return self.generate_batch([prefix], [sampling or Sampling()], max_new_tokens, speculative, stop, [vectors], [constraint])[0]

    def generate_batch(
        self,
        prefixes: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        max_new_tokens: int = 512,
        speculative: bool = True,
        stop: Collection[int] = (),
        vectors: Sequence[Float[Tensor, "_ d"] | None] | None = None,
        constraints: Sequence[Constraint | None] | None = None,
        max_lanes: int | None = None,
    ) -> list[Generation]:
        """As :meth:`generate` for several rows of any lengths; each ends, and accepts drafts, by itself.

        With ``max_lanes``, so many run at a time (a guided row counts twice), and the others follow as these end.
        """
        nothing = [None] * len(prefixes)
        requests = [
            Request(prefix=p, sampling=s, max_new_tokens=max_new_tokens, stop=stop, vectors=v, constraint=c)
            for p, s, v, c in zip(prefixes, samplings, vectors or nothing, constraints or nothing, strict=True)
        ]
        all_lanes = sum(1 + sampling.guided for sampling in samplings)
        batcher = self.batcher(
            max_lanes=max(1, all_lanes) if max_lanes is None else min(max(1, all_lanes), max_lanes),
            context=max(map(len, prefixes), default=0) + max(1, max_new_tokens),
            speculative=speculative,
        )
        rows = [batcher.submit(request) for request in requests]
        while batcher.busy:
            batcher.step()
        return [row.generation for row in rows]

    def stream(self, request: Request, *, speculative: bool = True) -> Generator[Piece]:
        """What comes of a request, as it settles; closing the iterator ends it.

        Raises:
            MmtpError: the request is not in order; see :class:`mmtp.decode.rows.Row`.
        """
        context = len(request.prefix) + max(1, request.max_new_tokens)
        batcher = self.batcher(max_lanes=1 + request.sampling.guided, context=context, speculative=speculative)
        return batcher.stream(batcher.submit(request))
