"""Compares speculative with plain decoding on many prompts, token for token: ``python scripts/check_equality.py vqa-s --prompts 1000``.

Prompts ask for easy-VQA's pictures and answers; with --data they are the beginnings of its documents, up to what a model is to write, each
with a seed of its own, and the new tokens are as many as the document has. All passes are exact (:class:`mmtp.decode.engine.Engine`), with
drafts judged by coupling: the only way that promises equal tokens. Plain decoding is run once for each task, temperature and scale of
guidance, at the greatest batch; every way of drafting, and plain decoding itself, is compared with that at every batch. Batches are
continuous: rows join as others leave, and share what their prompts begin with. Rows of batch 1 share nothing.

A line per comparison as it ends; exit status 1 where any stream differs, with the first prompt and offset. With --journal FILE what was
found is kept, and the same command goes on where it was ended; another model or other prompts begin anew.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmtp.cli.sampling import device_of, drafts_of
from mmtp.cli.tables import progress_bar
from mmtp.data.loader import ShardDataset
from mmtp.decode.batcher import SHARED
from mmtp.decode.engine import Engine
from mmtp.decode.rows import Request, Row
from mmtp.decode.sample import Sampling
from mmtp.eval.decoding import Prompt, easy_vqa_prompts, held_out_prompts
from mmtp.hub import from_pretrained
from mmtp.models.unified import UnifiedModel
from mmtp.pipeline import Pipeline
from mmtp.types import Modality

WAYS = ("auto", "head", "ngrams", "jacobi", "head+jacobi", "lookup")
PLAIN = "none"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What plain decoding is run once for.

    Attributes:
        task: kind of the prompts.
        temperature: of sampling.
        guidance: its scale; 1 is off.
    """

    task: str
    temperature: float
    guidance: float


@dataclass(frozen=True, kw_only=True)
class Plain:
    """What plain decoding gave.

    Attributes:
        setting: with which.
        modality: of most new tokens.
        tokens: whole streams, by prompt.
    """

    setting: Setting
    modality: str
    tokens: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One way of drafting beside plain decoding.

    Attributes:
        setting: of both.
        modality: of most new tokens.
        drafts: where they come from; ``none`` is plain decoding at another batch.
        batch: rows at a time.
        prompts: compared.
        equal: of these.
        seconds: that this way took.
        first: where the first difference is; empty without any.
    """

    setting: Setting
    modality: str
    drafts: str
    batch: int
    prompts: int
    equal: int
    seconds: float
    first: str = ""

    def line(self) -> str:
        """A row of the table."""
        task, temperature, guidance = astuple(self.setting)
        cells = self.modality, task, self.drafts, f"{temperature:g}", "off" if guidance == 1 else f"{guidance:g}", self.batch
        return "| " + " | ".join(map(str, (*cells, self.prompts, self.equal, f"{self.seconds:.0f}"))) + " |"


HEAD = "| modality | task | drafts | temperature | guidance | batch | prompts | equal | seconds |\n|---|---|---|--:|--:|--:|--:|--:|--:|"


class Journal:
    """What was found, a line of JSON each, so that it is found once.

    Args:
        path: of the file; None keeps nothing.
        key: of what is examined; lines of another are passed over.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.lines: list[dict[str, Any]] = []
        if path is not None and path.exists():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]  # an end of the process while a line is written leaves half of one
            if whole != text:
                path.write_text(whole)
            self.lines = [line for line in map(json.loads, whole.splitlines()) if line["key"] == key]

    def recall(self, kind: type[Any], **values: Any) -> Any | None:
        """A finding of a kind with these values."""
        for line in self.lines:
            found = line.get(kind.__name__)
            if found is not None and all(found[name] == value for name, value in values.items()):
                return kind(**{**found, "setting": Setting(**found["setting"])})
        return None

    def keep(self, found: Any) -> None:
        """Writes down a finding."""
        line = {"key": self.key, type(found).__name__: asdict(found)}
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class Check:
    """Decodes the prompts of a model.

    Args:
        model: in float32.
        prompts: of all tasks.
        seed: of the first prompt of a task; those of the others count up.
        compile: run passes by compiled kernels.
    """

    def __init__(self, model: UnifiedModel, prompts: Sequence[Prompt], seed: int = 0, compile: bool = False) -> None:
        self.model, self.seed, self.compile = model, seed, compile
        self.tasks: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            self.tasks.setdefault(prompt.kind, []).append(prompt)
        self._vectors = {task: self._read(some) for task, some in self.tasks.items()}

    @torch.no_grad()
    def _read(self, prompts: Sequence[Prompt]) -> list[Any]:
        device = self.model.unembedding.weight.device
        return [None if p.features is None else self.model.embedding.connect(p.features.to(device), p.feature_grids) for p in prompts]

    @property
    def key(self) -> str:
        """Digest of weights, prompts, seeds and kernels."""
        digest = hashlib.sha256(repr(self.model.config).encode())
        for tensor in self.model.state_dict().values():
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        for some in self.tasks.values():
            digest.update(repr([(p.kind, list(p.tokens), p.max_new_tokens, tuple(p.stop)) for p in some]).encode())
        device = self.model.unembedding.weight.device.type
        return digest.hexdigest()[:16] + f"-{self.seed}" + "-compiled" * self.compile + f"-{device}" * (device != "cpu")

    def decode(self, setting: Setting, drafts: str, batch: int) -> list[Row]:
        """Goes on from all prompts of a task."""
        way = None if drafts == PLAIN else drafts_of(drafts)
        engine = Engine(self.model, exact=True, draft_cost=0, drafts=way, compile=self.compile)  # all drafts, that there is much to verify
        prompts = self.tasks[setting.task]
        batcher = engine.batcher(
            max_lanes=batch * (2 if setting.guidance != 1 else 1),
            context=max(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts),
            shared=SHARED if batch > 1 else None,
            speculative=drafts != PLAIN,
        )
        base = Sampling(temperature=setting.temperature, guidance=setting.guidance)
        rows = [
            batcher.submit(
                Request(
                    prefix=prompt.tokens,
                    sampling=replace(base, seed=self.seed + i),
                    max_new_tokens=prompt.max_new_tokens,
                    stop=prompt.stop,
                    vectors=vectors,
                )
            )
            for i, (prompt, vectors) in enumerate(zip(prompts, self._vectors[setting.task], strict=True))
        ]
        ended = 0
        title = f"{setting.task}, drafts {drafts}, temperature {setting.temperature:g}, guidance {setting.guidance:g}, batch {batch}"
        with progress_bar(title, "prompts") as bar:
            while batcher.busy:
                ended += len(batcher.step())
                bar(ended, len(rows))
        return rows

    def plain(self, setting: Setting, batch: int) -> Plain:
        """Plain decoding, with which the others are compared."""
        rows = self.decode(setting, PLAIN, batch)
        slots = self.model.config.layout.slots
        media = Counter(slots[slot].modality for row in rows for slot in row.slots[row.prompt_length :])
        return Plain(setting=setting, modality=str(media.most_common(1)[0][0]), tokens=[row.tokens for row in rows])

    def compare(self, plain: Plain, drafts: str, batch: int) -> Comparison:
        """A way of drafting beside it."""
        began = time.perf_counter()
        found = [row.tokens for row in self.decode(plain.setting, drafts, batch)]
        seconds = time.perf_counter() - began
        pairs = list(zip(plain.tokens, found, strict=True))
        other = next((i for i, (one, two) in enumerate(pairs) if one != two), None)
        return Comparison(
            setting=plain.setting,
            modality=plain.modality,
            drafts=drafts,
            batch=batch,
            prompts=len(found),
            equal=sum(one == two for one, two in pairs),
            seconds=seconds,
            first="" if other is None else f"prompt {other}, offset {_offset(*pairs[other])}",
        )


