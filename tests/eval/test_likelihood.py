"""What is summed over a data set is what the model says of its documents one by one."""

import json
import math

import pytest
import torch
from PIL import Image

from mmtp import cli
from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.data.loader import ShardDataset
from mmtp.eval.likelihood import evaluate_likelihood
from mmtp.hub import save_pretrained
from mmtp.models.presets import preset
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.text import TextTokenizer
from mmtp.types import Modality


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(7):
        Image.new("RGB", (16 + 8 * (i % 3), 16), (40 * i, 90, 10 * i)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    words = TextTokenizer.train(["picture of blocks"] * 4, 280)
    torch.manual_seed(0)
    codec = ConvImageTokenizer.Config(patch=4, widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1)).build().eval()
    tokenize(pictures, folder / "data", tokenizer=codec, text=words, config=TokenizeConfig(tasks=("caption",)))
    dataset = ShardDataset(folder / "data")
    torch.manual_seed(0)
    return folder, dataset, preset("tiny", dataset.layout).build().eval()


def test_sums_are_those_of_the_documents(world):
    _, dataset, model = world
    found = evaluate_likelihood(model, [dataset])
    grammar, nats, right, number = StreamGrammar(dataset.layout), 0.0, 0, 0
    for row in dataset:
        batch = collate([(row.tokens, row.target_mask)], grammar, 64)
        state = model(batch)[0][0]
        for place in range(1, len(row.tokens)):
            slot = dataset.layout.slots[batch.slots[0, place]]
            if not row.target_mask[place] or slot.size == 1:
                continue
            legal = [i for lo, hi in slot.generable for i in range(lo, hi)]
            scores = (model.unembedding.weight[legal] @ state[place - 1]).log_softmax(0)
            nats -= float(scores[legal.index(int(row.tokens[place]))])
            right += int(legal[int(scores.argmax())] == row.tokens[place])
            number += 1
    assert found.documents == 7 and {key[0] for key in found.targets} == {Modality.TEXT}
    assert found.targets[Modality.TEXT, 0] == number and found.correct[Modality.TEXT, 0] == right
    assert found.nats[Modality.TEXT, 0] == pytest.approx(nats, rel=1e-4)
    assert found.mean() == pytest.approx(nats / number, rel=1e-4)
    assert 0 < found.overlap[Modality.TEXT, 1] < found.targets[Modality.TEXT, 1]
    with_pictures = evaluate_likelihood(model, [dataset], inputs=("image",))
    codes = sum(math.prod(row.meta["size"]) // 64 for row in dataset)
    assert with_pictures.targets[Modality.IMAGE, 0] == codes


def test_the_command_shows_every_offset(world, capsys):
    folder, dataset, model = world
    save_pretrained(model, folder / "model")
    path = folder / "loss.json"
    assert cli.run(["eval", "loss", str(folder / "model"), "--data", str(dataset.folder), "--inputs", "image", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "image +1" in shown and "text +2" in shown
    values = json.loads(path.read_text())["targets"]
    assert values["image"]["nats"] > 1 and "acceptance" in values["image +1"]
    assert cli.run(["eval", "loss", str(folder / "model")]) == 2
    assert "name data sets of mmtp tokenize with --data" in capsys.readouterr().err
