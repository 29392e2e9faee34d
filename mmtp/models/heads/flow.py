"""Continuous tokens out: vectors are drawn from noise by flow matching, one after the other or a span at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

import mmtp.config

TIME_SCALE = 1000.0
"""Times from 0 to 1 are embedded as whole steps of diffusion models are, whose frequencies are known to serve."""


class FlowHead(nn.Module):
    """What the heads that write vectors share: straight ways from noise to data.

    At time t a point on the way from noise e to a vector x is at (1 - t) e + t x, and should move by x - e (Lipman et al. 2023, arXiv
    2210.02747, section 4.1; BAGEL, arXiv 2505.14683, runs the same way with time turned round). What is learnt is a distribution, not
    its mean: of two possible vectors one is drawn.

    Attributes:
        block: whether the vectors of a span are drawn together, from the states at their own places, which see each other; else one
            after the other, each from the state before it.
    """

    block: ClassVar[bool]
    config: Any

    @dataclass(frozen=True, kw_only=True)
    class Config(mmtp.config.Config):
        """
        Attributes:
            steps: Euler steps in which vectors are drawn.
            mean: of the vectors' numbers over the data, subtracted before all else.
            std: of the vectors' numbers over the data, by which the rest is divided: noise is of deviation 1, and so should vectors be.
        """

        family: ClassVar[str] = "flow"
        steps: int = 25
        mean: float = 0.0
        std: float = 1.0

        def __post_init__(self) -> None:
            if self.steps < 1:
                raise ValueError(f"steps {self.steps}: at least 1 is wanted")
            if self.std <= 0:
                raise ValueError(f"std {self.std}: more than 0 is wanted")

    def to_noise_units(self, vectors: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        """Vectors as points of the ways."""
        return (vectors - self.config.mean) / self.config.std

    def to_vectors(self, points: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        """Points of the ways as vectors."""
        return points * self.config.std + self.config.mean

    def euler(
        self, noise: Float[Tensor, "*n c"], velocity: Callable[[Float[Tensor, "*n c"], float], Float[Tensor, "*n c"]]
    ) -> Float[Tensor, "*n c"]:
        """Vectors, by Euler steps from noise along the velocity of a point at a time."""
        points, steps = noise, self.config.steps
        for step in range(steps):
            points = points + velocity(points, step / steps) / steps
        return self.to_vectors(points)


class TokenFlow(FlowHead):
    """Draws one vector per position, given the backbone's state at the position before it (MAR, Li et al. 2024, arXiv 2406.11838,
    section 3, with flow matching in place of diffusion): a small MLP whose layer norms are steered by time and state.

    Args:
        config: sizes.
        state_width: of the backbone's states.
        vector_width: of the vectors.
    """

    block = False

    @dataclass(frozen=True, kw_only=True)
    class Config(FlowHead.Config):
        """
        Attributes:
            width: of the MLP.
            depth: residual blocks. MAR has 3 to 12.
            repeats: times and noises that every vector is trained with per step; the backbone runs once for all. MAR has 4.
        """

        width: int = 256
        depth: int = 3
        repeats: int = 4

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("depth", "repeats"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} {getattr(self, name)}: at least 1 is wanted")
            if self.width < 2 or self.width % 2:
                raise ValueError(f"width {self.width}: an even number is wanted, for sines and cosines of time")

    def __init__(self, config: Config, *, state_width: int, vector_width: int) -> None:
        super().__init__()
        self.config = config
        self.inputs = nn.Linear(vector_width, config.width)
        self.state = nn.Linear(state_width, config.width)
        self.time = nn.Sequential(nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.blocks = nn.ModuleList(_Block(config.width) for _ in range(config.depth))
        self.outputs = _Steered(config.width, vector_width)

    def forward(self, x: Float[Tensor, "n c"], time: Float[Tensor, " n"], state: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Velocities of points at their times, in the units of the noise."""
        steer = self.time(time_waves(time, self.config.width)) + self.state(state)
        hidden = self.inputs(x)
        for block in self.blocks:
            hidden = block(hidden, steer)
        return self.outputs(hidden, steer)

    def error(self, vectors: Float[Tensor, "n c"], states: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Mean squared error of the velocity at random times; per number, so that widths compare. Knowing nothing costs about 2."""
        target = self.to_noise_units(vectors).repeat(self.config.repeats, 1)
        noise = torch.randn_like(target)
        time = torch.rand(len(target), device=target.device)
        velocity = self(torch.lerp(noise, target, time[:, None]), time, states.repeat(self.config.repeats, 1))
        return (velocity.float() - (target - noise)).square().mean()

    def sample(
        self,
        states: Float[Tensor, "n d"],
        noise: Float[Tensor, "n c"],
        guides: Float[Tensor, "n d"] | None = None,
        guidance: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n c"]:
        """Vectors, by Euler steps from noise.

        Args:
            states: of the positions before them.
            noise: where each starts.
            guides: states of the unconditional branch; velocities become ``u + w (c - u)`` (Ho & Salimans, arXiv 2207.12598).
            guidance: w of every vector.
        """

        def velocity(x: Tensor, time: float) -> Tensor:
            times = torch.full((len(x),), time, device=x.device)
            guided = self(x, times, states)
            if guides is None or guidance is None:
                return guided
            return torch.lerp(self(x, times, guides), guided, guidance[:, None])

        return self.euler(noise, velocity)


class BlockFlow(FlowHead):
    """Draws the vectors of a span together: the backbone itself is the network of the flow (Transfusion, Zhou et al. 2024, arXiv
    2408.11039, section 3; BAGEL, arXiv 2505.14683).

    The places of the span hold points at one time, told by an embedding that is added; they see each other and what is before them.
    One linear layer reads the velocity of each from its own state.

    Args:
        config: sizes.
        state_width: of the backbone's states, even.
        vector_width: of the vectors.
    """

    block = True

    @dataclass(frozen=True, kw_only=True)
    class Config(FlowHead.Config):
        """Has nothing to set besides."""

    def __init__(self, config: Config, *, state_width: int, vector_width: int) -> None:
        super().__init__()
        self.config = config
        self.time = nn.Sequential(nn.Linear(state_width, state_width), nn.SiLU(), _shut(state_width, state_width))
        self.outputs = _shut(state_width, vector_width)

    def forward(self, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        """Velocities of the points at whose places the states are, in the units of the noise."""
        return self.outputs(states)

    def embed_time(self, time: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """What is added at the places of points at these times."""
        return self.time(time_waves(time, self.outputs.in_features))


class _Steered(nn.Module):
    """Layer norm whose scale and shift are a function of what steers it, and a linear layer; nothing comes out at the start."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.steer = nn.Sequential(nn.SiLU(), _shut(width, 2 * width))
        self.out = _shut(width, out_width)

    def forward(self, x: Float[Tensor, "n w"], steer: Float[Tensor, "n w"]) -> Float[Tensor, "n o"]:
        scale, shift = self.steer(steer).chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift)


class _Block(nn.Module):
    """A residual block of MAR's head (section 4): steered layer norm, two layers with SiLU between, a steered gate that starts shut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.steer = nn.Sequential(nn.SiLU(), _shut(width, 3 * width))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Float[Tensor, "n w"], steer: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        scale, shift, gate = self.steer(steer).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


def _shut(width: int, out_width: int) -> nn.Linear:
    """A layer that gives zeros until it has learnt something (adaLN-Zero, Peebles & Xie 2022, arXiv 2212.09748, section 3.2)."""
    layer = nn.Linear(width, out_width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def time_waves(time: Float[Tensor, " n"], width: int) -> Float[Tensor, "n w"]:
    """Sines and cosines of times from 0 to 1 (Vaswani et al. 2017, section 3.5, as diffusion models take it over)."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2, device=time.device) / (width // 2))
    angles = TIME_SCALE * time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)
