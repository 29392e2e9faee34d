"""A language model of moments, as transformers saves one: what stands in for SmolLM2 where a test is to be quick."""

from pathlib import Path

import torch

from mmtp.tokenizers.text import TextTokenizer

TEXTS = ["what color is the shape?", "is there a circle?", "draw a red circle", "a blue triangle", "yes", "no", "red", "blue"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


def save_tiny_teacher(folder: Path, *, size: int = 290, chat: bool = True) -> Path:
    """An untrained Llama with a byte-level BPE of its own, in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = TextTokenizer.train(TEXTS * 4, size)._backend
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
