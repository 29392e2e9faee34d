"""How well a video tokenizer gives videos back, frame by frame, over a whole set."""

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from mmtp.eval.codes import CodeCounts
from mmtp.eval.reconstruction import EvalError, psnr, ssim
from mmtp.tokenizers.base import DiscreteTokenizer


def evaluate_video_tokenizer(tokenizer: DiscreteTokenizer, videos: Iterable[Float[Tensor, "3 t h w"]]) -> dict[str, float]:
    """Encodes, decodes and compares every video of a set, one at a time.

    Output is rounded to 8 bits first, as it would be in a file.

    Args:
        tokenizer: a video tokenizer with codes.
        videos: with values in [0, 1]; any sizes; read once.

    Returns:
        ``videos``, ``frames``, ``tokens`` (over all codebooks), ``bits_per_pixel`` (of codes of equal length, per pixel of every frame,
        over the whole set), ``psnr`` (dB) and ``ssim`` (means over the frames of each video, then over videos), ``psnr_first`` (of first
        frames, which are coded alone), ``codebook_usage`` (share of the entries that occur) and ``perplexity`` (2 to the entropy of the
        codes), the last two as means over codebooks.

    Raises:
        EvalError: the set is empty.
    """
    found: dict[str, list[float]] = {"psnr": [], "ssim": [], "psnr_first": []}
    frames = pixels = 0
    counts = CodeCounts(tokenizer.spec.codebook_sizes)
    for video in videos:
        codes = tokenizer.encode([video])
        (output,) = tokenizer.decode(codes)
        pairs = list(zip(output.cpu().mul(255).round().div(255).unbind(1), video.cpu().unbind(1), strict=True))
        psnrs = [psnr(*pair) for pair in pairs]
        found["psnr"].append(sum(psnrs) / len(psnrs))
        found["ssim"].append(sum(ssim(*pair) for pair in pairs) / len(pairs))
        found["psnr_first"].append(psnrs[0])
        frames += len(pairs)
        pixels += video[0].numel()
        counts.add(codes)
    count = len(found["psnr"])
    if not count:
        raise EvalError("the set holds no videos to measure")
    return {
        "videos": float(count),
        "frames": float(frames),
        "tokens": float(counts.tokens),
        "bits_per_pixel": counts.bits / pixels,
        **{name: sum(values) / count for name, values in found.items()},
        "codebook_usage": sum(counts.usages) / len(counts.usages),
        "perplexity": sum(counts.perplexities) / len(counts.perplexities),
    }
