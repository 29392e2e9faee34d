"""Which of the tokenizers that someone names a vocabulary was made with: fingerprints tell, names do not."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmtp.hub import HubError, from_pretrained
from mmtp.stream.vocab import MediaEntry, TextEntry


def by_fingerprint(entries: Sequence[TextEntry | MediaEntry], given: Iterable[str | Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """Loads what is named.

    Args:
        entries: of a vocabulary.
        given: zoo entries, folders or Hub ids.

    Returns:
        The tokenizers, by the names of the entries whose fingerprint they have; and of what has none of these, what it is instead.

    Raises:
        HubError: something is not found.
    """
    served: dict[str, Any] = {}
    strangers: dict[str, str] = {}
    for name in given:
        tokenizer = from_pretrained(name)
        if not hasattr(tokenizer, "spec"):
            strangers[str(name)] = f"is a {type(tokenizer).__name__}, not a tokenizer"
            continue
        fits = [entry.name for entry in entries if entry.fingerprint == tokenizer.spec.fingerprint]
        served.update(dict.fromkeys(fits, tokenizer))
        if not fits:
            strangers[str(name)] = f"has fingerprint {tokenizer.spec.fingerprint}"
    return served, strangers


def loaded(model: str | Path, name: str, given: Any = None) -> Any:
    """A tokenizer of a model, or one from where it is said to be; where nothing is said, the zoo's of that name.

    Args:
        model: named in errors.
        name: that the model's vocabulary has for it.
        given: a tokenizer, or a zoo entry, folder or Hub id.

    Raises:
        HubError: it is not found.
    """
    if given is not None:
        return from_pretrained(given) if isinstance(given, str | Path) else given
    try:
        return from_pretrained(name)
    except HubError as error:
        raise HubError(f"{model}: its tokenizer {name!r} is not in the zoo; name its folder with --tokenizer ({error})") from error
