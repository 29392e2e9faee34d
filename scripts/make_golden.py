"""Makes the golden file of zoo entries: ``python scripts/make_golden.py tokenizers/image-fsq-f8 models/vqa-s``.

The tolerance is ten times the worst difference measured here between one and two threads, with and without oneDNN: enough for another
processor, far too little for another weight. Only a release that means to change what an entry gives makes its file anew.
"""

import platform
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.eval.shapes import PALETTE, draw
from mmtp.hub import from_pretrained
from mmtp.pipeline import Pipeline
from mmtp.stream.template import Turn, encode_document, question_turn, text_segment
from mmtp.testing import Golden, check_zoo_entry, model_golden, tokenizer_golden, write_golden
from mmtp.testing.voice import voice
from mmtp.tokenizers.image.one_d import OneDImageTokenizer
from mmtp.types import Codes, Modality

TEXTS = [
    "draw a blue circle",
    "Is there a rectangle in the image?",
    "Ünïcode: 漢字, Привет, 🙂👩‍🔬, \u202e\x00 and\r\n\ttabs  ",
    "",
]


def picture(shape: str, colour: str, height: int = 64, width: int = 64) -> Float[Tensor, "3 h w"]:
    """A shape on a pale ground, drawn here: golden files hold no picture of others."""
    cover = torch.from_numpy(draw(shape, (0.3 * height, 0.2 * width, 0.8 * height, 0.7 * width), (height, width))).float()
    ground = torch.tensor([0.94, 0.97, 0.92])[:, None, None]
    return ground + (torch.tensor(PALETTE[colour])[:, None, None] / 255 - ground) * cover


def gradient(height: int, width: int) -> Float[Tensor, "3 h w"]:
    """Every channel rises along another direction."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack((x, y, 1 - (x + y) / 2))


def media(tokenizer: Any) -> list[Any]:
    """What a tokenizer is given, all of it made here."""
    modality = tokenizer.spec.modality
    if modality is Modality.TEXT:
        return TEXTS
    if modality is Modality.AUDIO:
        rate = int(tokenizer.spec.sample_rate)
        return [voice(1.0, rate=rate), voice(0.37, 1, rate), torch.zeros(1, rate // 10)]
    if isinstance(tokenizer, OneDImageTokenizer):
        height, width = tokenizer.config.size
        return [picture("circle", "blue", height, width), picture("triangle", "red", height, width), gradient(height, width)]
    return [picture("circle", "blue"), picture("triangle", "red"), picture("rectangle", "black", 45, 37), gradient(64, 64)]


def first_outputs(entry: Any, folder: Path) -> dict[str, Tensor]:
    """Inputs and outputs of an entry."""
    if hasattr(entry, "spec"):
        return tokenizer_golden(entry, media(entry))
    pipeline = Pipeline.from_pretrained(folder)
    known = {medium.modality for medium in pipeline.layout.media}
    given = pipeline.encode_pictures([picture("circle", "blue")]) if Modality.IMAGE in known else []
    given += pipeline.encode_sounds([voice(0.6)]) if Modality.AUDIO in known else []
    question = question_turn(pipeline.encode_text, "what color is the shape?")
    asked = Turn("user", (*(replace(segment, target=False) for segment in given), *question.segments))
    document = (asked, Turn("assistant", (text_segment(pipeline.encode_text, "blue", target=True),)))
    return model_golden(entry, torch.from_numpy(encode_document(pipeline.layout, document).tokens))


def outputs_again(entry: Any, golden: dict[str, Tensor]) -> list[Tensor]:
    """What the tolerance is for: media decoded from the stored codes, latents, log-probabilities of the stored stream."""
    if not hasattr(entry, "spec"):
        return [model_golden(entry, golden["tokens"])["logprobs"]]
    if "values" in golden:
        return [entry.encode(media(entry)).values]
    return entry.decode(Codes(golden["codes"], golden["lengths"], golden["sizes"]))


def measured_worst(entry: Any, golden: dict[str, Tensor]) -> float:
    """The worst absolute difference over ways of computing the outputs."""
    if hasattr(entry, "spec") and entry.spec.modality is Modality.TEXT:
        return 0.0
    whole = [golden[name] for name in ("logprobs", "values") if name in golden]
    stored = whole or [golden[f"output.{i}"] for i in range(len(golden["codes"]))]
    worst = 0.0
    for threads in (1, 2):
        for onednn in (True, False):
            torch.set_num_threads(threads)
            with torch.backends.mkldnn.flags(enabled=onednn):
                again = outputs_again(entry, golden)
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(again, stored, strict=True)))
    return worst


def main() -> None:
    """Writes the golden file of every folder named on the command line, and checks it."""
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
    for name in sys.argv[1:]:
        folder = Path(name)
        entry = from_pretrained(folder)
        tensors = first_outputs(entry, folder)
        worst = measured_worst(entry, tensors)
        notes = {"torch": torch.__version__, "machine": platform.machine(), "worst measured": f"{worst:.3g}"}
        write_golden(folder / "golden.safetensors", Golden(tensors, tolerance=max(10 * worst, 3e-5), notes=notes))
        check_zoo_entry(folder)
        print(f"{folder}: golden file written, worst difference {worst:.3g}")


if __name__ == "__main__":
    main()
