"""What every tokenizer made of a network shares: the mode in which codes are made, a cheap fingerprint, and a look at foreign codes."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mmtp.config import Config
from mmtp.hub import fingerprint


class Reference:
    """Evaluation mode, no gradients, no autocast: what encoding and decoding run under, whatever surrounds them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.training = self.module.training
        self.module.eval()
        device = next(self.module.parameters(), torch.empty(0)).device  # a tokenizer may do without weights
        self.contexts = (torch.no_grad(), torch.autocast(device.type, enabled=False))
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *exception: object) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*exception)  # type: ignore[arg-type]
        self.module.train(self.training)


class FingerprintCache:
    """The fingerprint of a module, hashed anew only when a weight has changed.

    Weights change in place (training, loading); their version counters tell, far cheaper than hashing.
    """

    def __init__(self) -> None:
        self._version: object = None
        self._value = ""

    def of(self, config: Config, module: nn.Module) -> str:
        """Hash of configuration and weights, as :func:`mmtp.hub.fingerprint` has it."""
        state = module.state_dict()
        version = tuple((t.data_ptr(), t._version) for t in state.values())
        if self._version != version:
            self._version, self._value = version, fingerprint(config, state)
        return self._value


def fault(ids: Int[Tensor, "k *n"], codebook_sizes: Sequence[int]) -> str:
    """Why codes cannot be those of a tokenizer with these codebooks; empty where they can. The first few codebooks will do."""
    if not 1 <= len(ids) <= len(codebook_sizes):
        return f"codes of {len(ids)} codebooks given, 1 to {len(codebook_sizes)} wanted"
    for k, (codes, size) in enumerate(zip(ids, codebook_sizes, strict=False)):
        if codes.numel():
            least, most = (int(bound) for bound in codes.aminmax())
            if least < 0 or most >= size:
                return f"codes {least} to {most} of codebook {k} given, 0 to {size - 1} wanted"
    return ""
