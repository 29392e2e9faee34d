"""The demo's story as sections of a report: what became of pictures, of a training run, of two models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtp.data.restore import Restored
from mmtp.eval.decoding import DecodingResult
from mmtp.eval.generation import DrawingResult
from mmtp.eval.report import Cell, Heading, Pictures, Section, Table, Text, Tiles, lines
from mmtp.eval.vqa import ALL, OPEN, OTHER_PICTURE, WITH_PICTURE, WITHOUT_PICTURE, VqaResult, VqaSample
from mmtp.types import Modality


@dataclass
class Contestant:
    """A model and all that was measured of it.

    Attributes:
        name: what tables call it.
        parameters: how many it has.
        answers: of questions, with controls.
        drawings: of all colours and shapes.
        decoding: plain and speculative in turn, with the same kernels.
    """

    name: str
    parameters: int
    answers: VqaResult
    drawings: DrawingResult
    decoding: DecodingResult

    def figures(self) -> dict[str, Cell]:
        """The rows of the comparison."""
        counts = self.answers.counts
        pictures = self.decoding.of("picture")
        return {
            "parameters": f"{self.parameters / 1e6:.1f} M",
            "answers right": str(counts[WITH_PICTURE][ALL]),
            "answers right, not yes / no": str(counts[WITH_PICTURE][OPEN]),
            "… without a picture": str(counts[WITHOUT_PICTURE][ALL]),
            "… with another picture": str(counts[OTHER_PICTURE][ALL]),
            "questions asked": counts[WITH_PICTURE][ALL].total,
            "drawings right": str(self.drawings.count()),
            "drawings judged": len(self.drawings.drawings),
            "tokens per pass, pictures": f"{pictures.tokens_per_pass:.2f}",
            "speed with MTP, pictures": f"{pictures.speedup:.2f} ×",
            "MTP output equal to plain output": f"{sum(p.equal for p in self.decoding.pairs)} of {len(self.decoding.pairs)}",
        }


def comparison(contestants: Sequence[Contestant], caption: str = "") -> Table:
    """All figures of all models side by side."""
    columns = [c.figures() for c in contestants]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return Table(["", *(c.name for c in contestants)], rows, caption)


def summary_tiles(best: Contestant) -> Tiles:
    """The four numbers that matter most."""
    counts, pictures = best.answers.counts, best.decoding.of("picture")
    equal = sum(p.equal for p in best.decoding.pairs)
    return Tiles(
        [
            (str(counts[WITH_PICTURE][ALL]), "answers right", f"{counts[WITHOUT_PICTURE][ALL]} without the picture"),
            (str(best.drawings.count()), "drawings right", f"of {len(best.drawings.drawings)}, judged by a parser"),
            (f"{pictures.speedup:.2f} ×", "tokens per second", f"{pictures.tokens_per_pass:.1f} tokens per pass on pictures"),
            (f"{equal} of {len(best.decoding.pairs)}", "outputs equal", "several tokens per pass against one"),
        ]
    )


def reconstructions(pictures: Sequence[Tensor], outputs: Sequence[Tensor], caption: str) -> Pictures:
    """Pictures, each beside what its codes give back."""
    both = [p for pair in zip(pictures, outputs, strict=True) for p in pair]
    return Pictures(both, ["picture", "from tokens"] * len(pictures), caption, scale=1.2)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a training run."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_sections(records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Losses of the next token and of the drafts per modality, and the speed."""
    if not records:
        return [Text("The run was too short for a record.")]
    modalities = [m for m in Modality if any(str(m) in r for r in records)]

    def curve(key: str) -> tuple[list[int], list[float]]:
        found = [r for r in records if key in r]
        return [r["step"] for r in found], [r[key] for r in found]

    sections: list[Section] = [
        lines(
            {str(m): curve(str(m)) for m in modalities},
            "step",
            "nats per token",
            "Cross-entropy of the next token, by what is predicted.",
            log_y=True,
        )
    ]
    for modality in modalities:
        keys = sorted({k for r in records for k in r if k.startswith(f"{modality}+") and not k.endswith("accuracy")})
        if keys:
            series = {"next": curve(str(modality)), **{f"+{k.partition('+')[2]}": curve(k) for k in keys}}
            caption = f"{modality}: the next token, and drafts of the tokens after it."
            sections.append(lines(series, "step", "nats per token", caption, log_y=True))
    last = records[-1]
    sections.append(Text(f"{last['step']:,} steps, {last['tokens_per_second']:,.0f} tokens per second at the end."))
    return sections


def answer_gallery(samples: Sequence[VqaSample], contestants: Mapping[str, VqaResult], count: int = 12) -> Pictures:
    """Questions about pictures that no model has seen, with what each answered."""
    shown: dict[str, int] = {}
    asked = min(len(result.answers[WITH_PICTURE]) for result in contestants.values())
    for i, sample in enumerate(samples[:asked]):
        shown.setdefault(sample.key, i)
    chosen = list(shown.values())[:count]
    labels, good = [], []
    for i in chosen:
        given = {name: result.answers[WITH_PICTURE][i].strip() for name, result in contestants.items()}
        labels.append(f"{samples[i].question} " + ", ".join(f"{name}: {answer}" for name, answer in given.items()))
        good.append(all(answer == samples[i].answer for answer in given.values()))
    caption = "Test pictures and questions with the answers. A red frame: at least one model is wrong."
    return Pictures([samples[i].picture for i in chosen], labels, caption, scale=2.0, good=good)


def decoding_sections(results: Mapping[str, DecodingResult]) -> list[Section]:
    """Plain and speculative decoding per model."""
    sections: list[Section] = []
    caption = "One prompt at a time, plainly and with MTP in turn: same cache, same kernels. Speed is the median ratio over prompts."
    for name, result in results.items():
        sections += [
            Heading(name, 3),
            result.table(caption),
            result.acceptance_figure("Share of drafts that stood, by modality and by how far ahead they looked."),
            result.acceptance_table(),
        ]
    return sections


def judged_table(results: Mapping[str, DrawingResult], ceiling: DrawingResult, parser: DrawingResult) -> Table:
    """Shares of right pictures: real ones, the same through a tokenizer, and drawn ones."""
    judged = {"real test pictures": parser, "the same through the tokenizer and back": ceiling}
    judged |= {f"drawn by {name}": result for name, result in results.items()}
    return Table(
        ["what the parser judged", "pictures", "right"],
        [[what, len(result.drawings), str(result.count())] for what, result in judged.items()],
        "A drawing is right if there is one object, of the shape and colour that the words ask for.",
    )


def drawing_sections(results: Mapping[str, DrawingResult]) -> list[Section]:
    """Drawings per model."""
    sections: list[Section] = []
    for name, result in results.items():
        pictures = result.pictures("One of each. A red frame: the parser reads something else.", limit=24)
        sections += [Heading(name, 3), pictures, result.table()]
    return sections


def shard_sections(documents: Sequence[Restored], folder: Path) -> list[Section]:
    """Documents of a shard, decoded: pictures, and streams in words."""
    pictures = {d.row.meta.get("input", d.row.key): p.value for d in documents for p in d.parts if isinstance(p.value, Tensor)}
    rows = [[" / ".join(d.transcript.splitlines())] for d in documents[:8]]
    caption = f"The first pictures of a shard, decoded from their tokens. More are in {folder}."
    return [
        Pictures(list(pictures.values()), (), caption, scale=1.2),
        Table(["documents of this shard, in words"], rows),
    ]
