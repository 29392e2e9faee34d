import json

import pytest

from mmtp import cli


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
