"""Blocks of decoding in one call, by kernels that are compiled for the machine they run on.

A pass of decoding is so short that what costs is less its arithmetic than starting it: some twenty calls per block. Here a pass over all
blocks is one, of ``native.cpp``, which the system's C++ compiler turns into a library at first use (a few seconds; kept for later).
The kernels compute a position alike whatever stands beside it, so that plain and speculative decoding, alone and in a batch, agree bit for
bit. They are for CPUs: in float32, or with weights and what they multiply in bfloat16 and all else in float32.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmtp.nn.ragged import Ragged
from mmtp.types import MmtpError

SOURCE = Path(__file__).with_suffix(".cpp")
LAYOUT = 8  # that of native.cpp
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")


class NativeError(MmtpError):
    """Kernels that cannot be had here: says why, and what to do."""


class Held(NamedTuple):
    """Where a layer's keys and values are held, for kernels that write and read them there.

    Attributes:
        storage: of all layers, keys and values.
        layer: index of it.
        first: lane that the pass begins with.
        starts: tokens that are held of each lane of the pass, behind which it writes.
        ragged: which places of the pass hold tokens, where padding is left out; else None.
        programs: what modules have been compiled to for passes over this cache, during which weights stay as they are.
    """

    storage: Float[Tensor, "layers 2 lanes k t hd"]
    layer: int
    first: int
    starts: Sequence[int]
    ragged: Ragged | None
    programs: dict[Any, Any]


@dataclass(frozen=True)
class Weights:
    """Weights of a block, and of a draft head's step around it.

    Attributes:
        attention_norm: gain.
        qkv: queries, keys and values; queries alone where what they read is remembered.
        q_norm: gain; None without QK-norm.
        k_norm: likewise.
        out: of attention.
        mlp_norm: gain.
        gate_up: of the feed-forward layer.
        down: likewise.
        join: what a step begins with: gains for embedding and state, and the projection of both; None where a block begins with the state.
        last_norm: gain for the states that leave; None where they leave as they are.
        memory: gain and projection that make keys and values of states that are remembered; None where a position's own are.
    """

    attention_norm: Float[Tensor, " d"]
    qkv: Float[Tensor, "p d"]
    q_norm: Float[Tensor, " hd"] | None
    k_norm: Float[Tensor, " hd"] | None
    out: Float[Tensor, "d h"]
    mlp_norm: Float[Tensor, " d"]
    gate_up: Float[Tensor, "m2 d"]
    down: Float[Tensor, "d m"]
    join: tuple[Float[Tensor, " d"], Float[Tensor, " d"], Float[Tensor, "d d2"]] | None = None
    last_norm: Float[Tensor, " d"] | None = None
    memory: tuple[Float[Tensor, " d"], Float[Tensor, "kv d"]] | None = None

    @property
    def matrices(self) -> list[Tensor]:
        joined = (self.join[2:] if self.join else ()) + (self.memory[1:] if self.memory else ())
        return [self.qkv, self.out, self.gate_up, self.down, *joined]

    @property
    def all(self) -> list[Tensor]:
        own = (self.attention_norm, self.qkv, self.q_norm, self.k_norm, self.out, self.mlp_norm, self.gate_up, self.down, self.last_norm)
        return [weight for weight in (*own, *(self.join or ()), *(self.memory or ())) if weight is not None]


class Banks(NamedTuple):
    """Keys of several kinds, each read with a softmax of its own.

    Attributes:
        of_keys: bank of every key of every lane.
        of_rows: bank of every position of the pass.
    """

    of_keys: Int[Tensor, "b t"]
    of_rows: Int[Tensor, "b s"]


class Program:
    """Blocks laid out for the kernels. Weights in bfloat16 have their inputs rounded to it as well; states stay float32.

    Args:
        weights: of the blocks.
        head_dim: width of one head.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        eps: of all norms.
        frequencies: rotary.
        axis: that each of them belongs to.
        exchange: where keys are of several banks, what a position of one bank has of each.

    Raises:
        NativeError: there is no compiler, or it fails.
    """

    def __init__(
        self,
        weights: Sequence[Weights],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        frequencies: Float[Tensor, " n"],
        axis: Int[Tensor, " n"],
        exchange: Float[Tensor, "banks banks"] | None = None,
    ) -> None:
        self._library = library()
        self._paired = all(exact(weight) for each in weights for weight in each.matrices)
        width, mlp_width = weights[0].down.shape
        self._kept: list[Tensor] = []
        self._sizes = _Sizes(
            width, num_heads, num_kv_heads, head_dim, mlp_width, 0 if weights[0].memory else num_kv_heads,
            0 if exchange is None else len(exchange), self._paired, weights[0].qkv.dtype == torch.bfloat16,
            self._gain(exchange), self._keep(frequencies), self._keep(axis), eps,
        )  # fmt: skip
        self._blocks = (_Block * len(weights))(*(self._block(each) for each in weights))

    def __call__(
        self,
        x: Float[Tensor, "b s d"],
        positions: Int[Tensor, "b s 3"],
        mask: Bool[Tensor, "b 1 s t"],
        held: Held,
        embedded: Float[Tensor, "b s d"] | None = None,
        added: Float[Tensor, "b s d"] | None = None,
        banks: Banks | None = None,
    ) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b s d"]]:
        """Runs all blocks over a pass.

        Args:
            x: states.
            positions: rotary.
            mask: True where a position may look.
            held: keys and values of the first block; those of the others follow. A pass writes there. Padding stays as it is.
            embedded: embeddings that a head's step joins with the states.
            added: to what it has joined.
            banks: kinds of keys; None where they are all alike.

        Returns:
            States, and states after the last norm where there is one.
        """
        x = x.float().contiguous().clone()
        last = torch.empty_like(x) if self._blocks[-1].last_norm else None
        given = (mask, positions, *(None if t is None else t.float() for t in (embedded, added)), *(banks or (None, None)))
        kept = [None if t is None else t.contiguous() for t in given]
        self._run(x, held, mask.shape[3], kept, last)
        return x, x if last is None else last

    def remember(self, x: Float[Tensor, "b s d"], positions: Int[Tensor, "b s 3"], held: Held) -> None:
        """Writes keys and values of states, for a block that has a memory.

        Args:
            x: states.
            positions: rotary.
            held: where.
        """
        self._run(x.float().contiguous(), held, 0, [None, positions.contiguous(), None, None, None, None], None, remember=True)

    def _run(self, x: Tensor, held: Held, extent: int, given: Sequence[Tensor | None], last: Tensor | None, remember: bool = False) -> None:
        lanes, rows, _ = x.shape
        storage, threads = held.storage, torch.get_num_threads()
        layer, part, lane, head = storage.stride()[:4]
        keys = storage.data_ptr() + 4 * (held.layer * layer + held.first * lane)
        # A head's step may be of the newest anchors alone, of which every lane has one.
        at = held.ragged.at if held.ragged is not None and held.ragged.width == rows else None
        count = lanes * rows if at is None else len(at)
        work = torch.empty(self._library.mmtp_work(self._sizes, count, extent, threads))
        mask, positions, *others = (None if t is None else t.data_ptr() for t in given)
        starts = (ctypes.c_int64 * lanes)(*held.starts)
        window = _Window(
            lanes, rows, extent, count, None if at is None else at.data_ptr(), mask, positions, ctypes.addressof(starts), keys,
            keys + 4 * part, layer, lane, head, *others, remember, None if last is None else last.data_ptr(), work.data_ptr(),
        )  # fmt: skip
        self._library.mmtp_blocks(self._sizes, self._blocks, len(self._blocks), window, x.data_ptr(), threads)

    def _block(self, weights: Weights) -> "_Block":
        embedding_norm, state_norm, project = weights.join or (None, None, None)
        memory_norm, memory = weights.memory or (None, None)
        gate, up = (self._laid_out(half) for half in weights.gate_up.chunk(2))
        return _Block(
            *(self._gain(gain) for gain in (embedding_norm, state_norm)),
            self._pack(project),
            self._gain(memory_norm),
            self._pack(memory),
            *(self._gain(gain) for gain in (weights.attention_norm, weights.q_norm, weights.k_norm, weights.mlp_norm, weights.last_norm)),
            *(self._pack(weight) for weight in (weights.qkv, weights.out)),
            self._keep(torch.stack((gate, up), dim=1)),
            self._pack(weights.down),
        )

    def _pack(self, weight: Tensor | None) -> int | None:
        return None if weight is None else self._keep(self._laid_out(weight))

    def _laid_out(self, weight: Tensor) -> Tensor:
        """A weight in pairs where all can be, for the kernels read a program's weights one way."""
        return (pairs if self._paired else panels)(weight.detach())

    def _gain(self, weight: Tensor | None) -> int | None:
        """The same of what is no matrix, and read in float32."""
        return None if weight is None else self._keep(weight.float())

    def _keep(self, weight: Tensor | None) -> int | None:
        """Address of a weight that lives as long as this does."""
        if weight is None:
            return None
        self._kept.append(weight.detach().contiguous())
        return self._kept[-1].data_ptr()


