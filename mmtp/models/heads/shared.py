"""Shared multi-token prediction: one module, applied again for every further token (FastMTP, arXiv 2509.18362, section 3)."""

from dataclasses import dataclass

from mmtp.models.heads.sequential import SequentialHead


class SharedHead(SequentialHead):
    """The module of :class:`SequentialHead` once for all depths: each application reads the state that the one before has left.

    It has one D-th of the parameters, and learns from all offsets at once. Every depth keeps keys and values of its own, for its
    states are others.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(SequentialHead.Config):
        """How often the module is applied."""

    @property
    def num_modules(self) -> int:
        """Modules: one for all depths."""
        return 1
