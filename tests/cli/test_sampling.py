import pytest

from mmtp import hub
from mmtp.cli.sampling import device_of, drafts_of, sampling_settings
from mmtp.decode.by_medium import DraftsByMedium
from mmtp.decode.draft_model import ModelDrafts
from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.jacobi import JacobiDrafts
from mmtp.decode.lookup import LookupDrafts
from mmtp.decode.ngrams import NGramDrafts
from mmtp.decode.refined import RefinedDrafts
from mmtp.decode.sample import Sampling, SamplingError
from mmtp.types import MmtpError
from tests.models.common import model


def test_settings_are_common_or_of_a_medium() -> None:
    found = sampling_settings(temperature=["0.7", "image=1", "text=0"], top_k=["image=50"], guidance=["1:4"], top_p=None)
    assert found == {
        "temperature": 0.7,
        "guidance": 1.0,
        "guidance_end": 4.0,
        "per_modality": {"image": {"temperature": 1.0, "top_k": 50}, "text": {"temperature": 0.0}},
    }
    assert Sampling(**found).of("image") == Sampling(temperature=1.0, top_k=50, guidance=1.0, guidance_end=4.0)
    assert Sampling(**sampling_settings(temperature=None)) == Sampling()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"temperature": ["warm"]}, "--temperature warm: a number is wanted"),
        ({"top_k": ["image=1.5"]}, "--top-k 1.5: a whole number"),
        ({"guidance": ["1:2:3"]}, "--guidance 1:2:3: a number, or FIRST:LAST,"),
        ({"min_p": ["picture=0.1"]}, "per_modality 'picture': one of text, image"),
    ],
)
def test_refuses_what_is_no_setting(flags: dict, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        Sampling(**sampling_settings(**flags))


def test_drafts_come_from_where_the_words_say(tmp_path, saved) -> None:
    hub.save_pretrained(model(depth=0), tmp_path / "small")
    for words, kind in (("head", HeadDrafts), ("ngrams", NGramDrafts), ("lookup", LookupDrafts), (str(tmp_path / "small"), ModelDrafts)):
        assert isinstance(drafts_of(words), kind)
    assert drafts_of("auto") == DraftsByMedium()
    assert drafts_of("jacobi") == JacobiDrafts()
    assert drafts_of("refined") == RefinedDrafts()
    assert drafts_of("lookup+jacobi") == JacobiDrafts(first=LookupDrafts())
    with pytest.raises(MmtpError, match="is a TextTokenizer, not a unified model; auto, .*, jacobi, refined or a model is wanted"):
        drafts_of(saved["text"])


@pytest.mark.parametrize("name", ["nowhere", "cuda:99", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    assert device_of("cpu").type == "cpu"
    with pytest.raises(MmtpError, match=f"--device {name}: cannot be used here .*; cpu, cuda or cuda:N is wanted$"):
        device_of(name)