def linear(
    x: Float[Tensor, "m i"], packed: Float[Tensor, "p _ n"] | Float[Tensor, "p i2 n 2"], outputs: int, rounded: bool = False
) -> Float[Tensor, "m o"]:
    """``x @ weight.T`` by a weight in panels or pairs; a row gets the same bits beside any others, and by either.

    Args:
        x: rows, computed with in float32.
        packed: the weight.
        outputs: of it.
        rounded: round ``x`` to bfloat16, as pairs may then be multiplied two at a time.
    """
    x = x.float().contiguous()
    y, room = x.new_empty(x.shape[0], outputs), x.new_empty(x.shape[0], (x.shape[1] + 1) // 2 if rounded else 0)
    matrix = Matrix(packed.data_ptr(), x.shape[1], outputs, packed.dtype == torch.bfloat16, rounded)
    library().mmtp_linear(matrix, x.data_ptr(), len(x), y.data_ptr(), room.data_ptr(), torch.get_num_threads())
    return y


def exact(weight: Float[Tensor, "o i"]) -> bool:
    """Whether bfloat16 can hold all numbers of a weight, as it can where that was saved so."""
    return torch.equal(weight, weight.bfloat16().to(weight.dtype))


def laid_out(weight: Float[Tensor, "o i"]) -> Float[Tensor, "p _ n"] | Float[Tensor, "p i2 n 2"]:
    """A weight for :func:`linear`: in pairs where they hold the same numbers, half of what is to be read, else in panels."""
    return pairs(weight) if exact(weight) else panels(weight)


def panels(weight: Float[Tensor, "o i"]) -> Float[Tensor, "p i n"]:
    """A weight with those of some outputs together, input by input."""
    size = library().mmtp_panel()
    return F.pad(weight, (0, 0, 0, -len(weight) % size)).unflatten(0, (-1, size)).transpose(1, 2).contiguous()


def pairs(weight: Float[Tensor, "o i"]) -> Float[Tensor, "p i2 n 2"]:
    """A weight in panels of bfloat16, two inputs together: what products read that need no more, or whose weight has no more."""
    size = library().mmtp_panel()
    padded = F.pad(weight.bfloat16(), (0, weight.shape[1] % 2, 0, -len(weight) % size))
    return padded.unflatten(0, (-1, size)).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()


_POINTER = ctypes.c_void_p


class _Sizes(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("width", "heads", "kv_heads", "head_dim", "mlp_width", "written", "num_banks", "paired", "rounded")
        ),
        *((name, _POINTER) for name in ("exchange", "frequencies", "axis")),
        ("eps", ctypes.c_float),
    )


