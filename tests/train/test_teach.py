import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtp.config import ConfigError
from mmtp.data.errors import DataError
from mmtp.data.loader import ShardDataset
from mmtp.data.teacher_cache import JOURNAL, PictureCache, WordCache, pictures, words
from mmtp.hub import from_pretrained
from mmtp.models.language import LanguageConfig, LanguageTeacher
from mmtp.models.teachers import Teacher, TeacherConfig
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.words import is_text, speeches
from mmtp.tokenizers.text import bytes_of_tokens
from mmtp.train.teach import code_grids, teach, teacher_config
from mmtp.types import Codes
from tests.train.conftest import teachers

CPU = torch.device("cpu")


def test_pictures_are_seen_as_their_tokenizer_gives_them_back(taught: Path) -> None:
    dataset = ShardDataset(taught / "shards")
    cache, grammar = PictureCache(dataset, "eye"), StreamGrammar(dataset.layout)
    teacher, tokenizer = Teacher(teachers(taught)[0], Path(), CPU), from_pretrained(taught / "cells")
    for index in (0, 3, 20):
        (picture,) = pictures(dataset[index].tokens, grammar)
        offsets, features = cache.features(index)
        assert offsets.tolist() == list(range(picture.span.body_start, picture.span.end - 1))
        grid = picture.codes.shape[1:]
        decoded = tokenizer.decode(Codes(torch.from_numpy(picture.codes)[None], torch.tensor([grid])))[0]
        wanted = teacher.features(decoded[None] * 2 - 1, grid)[0]
        torch.testing.assert_close(torch.from_numpy(features).float(), wanted, rtol=2e-3, atol=2e-3)


def test_words_are_weighed_where_both_tokenizers_have_read_the_same(taught: Path) -> None:
    """Every kept number is what a plain pass of the teacher gives to the token of the same bytes, after the same bytes."""
    dataset = ShardDataset(taught / "shards")
    cache, text = WordCache(dataset, "tongue"), from_pretrained(taught / "words")
    teacher = LanguageTeacher(teachers(taught)[1], CPU)
    theirs = bytes_of_tokens(teacher.backend)
    for index in (0, 1, 2):
        tokens = dataset[index].tokens
        offsets, ids, log_probs = cache.distributions(index)
        said = speeches(words(tokens, dataset.layout)[1], dataset.layout)
        runs = [b"".join(text.pieces(run)) for speech in said for run in speech.runs]
        reading = teacher.read(said, runs)
        log_all = teacher._model(input_ids=torch.tensor([reading.ids])).logits[0].log_softmax(1)
        places = np.flatnonzero(is_text(tokens, dataset.layout))
        before, heard = 0, []
        for run, span in zip((run for speech in said for run in speech.runs), reading.runs, strict=True):
            starts = [len(b"".join(theirs[i] for i in reading.ids[span.start : j])) for j in range(span.start, span.stop)]
            for number in range(len(run)):
                done = len(b"".join(text.pieces(run[:number])))
                if done in starts:
                    heard.append((places[before + number], log_all[span.start + starts.index(done) - 1]))
            before += len(run)
        assert offsets.tolist() == [offset for offset, _ in heard] and len(heard) >= 3
        for (_, wanted), chosen, values in zip(heard, ids, log_probs, strict=True):
            for id_, value in zip(chosen.tolist(), values, strict=True):
                same = [i for i, data in theirs.items() if data == text.pieces([id_])[0]]
                assert any(abs(wanted[i].item() - float(value)) < 0.02 for i in same)
            assert (np.diff(values.astype(np.float32)) <= 0).all()


def test_equal_questions_and_pictures_are_asked_about_once(taught: Path) -> None:
    dataset = ShardDataset(taught / "shards")
    records = [record for cache in (PictureCache(dataset, "eye"), WordCache(dataset, "tongue")) for record in cache.records.values()]
    assert len(dataset) == 72 and len(records) == 6
    assert [record.rows for record in records[3:]] == [4, 4, 4]  # two colours, no circle, and what is to be drawn
    assert all(record.rows <= 12 for record in records[:3])


def test_goes_on_where_it_was_stopped_and_refuses_another_teacher(taught: Path, tmp_path: Path) -> None:
    shutil.copytree(taught / "shards", tmp_path / "shards")
    names, (eye, tongue) = [taught / "cells", taught / "words"], teachers(taught)
    for teacher, name in ((eye, "eye"), (tongue, "tongue")):
        folder = tmp_path / "shards" / "teachers" / name
        before = {path.name: path.read_bytes() for path in folder.glob("*.arrow")}
        (folder / "shard-00001.arrow").unlink()
        journal = folder / JOURNAL
        journal.write_bytes(journal.read_bytes()[:-20])  # the last line is torn off
        calls: list[tuple[int, int]] = []
        found = teach(tmp_path / "shards", teacher, tokenizers=names, progress=lambda done, total, calls=calls: calls.append((done, total)))
        assert (found.made, calls) == (2, [(2, 3), (3, 3)])
        assert {path.name: path.read_bytes() for path in folder.glob("*.arrow")} == before
    with pytest.raises(DataError, match="tongue: was made by a teacher with fingerprint [0-9a-f]+, now [0-9a-f]+; remove .*tongue"):
        teach(tmp_path / "shards", teachers(taught, top=9)[1], tokenizers=names)


def test_scales_have_grids_of_their_own() -> None:
    assert list(code_grids((), (3, 4))) == [(3, 4)]
    assert list(code_grids((1, 2, 3), (1, 14))) == [(1, 1), (2, 2), (3, 3)]
    assert list(code_grids((1, 2, 3), (1, 5))) == [(1, 1), (2, 2)]


def test_teachers_are_known_by_name() -> None:
    assert teacher_config("smollm2", top=5) == LanguageConfig(network="smollm2", top=5)
    assert teacher_config("transformers:a/b.gguf").name == "b.gguf"
    assert teacher_config("efficientnet-lite0", stage=3, size=128) == TeacherConfig(network="efficientnet-lite0", stage=3, size=128)
    with pytest.raises(ConfigError, match=r"network 'smolm2' is none of .*; of language, 'smollm2' and 'transformers:NAME'"):
        teacher_config("smolm2")


def test_data_without_words_or_codes_are_refused(root: Path, taught: Path) -> None:
    with pytest.raises(DataError, match="shards: holds no words, of which a language teacher could say something"):
        teach(root / "shards", teachers(taught)[1])
    with pytest.raises(DataError, match="tokenizer 'cells' is not in the zoo; name its folder with --tokenizer"):
        teach(taught / "shards", teachers(taught)[0])
