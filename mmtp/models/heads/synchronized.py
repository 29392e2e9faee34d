"""Synchronized multi-token prediction: one block for all offsets, whose queries read every modality's bank in the same step.

The banks are snapshots of the backbone's states, one per modality. Each has a softmax of its own, because many redundant picture
tokens would otherwise drown a few words (ViSpec, arXiv 2509.15235, section 3, finds so for shallow drafters), and what is read in
other banks than one's own enters through a gate that starts at 0 (Flamingo, arXiv 2204.14198, section 2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.base import BELOW, BlockConfig, Places
from mmtp.nn.attention import LayerCache, attend, gather
from mmtp.nn.linear import Derived, Linear
from mmtp.nn.mlp import SwiGLU
from mmtp.nn.native import Banks, Held, Program, Weights
from mmtp.nn.norm import RMSNorm
from mmtp.nn.rope import Angles, rotate
from mmtp.types import Modality


class _Compiled(NamedTuple):
    """A step of the head, laid out for the kernels.

    Attributes:
        program: the block.
        added: to what a step joins, by offset and ``Modality.index``.
    """

    program: Program
    added: Float[Tensor, "offsets modalities d"]


class SynchronizedHead(nn.Module):
    """For depth k at anchor t, with g^0 the backbone's state h::

        u   = W [RMS(E(x_{t+k})) ; RMS(g^{k-1}_t)] + offset_k + modality(x_{t+k+1})
        y   = u + Out(Attn(u, own bank, <=t) + sum over the others of tanh(gate) Attn(u, other bank, <=t))
        g^k = y + MLP(RMS(y))

    A query's own bank is that of the token it predicts; the grammar knows its modality. Keys and values come once per position from
    h, serve all depths, and stand where the token stands that h predicts; an empty bank gives 0.

    With ``vertical`` the block is applied once more at a code x_t, with ``u = W [RMS(E(x_t)) ; RMS(h_t)] + offset_below + modality``,
    for the code one row below it: so all but the last code of a row are drafted before it starts.

    Args:
        config: ``mtp_depth``, what is exchanged, and the width of the block where it is not the backbone's.
        backbone: sizes of the block.
        modalities: of the vocabulary; each has a bank.
    """

    places: Int[Tensor, " m"]

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """
        Attributes:
            vertical: most codes of the row below that may follow the ``mtp_depth`` drafts of a pass; 0 predicts none.
            exchange: ``"gated"``; or, to measure what that brings, ``"none"`` (gates stay closed) or ``"common"`` (one softmax over all
                banks).
        """

        vertical: int = 0
        exchange: Literal["gated", "none", "common"] = "gated"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.vertical < 0:
                raise ValueError(f"vertical {self.vertical} is below 0; 0 predicts no rows")

    def __init__(self, config: Config, backbone: BackboneConfig, modalities: Sequence[Modality]) -> None:
        super().__init__()
        backbone = config.sizes(backbone)
        self.config = config
        width, eps, heads = backbone.width, backbone.norm_eps, backbone.num_heads
        self.head_dim, self.num_kv_heads = backbone.head_dim, backbone.num_kv_heads
        self.rope, self._sizes = backbone.rope(), backbone
        self.embedding_norm, self.state_norm, self.memory_norm = (RMSNorm(width, eps) for _ in range(3))
        self.project = Linear(2 * width, width, bias=False)
        self.offset = nn.Embedding(config.mtp_depth + (config.vertical > 0), width)  # the last one stands for BELOW
        self.modality = nn.Embedding(len(modalities), width)
        self.attention_norm, self.mlp_norm, self.norm = (RMSNorm(width, eps) for _ in range(3))
        self.query = Linear(width, heads * backbone.head_dim, bias=False)
        self.memory = Linear(width, 2 * backbone.num_kv_heads * backbone.head_dim, bias=False)
        self.out = Linear(heads * backbone.head_dim, width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(backbone.head_dim, eps) for _ in range(2))
        self.mlp = SwiGLU(width, backbone.mlp_width)
        self.gates = nn.Parameter(torch.zeros(len(modalities), len(modalities))) if config.exchange == "gated" else None
        place = torch.zeros(len(Modality), dtype=torch.long)
        place[[modality.index for modality in modalities]] = torch.arange(len(modalities))
        self.register_buffer("places", place, persistent=False)
        self._made = Derived()

    @property
    def mtp_depth(self) -> int:
        return self.config.mtp_depth

    @property
    def vertical(self) -> int:
        return self.config.vertical

    @property
    def num_modules(self) -> int:
        return 1

    @property
    def num_caches(self) -> int:
        return 1

    def forward(
        self,
        hidden: Float[Tensor, "b s d"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        anchors: Int[Tensor, "b n"] | None = None,
    ) -> list[Float[Tensor, "b n d"]]:
        memory = self._remember(hidden, self.rope(places.ahead(1).positions))
        # Anchors look at the banks alone, not at each other's queries: only those that are wanted are computed.
        chosen = gather(hidden, anchors)
        states, state = [], chosen
        for k in range(1, self.mtp_depth + 1):
            state = self._run(k - 1, state, gather(embedded.roll(-k, 1), anchors), places.ahead(k).at(anchors), memory)
            states.append(self.norm(state))
        if self.vertical:
            states.append(self.norm(self._run(BELOW, chosen, gather(embedded, anchors), places.at(anchors), memory)))
        return states

    def draft(
        self,
        depth: int,
        state: Float[Tensor, "b s *state"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        caches: Sequence[LayerCache],
    ) -> tuple[Float[Tensor, "b s *left"], Float[Tensor, "b s d"]]:
        (cache,) = caches
        if (held := cache.held) is not None:
            if depth == 1:
                self._compiled(held).program.remember(state, places.positions, held)
            return self._step(depth - 1, state, embedded, places, held)
        memory = cache.update(*self._remember(state, self.rope(places.positions))) if depth == 1 else cache.read()
        state = self._run(depth - 1, state, embedded, places, memory)
        return state, self.norm(state)

    def below(
        self, hidden: Float[Tensor, "b s d"], embedded: Float[Tensor, "b s d"], places: Places, caches: Sequence[LayerCache]
    ) -> Float[Tensor, "b s d"]:
        (cache,) = caches
        if (held := cache.held) is not None:
            return self._step(BELOW, hidden, embedded, places, held)[1]
        return self.norm(self._run(BELOW, hidden, embedded, places, cache.read()))

    def _step(self, offset: int, state: Tensor, embedded: Tensor, places: Places, held: Held) -> tuple[Tensor, Tensor]:
        """:meth:`_run` and the last norm, compiled; of newest anchors alone where no others are wanted, in the place of all."""
        step, width = self._compiled(held), state.shape[1]
        positions, modality, mask = places.positions, places.modality, places.mask
        if (newest := places.newest) is not None and width > 1:
            rows = slice(newest[0], newest[0] + 1) if len(newest) == 1 else torch.tensor(newest, device=state.device)[:, None]
            lanes = slice(None) if len(newest) == 1 else torch.arange(len(newest), device=state.device)[:, None]
            state, embedded, positions, modality = (each[lanes, rows] for each in (state, embedded, positions, modality))
            mask = mask[:, :, rows] if len(newest) == 1 else mask[:, 0][lanes, rows].unsqueeze(1)
        banks = None if self.config.exchange == "common" else Banks(places.banks, modality)
        state, out = step.program(state, positions, mask, held, embedded, step.added[offset][modality], banks)
        return state.expand(-1, width, -1), out.expand(-1, width, -1)

    def _compiled(self, held: Held) -> "_Compiled":
        """The step laid out, once for the batch that a cache is of."""
        return held.programs.get(self) or held.programs.setdefault(self, self._made.get(list(self.parameters()), self._make))

    def _make(self) -> "_Compiled":
        weights = Weights(
            attention_norm=self.attention_norm.weight,
            qkv=self.query.weight,
            q_norm=self.q_norm.weight,
            k_norm=self.k_norm.weight,
            out=self.out.weight,
            mlp_norm=self.mlp_norm.weight,
            gate_up=self.mlp.gate_up.weight,
            down=self.mlp.down.weight,
            join=(self.embedding_norm.weight, self.state_norm.weight, self.project.weight),
            last_norm=self.norm.weight,
            memory=(self.memory_norm.weight, self.memory.weight),
        )
        # By Modality.index, so that a step looks up no banks.
        exchange = None if self.config.exchange == "common" else self._exchange()[self.places][:, self.places]
        added = self.offset.weight[:, None] + self.modality.weight[self.places]
        return _Compiled(self._sizes.program([weights], self.rope, exchange), added.detach())

    def _exchange(self) -> Float[Tensor, "banks banks"]:
        """What a query of one bank has of each."""
        own = torch.eye(self.modality.num_embeddings, device=self.places.device)
        return own if self.gates is None else own + self.gates.tanh() * (1 - own)

    def _remember(self, hidden: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Keys and values of the banks, one per anchor."""
        key, value = self.memory(self.memory_norm(hidden)).unflatten(-1, (2 * self.num_kv_heads, self.head_dim)).chunk(2, dim=2)
        return rotate(self.k_norm(key), angles).to(value.dtype).transpose(1, 2), value.transpose(1, 2)

    def _run(self, offset: int, state: Tensor, embedded: Tensor, places: Places, memory: tuple[Tensor, Tensor]) -> Tensor:
        own = self.places[places.modality]
        joined = torch.cat((self.embedding_norm(embedded), self.state_norm(state).to(embedded.dtype)), dim=-1)
        u = self.project(joined) + self.offset.weight[offset] + self.modality(own)
        query = self.query(self.attention_norm(u)).unflatten(-1, (-1, self.head_dim))
        query = rotate(self.q_norm(query), self.rope(places.positions)).to(memory[1].dtype).transpose(1, 2)
        read = rearrange(self._read(query, own, places, *memory), "b h s hd -> b s (h hd)")
        y = u + self.out(read)
        return y + self.mlp(self.mlp_norm(y))

    def _read(self, query: Tensor, own: Tensor, places: Places, keys: Tensor, values: Tensor) -> Float[Tensor, "b h s hd"]:
        """What a query finds in its own bank, and through the gates in the others."""
        if self.config.exchange == "common":
            return attend(query, keys, values, places.mask)
        banks, weights = self.places[places.banks], self._exchange().to(query.dtype)
        found = torch.zeros_like(query)
        for bank in range(len(weights)):
            mask = places.mask & (banks == bank)[:, None, None]
            some = mask.any(-1, keepdim=True)
            # A row of the softmax must not be empty; what an empty bank gives counts for nothing.
            read = attend(query, keys, values, mask | ~some)
            found = found + torch.where(some, read, 0) * weights[own, bank][:, None, :, None]
        return found
