from mmtp import cli, hub
from mmtp.models.presets import preset
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import VocabLayout


def test_a_model_leaves_and_what_differs_is_told(saved, tmp_path, capsys):
    layout = VocabLayout.of({name: hub.from_pretrained(folder) for name, folder in saved.items()}, max_dim=8)
    model: UnifiedModel = preset("tiny", layout).build()
    hub.save_pretrained(model, tmp_path / "model")
    argv = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--tokenizer", saved["text"], "--no-drafts"]
    assert cli.run(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"exported: {tmp_path / 'out'}"
    assert lines[1] == "note: positions of image codes have one axis there and several here; behind such codes, states differ"
    assert cli.run(argv) == cli.USER_ERROR
    assert capsys.readouterr().err == f"mmtp: error: {tmp_path / 'out'}: is not empty; give another folder\n"
    assert cli.run(["export", saved["image"], str(tmp_path / "other")]) == cli.USER_ERROR
    assert "is a ConvImageTokenizer; models are exported, not tokenizers" in capsys.readouterr().err