def _offset(one: Sequence[int], other: Sequence[int]) -> str:
    """Where two streams part, and with what."""
    both = zip([*one, None], [*other, None], strict=False)
    place, (wanted, found) = next((i, pair) for i, pair in enumerate(both) if pair[0] != pair[1])
    return f"{place}: token {'the end' if found is None else found}, plainly {'the end' if wanted is None else wanted}"


def run(
    check: Check,
    journal: Journal,
    ways: Sequence[str],
    temperatures: Sequence[float],
    guidances: Sequence[float],
    batches: Sequence[int],
    tell: Callable[[str], None],
) -> list[Comparison]:
    """All comparisons, those of the journal among them. Text is not guided: scales other than 1 are of media alone."""
    found: list[Comparison] = []
    for task in check.tasks:
        for temperature in temperatures:
            for guidance in guidances:
                setting = Setting(task=task, temperature=temperature, guidance=guidance)
                if guidance != 1 and any(c.setting.task == task and c.modality == Modality.TEXT for c in found):
                    continue
                plain = journal.recall(Plain, setting=asdict(setting))
                if plain is None:
                    journal.keep(plain := check.plain(setting, max(batches)))
                for way, batch in [(way, batch) for batch in batches for way in (PLAIN, *ways)]:
                    if way == PLAIN and batch == max(batches):
                        continue
                    known = journal.recall(Comparison, setting=asdict(setting), drafts=way, batch=batch)
                    found.append(known or check.compare(plain, way, batch))
                    if known is None:
                        journal.keep(found[-1])
                    tell(found[-1].line())
    return found


def load(given: argparse.Namespace) -> tuple[UnifiedModel, list[Prompt]]:
    """The model and its prompts."""
    model = from_pretrained(given.model).eval().to(device_of(given.device), getattr(torch, given.precision))
    if not given.data:
        return model, easy_vqa_prompts(Pipeline.from_pretrained(given.model), 2 * given.prompts)
    datasets = [ShardDataset(path).over(model.config.layout) for path in given.data]
    return model, held_out_prompts(datasets, given.prompts, max_new_tokens=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table.

    Args:
        argv: arguments; those of the process where none are given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="zoo entry, folder or Hub id")
    parser.add_argument("--data", type=Path, nargs="+", help="data sets of mmtp tokenize")
    parser.add_argument("--prompts", type=int, default=100, help="of each task")
    parser.add_argument("--drafts", nargs="+", help=f"as of mmtp generate; default those of {' '.join(WAYS)} that the model has")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0], help="1 is off; other scales are of media alone")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="run passes by compiled kernels (see mmtp generate --compile)")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, cuda:N")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--journal", type=Path, help="file that keeps what was found")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    check = Check(*load(given), seed=given.seed, compile=given.compile)
    ways = given.drafts or [way for way in WAYS if way != "ngrams" or check.model.ngrams is not None]
    print(HEAD)
    found = run(
        check,
        Journal(given.journal, check.key),
        ways,
        given.temperature,
        sorted(given.guidance, key=lambda scale: scale != 1),
        given.batch,
        lambda line: print(line, flush=True),
    )
    for comparison in found:
        if comparison.first:
            task, temperature, guidance = astuple(comparison.setting)
            where = f"{task}, drafts {comparison.drafts}, temperature {temperature:g}, guidance {guidance:g}, batch {comparison.batch}"
            print(f"{where}: {comparison.first}", file=sys.stderr)
    return int(any(comparison.first for comparison in found))


if __name__ == "__main__":
    sys.exit(main())
