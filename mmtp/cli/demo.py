"""``mmtp demo``: the whole path on real pictures, in minutes, with a report at its end."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtp.eval.decoding import DecodingResult
    from mmtp.eval.generation import DrawingResult
    from mmtp.eval.report import Section
    from mmtp.eval.showcase import Contestant
    from mmtp.eval.vqa import VqaResult
    from mmtp.pipeline import Pipeline

PICTURES, TEXTS = "image-fsq-f8", "text-bpe-4k"
FRESH = "fresh"
CHAPTERS = 7
TOP_K = 20
"""Codes to draw with: small models leave some probability with thousands of codes that no picture has at that place."""


def demo(*, minutes: float = 4.0, out: Path = Path("runs/demo"), model: str = "vqa-s") -> int:
    """The whole path on real pictures and questions, in about ten minutes, offline.

    Turns the 5,000 pictures of easy-VQA into tokens, trains a small model on them with multi-token prediction (MTP), lets it
    answer questions and draw beside a model of the zoo that was trained for longer, decodes with and without MTP in turn, turns a
    shard back into pictures, and writes report.html. Run again with the same folder, it goes on where it stopped.

    The exit code is 1 if decoding with MTP gives other output than decoding without.

    Args:
        minutes: of training; the time for questions, drawings and decoding grows with it.
        out: folder for shards, the trained model, pictures and the report.
        model: the trained model to stand beside the fresh one.

    Examples:
        mmtp demo
        mmtp demo --minutes 1 --out /tmp/demo
    """
    from mmtp.cli import CHECK_FAILED
    from mmtp.types import MmtpError

    if minutes <= 0:
        raise MmtpError(f"--minutes {minutes:g}: a number above 0 is wanted")
    return 0 if Demo(minutes, out, model).run() else CHECK_FAILED


class Demo:
    """One run; every chapter shows what it does and leaves its part of the report.

    Args:
        minutes: of training. The other chapters get fixed parts of it.
        out: folder for everything.
        model: name of the model to compare with.
    """

    def __init__(self, minutes: float, out: Path, model: str) -> None:
        from rich.console import Console

        from mmtp.hub import from_pretrained

        self.minutes, self.out, self.model = minutes, out, model
        self.console = Console(highlight=False)
        # What is missing is better said now than minutes later.
        self.trained = from_pretrained(model)
        self.tokenizers: dict[str, Any] = {name: from_pretrained(name) for name in (PICTURES, TEXTS)}
        self.sections: list[Section] = []
        self.chapter = 0

    def run(self) -> bool:
        """Whether decoding with MTP gave the output of plain decoding throughout."""
        from mmtp.eval.showcase import Contestant

        with self._chapter("Pictures become tokens"):
            self.tokenize()
        with self._chapter("Tokens train a model"):
            result = self.train()
        pipelines = self.pipelines(result)
        with self._chapter("Questions about pictures that no model has seen"):
            answers = self.answer(pipelines)
        with self._chapter("Drawings from words"):
            drawings = self.draw(pipelines)
        with self._chapter("Several tokens per pass, the same output"):
            decoding = self.decode(pipelines)
        with self._chapter("Tokens become pictures again"):
            self.restore()
        contestants = [
            Contestant(name, sum(w.numel() for w in pipeline.model.parameters()), answers[name], drawings[name], decoding[name])
            for name, pipeline in pipelines.items()
        ]
        with self._chapter("What it came to"):
            self.report(contestants)
        return all(result.all_equal for result in decoding.values())

    def tokenize(self) -> None:
        """Chapter 1: shards of both splits, verified; and what the tokenizer loses."""
        from mmtp.cli.tables import count, progress_bar, show
        from mmtp.data.encode import TokenizeConfig
        from mmtp.data.job import tokenize
        from mmtp.data.verify import verify
        from mmtp.eval.generation import labelled_pictures
        from mmtp.eval.report import Table, Text
        from mmtp.eval.showcase import reconstructions
        from mmtp.types import MmtpError

        config = TokenizeConfig(tasks=("caption", "vqa", "draw"), questions_per_document=4)
        rows = []
        for split in ("train", "test"):
            with progress_bar(f"tokenizing the {split} pictures", "pictures") as bar:
                outcome = tokenize(
                    f"easy-vqa:{split}",
                    self.out / "tokens" / split,
                    tokenizer=PICTURES,
                    text=TEXTS,
                    config=config,
                    workers=None,
                    progress=lambda done, total, totals, bar=bar: bar(done, total, f"{count(totals.tokens)} tokens"),
                )
            verdict = verify(outcome.folder)
            if verdict.problems:
                raise MmtpError(f"{verdict.problems[0]} (remove {outcome.folder} and run again)")
            totals = outcome.totals
            rows.append([split, totals.ok, totals.quarantined, totals.rows, totals.tokens, f"{totals.bytes / 2**20:.1f} MiB", "every byte"])
        table = Table(["split", "pictures", "quarantined", "documents", "tokens", "shards", "verified"], rows)
        show(table.rich())
        codec = self.tokenizers[PICTURES]
        shown = [picture for _, picture in labelled_pictures("easy-vqa:test", 8)]
        words = (
            f"{PICTURES} turns a picture of 64 × 64 into {codec.num_tokens((64, 64))} codes of {codec.spec.codebook_sizes[0]:,} values; "
            "questions, answers and words become text tokens of the same stream. The model learns from the train split alone."
        )
        caption = "Test pictures, and what their codes give back."
        self.sections += [Text(words), table, reconstructions(shown, codec.decode(codec.encode(shown)), caption)]

    def train(self) -> Path:
        """Chapter 2: a small model from nothing."""
        from mmtp.cli.tables import show
        from mmtp.eval.report import Text
        from mmtp.eval.showcase import read_log, training_sections
        from mmtp.train.recipe import load_recipe, run_recipe

        folder = self.out / "train"
        settings = [f"run.max_minutes={float(self.minutes)}", "run.precision=auto"]
        recipe = load_recipe(Path(__file__).with_name("demo.toml"), settings)
        show(f"{self.minutes:g} minutes; losses in nats per token, by what is predicted (+1, +2, ...: drafts of later tokens)")
        result = run_recipe(recipe, folder, data_root=self.out)
        self.sections += [
            Text(f"A model of preset {recipe.model['preset']} from random weights, {self.minutes:g} minutes on this machine."),
            *training_sections(read_log(folder / "log.jsonl")),
        ]
        return result

    def pipelines(self, result: Path) -> "dict[str, Pipeline]":
        """Both models with the tokenizers."""
        from mmtp.hub import from_pretrained
        from mmtp.pipeline import Pipeline

        models = {FRESH: from_pretrained(result), self.model: self.trained}
        return {name: Pipeline(model, self.tokenizers) for name, model in models.items()}

    def answer(self, pipelines: "Mapping[str, Pipeline]") -> "dict[str, VqaResult]":
        """Chapter 3: as many test questions as time allows, the same for both, with controls."""
        from mmtp.cli.tables import progress_bar, show
        from mmtp.eval.report import Heading, Text
        from mmtp.eval.showcase import answer_gallery
        from mmtp.eval.vqa import easy_vqa_prior, easy_vqa_samples, evaluate

        samples, prior = easy_vqa_samples("test"), easy_vqa_prior()
        results: dict[str, VqaResult] = {}
        for name in reversed(list(pipelines)):  # the larger model first: it decides how many questions there is time for
            with progress_bar(f"{name} answers", "questions") as bar:
                limit = None if results else self._seconds(0.25)
                results[name] = evaluate(pipelines[name], samples, prior=prior, max_seconds=limit, progress=bar)
            samples = samples[: len(results[name].answers["picture"])]
        self.sections += [
            Text(
                f"{len(samples):,} test questions. Without the picture, or with another one, a model that looks falls to about the prior: "
                "the commonest answer to the same words in the training questions."
            ),
            answer_gallery(samples, results),
        ]
        for name in pipelines:
            table = results[name].table(f"{name}: answers right")
            show(table.rich())
            self.sections += [Heading(name, 3), table]
        return results

    def draw(self, pipelines: "Mapping[str, Pipeline]") -> "dict[str, DrawingResult]":
        """Chapter 4: every colour and shape, judged by a parser that is itself judged."""
        from mmtp.cli.tables import progress_bar, show
        from mmtp.decode.sample import Sampling
        from mmtp.eval.generation import evaluate, judge, labelled_pictures
        from mmtp.eval.report import Text
        from mmtp.eval.showcase import drawing_sections, judged_table

        real = labelled_pictures("easy-vqa:test", min(1000, max(50, round(100 * self.minutes))))
        with progress_bar("the parser reads real pictures", "pictures") as bar:
            parser = judge(real, progress=bar)
            ceiling = judge(real, self.tokenizers[PICTURES], progress=bar)
        tokens = self.tokenizers[PICTURES].num_tokens((64, 64)) + 16
        sampling, limit, results = Sampling(top_k=TOP_K), self._seconds(0.15), {}
        for name, pipeline in pipelines.items():
            with progress_bar(f"{name} draws", "pictures") as bar:
                results[name] = evaluate(pipeline, sampling=sampling, max_new_tokens=tokens, max_seconds=limit, progress=bar)
        table = judged_table(results, ceiling, parser)
        show(table.rich())
        words = f"Sampled at temperature 1 from the {TOP_K} most probable codes of each cell; one drawing for each seed."
        self.sections += [table, Text(words), *drawing_sections(results)]
        return results

    def decode(self, pipelines: "Mapping[str, Pipeline]") -> "dict[str, DecodingResult]":
        """Chapter 5: every prompt plainly and speculatively in turn, in the mode in which both run the same kernels."""
        from mmtp.cli.tables import progress_bar, show
        from mmtp.decode.drafts import HeadDrafts
        from mmtp.eval.decoding import compare, easy_vqa_prompts
        from mmtp.eval.showcase import decoding_sections
        from mmtp.pipeline import Pipeline

        results = {}
        for name in pipelines:
            pipeline = Pipeline(pipelines[name].model, self.tokenizers, exact=True, drafts=HeadDrafts())
            with progress_bar(f"{name} decodes both ways", "outputs") as bar:
                prompts = easy_vqa_prompts(pipeline, 200)
                results[name] = compare(pipeline.engine, prompts, max_seconds=self._seconds(0.15), progress=bar)
            table = results[name].table(f"{name}: plainly and with MTP in turn")
            show(table.rich(), results[name].acceptance_table("drafts that stood").rich())
        self.sections += decoding_sections(results)
        return results

    def restore(self) -> None:
        """Chapter 6: a shard of the test split back to pictures and words."""
        from itertools import islice

        from mmtp.cli.tables import progress_bar
        from mmtp.data.export import export
        from mmtp.data.loader import open_rows
        from mmtp.data.restore import Restorer
        from mmtp.eval.showcase import shard_sections

        shard = min((self.out / "tokens" / "test").glob("shard-*.arrow"))
        rows, layout = open_rows(shard)
        folder = self.out / "pictures"
        with progress_bar(f"decoding {shard.name}", "documents") as bar:
            written = export(rows, layout, folder, limit=500, progress=bar)
        self.console.print(f"{folder}: {written.pictures:,} pictures of {written.documents:,} documents")
        documents = list(Restorer(layout, self.tokenizers)(islice((rows[i] for i in range(len(rows))), 64)))
        self.sections += shard_sections(documents, folder)

    def report(self, contestants: "list[Contestant]") -> None:
        """Chapter 7: both models side by side, and the page."""
        from mmtp.cli.tables import show
        from mmtp.eval.report import write_report
        from mmtp.eval.showcase import comparison, summary_tiles

        table = comparison(contestants)
        show(table.rich())
        path = write_report(
            self.out / "report.html",
            "mmtp: any medium to tokens, and back",
            [summary_tiles(contestants[-1]), table, *self.sections],
            f"{contestants[-1].name} beside a model trained for {self.minutes:g} minutes on this machine, on easy-VQA.",
        )
        self.console.print(f"[bold]report: {path}[/bold]", soft_wrap=True)

    @contextmanager
    def _chapter(self, title: str) -> Iterator[None]:
        import time

        from mmtp.eval.report import Heading

        self.chapter += 1
        self.console.rule(f"[bold]{self.chapter} of {CHAPTERS}: {title}", align="left")
        began, before = time.monotonic(), len(self.sections)
        yield
        if len(self.sections) > before:
            self.sections.insert(before, Heading(title))
        self.console.print(f"[dim]{time.monotonic() - began:.0f} s[/dim]")

    def _seconds(self, share: float) -> float:
        """A part of the time for training, in seconds."""
        return 60 * self.minutes * share
