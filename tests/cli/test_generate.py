import io
import json
import shutil
import sys

import pytest
import torch

from mmtp import cli, hub
from mmtp.decode.sample import Sampling
from mmtp.pipeline import Pipeline


def test_answers_take_the_form_that_is_asked_for(little_zoo, tmp_path, capsys):
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    form = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"], "additionalProperties": False}
    schema.write_text(json.dumps(form))
    for given in (str(schema), schema.read_text()):
        assert cli.run(["generate", "vqa-s", "is it red?", "--json-schema", given]) == 0
        assert json.loads(capsys.readouterr().out).keys() == {"red"}
    assert cli.run(["generate", "vqa-s", "what is it?", "--regex", "circle|triangle", "--n", "3", "--report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(lines[:3]) <= {"circle", "triangle"} and any("forced" in line for line in lines)


def test_an_answer_that_is_cut_is_told(little_zoo, capsys):
    pytest.importorskip("llguidance")
    argv = ["generate", "vqa-s", "count", "--regex", "[0-9]{30}", "--max-new-tokens", "5", "--n", "2"]
    assert cli.run(argv) == cli.CHECK_FAILED
    shown = capsys.readouterr()
    assert all(len(line) == 5 and line.isdigit() for line in shown.out.splitlines())
    assert shown.err == "mmtp: 2 of 2 answers lack the end of their form: cut at 5 tokens; raise --max-new-tokens\n"


def test_a_form_that_cannot_be_met_is_one_line(little_zoo, capsys):
    pytest.importorskip("llguidance")
    assert cli.run(["generate", "vqa-s", "x", "--regex", "(a"]) == cli.USER_ERROR
    assert capsys.readouterr().err == "mmtp: error: regex '(a': unclosed group\n"
    assert cli.run(["generate", "vqa-s", "x", "--json-schema", "none.json"]) == cli.USER_ERROR
    assert capsys.readouterr().err == "mmtp: error: none.json: No such file or directory\n"


def test_tokenizers_that_the_zoo_does_not_know_are_named(little_zoo, tmp_path, saved, capsys):
    for name in ("image-fsq-f8", "text-bpe-4k"):
        shutil.move(little_zoo / "tokenizers" / name, tmp_path / f"{name}-elsewhere")
    argv = ["generate", "vqa-s", "what is it?", "--max-new-tokens", "5"]
    assert cli.run(argv) == cli.USER_ERROR
    assert "vqa-s: its tokenizer 'text-bpe-4k' is not in the zoo; name its folder with --tokenizer" in capsys.readouterr().err
    argv += ["--tokenizer", str(tmp_path / "image-fsq-f8-elsewhere")]
    named = ["--tokenizer", str(tmp_path / "image-fsq-f8-elsewhere"), "--tokenizer", str(tmp_path / "text-bpe-4k-elsewhere")]
    for verb in (
        argv[:5],
        ["eval", "vqa", "vqa-s", "--limit", "1", "--no-controls"],
        ["bench", "decode", "vqa-s", "--prompts", "2", "--temperature", "0"],
    ):
        assert cli.run([*verb, *named]) == 0
    capsys.readouterr()
    assert cli.run([*argv, "--tokenizer", saved["text"]]) == cli.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    prints = [hub.from_pretrained(tmp_path / f"{name}-elsewhere").spec.fingerprint for name in ("text-bpe-4k", "image-fsq-f8")]
    has = f"mmtp: error: tokenizer {saved['text']}: has fingerprint {hub.from_pretrained(saved['text']).spec.fingerprint}; "
    assert line == has + f"vqa-s was trained with text-bpe-4k ({prints[0]}), image-fsq-f8 ({prints[1]})"
    assert cli.run([*argv, "--tokenizer", "vqa-s"]) == cli.USER_ERROR
    assert "tokenizer vqa-s: is a UnifiedModel, not a tokenizer; vqa-s was trained with" in capsys.readouterr().err


class Terminal(io.StringIO):
    """Standard output that remembers what had been written whenever it was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def flush(self) -> None:
        self.seen.append(self.getvalue())


@pytest.mark.parametrize("plain", [[], ["--plain"]], ids=["drafts", "plain"])
def test_words_are_printed_as_they_come_and_variants_are_those_of_their_seeds(little_zoo, monkeypatch, plain):
    monkeypatch.setattr(sys, "stdout", Terminal())
    argv = ["generate", "vqa-s", "what is it?", "--n", "3", "--seed", "5", "--max-new-tokens", "12", "--exact", *plain]
    assert cli.run(argv) == 0
    pipeline = Pipeline.from_pretrained("vqa-s", exact=True)
    replies = [pipeline.reply("what is it?", sampling=Sampling(seed=seed), max_new_tokens=12) for seed in (5, 6, 7)]
    spoken = [words for reply in replies if (words := pipeline.text(reply))]
    shown = sys.stdout.getvalue()
    assert len(spoken) > 1 and shown.startswith("".join(words + "\n" for words in spoken))
    first = [seen for seen in sys.stdout.seen if seen and spoken[0].startswith(seen)]
    assert len(set(first)) > 2  # in steps, each beginning the reply


def test_passes_may_be_compiled_or_not_in_either_precision(little_zoo, monkeypatch, capsys):
    pipelines, built = [], Pipeline.__init__
    monkeypatch.setattr(Pipeline, "__init__", lambda self, *args, **how: (built(self, *args, **how), pipelines.append(self))[0])
    for flags, compiled, dtype in (
        ([], True, torch.float32),
        (["--no-compile"], False, torch.float32),
        (["--precision", "bfloat16"], True, torch.bfloat16),
        (["--precision", "bfloat16", "--no-compile"], False, torch.bfloat16),
    ):
        assert cli.run(["generate", "vqa-s", "what is it?", "--max-new-tokens", "8", *flags]) == 0
        made = pipelines.pop()
        assert made.engine.chooser.compiled == compiled and made.model.unembedding.weight.dtype == dtype
    assert cli.run(["generate", "vqa-s", "what is it?", "--device", "nowhere"]) == cli.USER_ERROR
    assert "--device nowhere: cannot be used here" in capsys.readouterr().err