class _Block(ctypes.Structure):
    _fields_ = tuple(
        (name, _POINTER)
        for name in (
            "embedding_norm", "state_norm", "project", "memory_norm", "memory", "attention_norm", "q_norm", "k_norm", "mlp_norm",
            "last_norm", "qkv", "out", "gate_up", "down",
        )
    )  # fmt: skip


class _Window(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "rows", "extent", "count")),
        *((name, _POINTER) for name in ("at", "mask", "positions", "starts", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("block_stride", "lane_stride", "head_stride")),
        *((name, _POINTER) for name in ("embedded", "added", "banks", "own")),
        ("remember", ctypes.c_int64),
        *((name, _POINTER) for name in ("last", "work")),
    )


class Matrix(ctypes.Structure):
    """A weight as kernels multiply by it."""

    _fields_ = (("weights", _POINTER), *((name, ctypes.c_int64) for name in ("inputs", "outputs", "paired", "rounded")))


@cache
def library() -> Any:
    """The kernels, compiled for this machine.

    Raises:
        NativeError: there is no compiler, it fails, or the source is not the one that this process was started with.
    """
    compiler, flags = os.environ.get("CXX", "c++"), FLAGS
    # What the compiler defines tells its version and the instructions of this machine: a folder may be shared with others.
    defined = _run([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(SOURCE.read_bytes() + defined + " ".join(flags).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmtp"
    path = folder / f"native-{key}.so"
    if not path.exists():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            folder = Path(tempfile.mkdtemp(prefix="mmtp-"))  # kept for this process alone
            path = folder / path.name
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "native.o"
            _run([compiler, *flags, "-fopenmp", "-c", str(SOURCE), "-o", str(made)])
            # Not linked with an OpenMP of its own: torch's is there already, and two teams of threads would stand in each other's way.
            _run([compiler, "-shared", str(made), "-o", str(made.with_suffix(".so"))])
            os.replace(made.with_suffix(".so"), path)
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"compiled kernels cannot be loaded ({error})") from error
    pointer, number = _POINTER, ctypes.c_int64
    layout = LAYOUT
    for structure in (_Sizes, _Block, _Window):
        layout = 1000 * layout + ctypes.sizeof(structure)
    told = getattr(found, "mmtp_layout", None)  # other numbers, and kernels would read addresses where there are none
    if told is not None:
        told.restype, told.argtypes = number, ()
    if told is None or told() != layout:
        raise stale()
    found.mmtp_panel.restype, found.mmtp_panel.argtypes = number, ()
    found.mmtp_work.restype, found.mmtp_work.argtypes = number, (ctypes.POINTER(_Sizes), number, number, number)
    found.mmtp_linear.restype = None
    found.mmtp_linear.argtypes = (ctypes.POINTER(Matrix), pointer, number, pointer, pointer, number)
    found.mmtp_blocks.restype = None
    found.mmtp_blocks.argtypes = (ctypes.POINTER(_Sizes), ctypes.POINTER(_Block), number, ctypes.POINTER(_Window), pointer, number)
    return found


def stale() -> NativeError:
    """What is raised where kernels have other structures than this process."""
    return NativeError(f"{SOURCE}: is of another version of mmtp than this process runs; start it anew")


@cache
def usable() -> bool:
    """Whether this machine can compile the kernels; they are compiled to find out."""
    try:
        library()
    except NativeError:
        return False
    return True


def _run(command: Sequence[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise NativeError(f"compiled passes need a C++ compiler, and {command[0]!r} is none; install g++ or set CXX") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise NativeError(f"compiled passes: {command[0]!r} fails, and says: {said[0]}") from error
