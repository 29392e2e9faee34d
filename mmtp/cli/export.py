"""``mmtp export``: a model as a checkpoint of transformers."""

from pathlib import Path
from typing import Literal


def export(
    model: str,
    out: Path,
    /,
    *,
    tokenizer: list[str] | None = None,
    drafts: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a model as a checkpoint of transformers, for AutoModelForCausalLM and AutoTokenizer.

    The layout is Qwen3's, or Llama's for a model without QK-norm. Draft modules of sequential and shared heads follow the layers, as in
    DeepSeek-V3. A recipe may start from what was exported: start = "transformers:OUT". Models with continuous features or weights of
    single media are refused, for the layout has no place for them.

    Args:
        model: a zoo entry, a folder or a Hub id.
        out: folder of the checkpoint; must be empty.
        tokenizer: where the text tokenizer is, if its name alone does not tell.
        drafts: with the modules of the draft head.
        dtype: of the weights.

    Examples:
        mmtp export runs/joint/result exported
        mmtp export vqa-s exported --no-drafts --dtype bfloat16
    """
    from mmtp.data.restore import load_tokenizers
    from mmtp.hub import from_pretrained
    from mmtp.models.exchange import export_language_model, positions_differ
    from mmtp.models.unified import UnifiedModel
    from mmtp.stream.vocab import VocabLayout
    from mmtp.types import MmtpError

    loaded = from_pretrained(model)
    if not isinstance(loaded, UnifiedModel):
        raise MmtpError(f"{model}: is a {type(loaded).__name__}; models are exported, not tokenizers")
    layout = loaded.config.layout
    texts = load_tokenizers(VocabLayout(layout.text), tokenizer or [])
    content = next((text.content for text in texts.values()), None)
    export_language_model(loaded, out, content, drafts=drafts, dtype=dtype)
    print(f"exported: {out}")
    if differ := positions_differ(layout):
        print(f"note: positions of {' and '.join(differ)} codes have one axis there and several here; behind such codes, states differ")
