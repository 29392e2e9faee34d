"""What streams of sound and of video share."""

from mmtp.nn.conv1d import State
from mmtp.tokenizers.base import StreamError


class ChunkStream:
    """The state of a causal network between chunks, and whether the stream has ended."""

    def __init__(self) -> None:
        self._state: State = {}
        self._ended = False

    def _check_open(self) -> None:
        if self._ended:
            raise StreamError("this stream has ended; make a new one")
