"""``mmtp teach``: what frozen models say of a data set, kept beside it."""

from pathlib import Path


def teach(
    folder: Path,
    /,
    *,
    teacher: list[str],
    stage: int = -1,
    size: int = 224,
    top: int = 64,
    tokenizer: list[str] | None = None,
) -> int:
    """Ask frozen models about every document of a data set, and keep what they say beside it, for recipes with [loss.distill].

    A vision model is shown the pictures, decoded from their codes; a language model reads the words. What they say lies in
    FOLDER/teachers/NAME. Running the same command again goes on where it stopped.

    Args:
        folder: a data set of mmtp tokenize.
        teacher: smollm2, transformers:NAME (a folder, a GGUF file or a Hub id); efficientnet-lite0, efficientnet-lite2, timm:NAME,
            tokenizer:NAME; may be given several times.
        stage: of vision models: whose features, counted from 0, from the last if negative.
        size: of vision models: pixels per side that pictures are brought to; 0 leaves them.
        top: of language models: how many of the most probable tokens are kept at each place.
        tokenizer: a zoo entry, folder or Hub id, where the data were made with one that the zoo does not know under its name;
            may be given several times.

    Examples:
        mmtp teach tokens/emoji --teacher smollm2 --teacher efficientnet-lite0
        mmtp teach tokens/emoji --teacher efficientnet-lite0 --stage 3 --size 128
        mmtp teach tokens/mine --teacher transformers:models/tiny.gguf --tokenizer runs/my-text
    """
    from mmtp.cli.tables import progress_bar
    from mmtp.train.teach import teach as run
    from mmtp.train.teach import teacher_config

    for config in [teacher_config(network, stage=stage, size=size, top=top) for network in teacher]:
        with progress_bar(f"asking {config.name}", "shards") as bar:
            found = run(folder, config, tokenizers=tokenizer or (), progress=bar)
        print(
            f"{found.folder}: {found.rows:,} asked about, {found.answers:,} of {found.positions:,} positions answered, "
            f"{found.bytes:,} bytes, {found.seconds:.1f} s"
        )
    return 0
