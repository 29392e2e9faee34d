"""Settings of decoding on the command line: device, drafts, and sampling, one for all media or for each (``--temperature image=1``)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtp.decode.sample import SamplingError
from mmtp.types import MmtpError

if TYPE_CHECKING:
    import torch

    from mmtp.decode.drafts import Drafts


def sampling_settings(**flags: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of :class:`mmtp.decode.sample.Sampling`.

    Args:
        **flags: name of the setting -> what was given, each ``VALUE`` or ``MEDIUM=VALUE``. Guidance may be ``FIRST:LAST``.

    Raises:
        SamplingError: a value is no number.
    """
    common: dict[str, Any] = {}
    per_modality: dict[str, dict[str, Any]] = {}
    for name, given in flags.items():
        for words in given or ():
            modality, value = words.rpartition("=")[::2]
            (per_modality.setdefault(modality, {}) if modality else common).update(_parse(name, value))
    return {**common, "per_modality": per_modality}


def device_of(name: str) -> "torch.device":
    """A device by torch's name.

    Raises:
        MmtpError: there is none of that name here.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MmtpError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); cpu, cuda or cuda:N is wanted") from None
    return device


def drafts_of(words: str) -> "Drafts":
    """Where drafts come from: ``auto``, ``head``, ``ngrams``, ``lookup``, ``jacobi``, ``refined``, or a model's name, folder or id; with
    ``+jacobi`` behind one of the others, codes of media go on by it.
    """
    from mmtp.decode.by_medium import DraftsByMedium
    from mmtp.decode.draft_model import ModelDrafts
    from mmtp.decode.drafts import HeadDrafts
    from mmtp.decode.jacobi import JacobiDrafts
    from mmtp.decode.lookup import LookupDrafts
    from mmtp.decode.ngrams import NGramDrafts
    from mmtp.decode.refined import RefinedDrafts
    from mmtp.hub import from_pretrained
    from mmtp.models.unified import UnifiedModel

    ways = {
        "auto": DraftsByMedium,
        "head": HeadDrafts,
        "ngrams": NGramDrafts,
        "lookup": LookupDrafts,
        "jacobi": JacobiDrafts,
        "refined": RefinedDrafts,
    }
    if words in ways:
        return ways[words]()
    if words.endswith("+jacobi"):
        return JacobiDrafts(first=drafts_of(words.removesuffix("+jacobi")))
    model = from_pretrained(words)
    if not isinstance(model, UnifiedModel):
        raise MmtpError(f"--drafts {words}: is a {type(model).__name__}, not a unified model; {', '.join(ways)} or a model is wanted")
    return ModelDrafts(model.eval())


def _parse(name: str, value: str) -> dict[str, Any]:
    first, *last = value.split(":", 1) if name == "guidance" else [value]
    try:
        parsed: dict[str, Any] = {name: int(first) if name == "top_k" else float(first)}
        return parsed | {f"{name}_end": float(end) for end in last}
    except ValueError:
        wanted = "a whole number" if name == "top_k" else "a number, or FIRST:LAST," if name == "guidance" else "a number"
        raise SamplingError(f"--{name.replace('_', '-')} {value}: {wanted} is wanted, MEDIUM= before it for one medium alone") from None
