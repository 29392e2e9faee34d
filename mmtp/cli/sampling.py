"""Settings of sampling on the command line: one value for all media, or one for each (``--temperature image=1 --temperature text=0``)."""

from collections.abc import Sequence
from typing import Any

from mmtp.decode.sample import SamplingError


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


def _parse(name: str, value: str) -> dict[str, Any]:
    first, *last = value.split(":", 1) if name == "guidance" else [value]
    try:
        parsed: dict[str, Any] = {name: int(first) if name == "top_k" else float(first)}
        return parsed | {f"{name}_end": float(end) for end in last}
    except ValueError:
        wanted = "a whole number" if name == "top_k" else "a number, or FIRST:LAST," if name == "guidance" else "a number"
        raise SamplingError(f"--{name.replace('_', '-')} {value}: {wanted} is wanted, MEDIUM= before it for one medium alone") from None
