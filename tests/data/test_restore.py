from pathlib import Path

import numpy as np
import pytest
import torch

from mmtp import hub
from mmtp.data.encode import TokenizeConfig
from mmtp.data.errors import DataError
from mmtp.data.export import export
from mmtp.data.job import tokenize
from mmtp.data.loader import ShardDataset
from mmtp.data.media import read_image, to_uint8
from mmtp.data.restore import Restorer, load_tokenizers
from mmtp.stream.vocab import MediaEntry, VocabLayout
from mmtp.testing.fakes import BlockTokenizer
from mmtp.types import Modality


@pytest.fixture
def dataset(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> ShardDataset:
    config = TokenizeConfig(tasks=("vqa", "draw"), questions_per_document=2)
    tokenize(pictures, tmp_path / "out", tokenizer=tokenizers["image"], text=tokenizers["text"], config=config)
    return ShardDataset(tmp_path / "out")


def test_documents_come_back(dataset: ShardDataset, pictures: Path, tokenizers: dict[str, Path]) -> None:
    restorer = Restorer(dataset.layout, load_tokenizers(dataset.layout, tokenizers.values()))
    documents = {d.row.key: d for d in restorer(dataset)}
    assert list(documents) == [row.key for row in dataset]
    document = documents["b/05.png#0"]
    assert document.transcript == ("user: <image 3x2> is there a circle?\nassistant: yes\nuser: what color is the shape?\nassistant: red")
    assert documents["b/05.png#2"].transcript == "user: draw a red circle\nassistant: <image 3x2>"
    tokenizer = hub.from_pretrained(tokenizers["image"])
    wanted = tokenizer.decode(tokenizer.encode([read_image(pictures / "b/05.png")]))[0]
    value = document.parts[0].value
    assert value.shape == (3, 24, 16)
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)  # batches of other sizes: sums in another order
    assert [(p.modality, p.role) for p in document.parts[:3]] == [
        (Modality.IMAGE, "user"), (Modality.TEXT, "user"), (Modality.TEXT, "assistant"),
    ]  # fmt: skip


def test_without_tokenizers_codes_stay_codes(dataset: ShardDataset) -> None:
    (document,) = Restorer(dataset.layout, {})([dataset[0]])
    assert document.parts[0].value is None
    assert document.parts[0].codes.shape == (1, 2, 2)
    assert document.transcript.startswith("user: <image 2x2> text ")


def test_other_tokenizers_are_refused(dataset: ShardDataset, tokenizers: dict[str, Path], tmp_path: Path, block_registered: None) -> None:
    with pytest.raises(DataError, match="tokenizer 'txt' is not in the zoo; name its folder with --tokenizer"):
        load_tokenizers(dataset.layout, [tokenizers["image"]])
    other = BlockTokenizer.Config(block=2, levels=7).build()
    folder = hub.save_pretrained(other, tmp_path / "other")
    message = (
        rf"name the folder with fingerprint [0-9a-f]+ with --tokenizer; .*other is not it: it has fingerprint {other.spec.fingerprint}$"
    )
    with pytest.raises(DataError, match=message):
        load_tokenizers(dataset.layout, [tokenizers["image"], folder])
    assert load_tokenizers(dataset.layout, needed=False) == {}
    stranger = VocabLayout(None, (MediaEntry(Modality.IMAGE, str(tokenizers["image"]), "0123", (625,)),))
    with pytest.raises(DataError, match=r"img': the data were made with fingerprint 0123, the one of that name has [0-9a-f]{16}; name the"):
        load_tokenizers(stranger)


def test_export_writes_each_medium_once(dataset: ShardDataset, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    calls: list[tuple[int, int]] = []
    written = export(dataset, dataset.layout, tmp_path / "files", tokenizers=tokenizers.values(), progress=lambda *a: calls.append(a))
    assert (written.documents, written.pictures, written.sounds) == (len(dataset), 24, 0)
    assert calls[-1] == (len(dataset), len(dataset))
    names = sorted(p.name for p in (tmp_path / "files").iterdir())
    assert names[:2] == ["a_00.png", "a_02.png"]
    assert {"contact-sheet.png", "documents.txt"} < set(names)
    assert len(names) == 24 + 2
    assert (
        (tmp_path / "files/documents.txt").read_text().startswith("# a/00.png#0\nuser: <image 2x2> is there a circle?\nassistant: yes\n\n")
    )
    sheet = read_image(tmp_path / "files/contact-sheet.png")
    first = read_image(tmp_path / "files/a_00.png")
    np.testing.assert_array_equal(to_uint8(sheet[:, 2:18, 2:18]), to_uint8(first))
    assert export(dataset, dataset.layout, tmp_path / "few", tokenizers=tokenizers.values(), limit=3).documents == 3


def test_keys_cannot_leave_the_folder(tmp_path: Path, pictures: Path, tokenizers: dict[str, Path]) -> None:
    manifest = pictures / "list.jsonl"
    keys = ["../../up", "/etc/passwd", "", "a/b", "a_b", "A_B", "x" * 300]
    manifest.write_text("".join(f'{{"path": "a/{2 * i:02d}.png", "key": "{key}"}}\n' for i, key in enumerate(keys)))
    tokenize(manifest, tmp_path / "out", tokenizer=tokenizers["image"])
    dataset = ShardDataset(tmp_path / "out")
    export(dataset, dataset.layout, tmp_path / "deep/er/files", tokenizers=[tokenizers["image"]])
    names = {p.name for p in (tmp_path / "deep/er/files").glob("*.png")} - {"contact-sheet.png"}
    assert names == {"up.png", "etc_passwd.png", "item.png", "a_b.png", "a_b-2.png", "A_B-3.png", "x" * 100 + ".png"}


def test_unwritable_folder(dataset: ShardDataset, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: cannot be written \(File exists\); make room, or choose another --out"):
        export(dataset, dataset.layout, tmp_path / "file", tokenizers=tokenizers.values())
