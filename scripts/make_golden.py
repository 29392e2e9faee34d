"""Makes the golden file of zoo entries: ``python scripts/make_golden.py tokenizers/image-fsq-f8 models/vqa-s``.

The tolerance is ten times the worst difference measured here between one and two threads, with and without oneDNN: enough for another
processor, far too little for another weight. Only a release that means to change what an entry gives makes its file anew.
"""

import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtp.eval.vqa import easy_vqa_samples
from mmtp.hub import from_pretrained
from mmtp.pipeline import Pipeline
from mmtp.stream.template import Turn, encode_document, question_turn, text_segment
from mmtp.testing import Golden, check_zoo_entry, model_golden, tokenizer_golden, write_golden
from mmtp.types import Codes, Modality

TEXTS = [
    "draw a blue circle",
    "Is there a rectangle in the image?",
    "Ünïcode: 漢字, Привет, 🙂👩‍🔬, \u202e\x00 and\r\n\ttabs  ",
    "",
]


def first_outputs(entry: Any, folder: Path) -> dict[str, Tensor]:
    """Inputs and outputs of an entry."""
    if hasattr(entry, "spec"):
        if entry.spec.modality is Modality.TEXT:
            return tokenizer_golden(entry, TEXTS)
        pictures = [sample.picture for sample in easy_vqa_samples("test", limit=2)]
        ragged = pictures[0][:, 5:50, 3:40]
        return tokenizer_golden(entry, [*pictures, ragged.contiguous()])
    pipeline = Pipeline.from_pretrained(folder)
    sample = easy_vqa_samples("test", limit=1)[0]
    segment = pipeline.encode_pictures([sample.picture])[0]
    answer = text_segment(pipeline.encode_text, sample.answer, target=True)
    document = (question_turn(pipeline.encode_text, sample.question, segment), Turn("assistant", (answer,)))
    return model_golden(entry, torch.from_numpy(encode_document(pipeline.layout, document).tokens))


def outputs_again(entry: Any, golden: dict[str, Tensor]) -> list[Tensor]:
    """What the tolerance is for: media decoded from the stored codes, log-probabilities of the stored stream."""
    if not hasattr(entry, "spec"):
        return [model_golden(entry, golden["tokens"])["logprobs"]]
    return entry.decode(Codes(golden["codes"], golden["lengths"], golden["sizes"]))


def measured_worst(entry: Any, golden: dict[str, Tensor]) -> float:
    """The worst absolute difference over ways of computing the outputs."""
    if hasattr(entry, "spec") and entry.spec.modality is Modality.TEXT:
        return 0.0
    stored = [golden["logprobs"]] if "logprobs" in golden else [golden[f"output.{i}"] for i in range(len(golden["codes"]))]
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
        write_golden(folder / "golden.safetensors", Golden(tensors, tolerance=max(10 * worst, 1e-5), notes=notes))
        check_zoo_entry(folder)
        print(f"{folder}: golden file written, worst difference {worst:.3g}")


if __name__ == "__main__":
    main()
