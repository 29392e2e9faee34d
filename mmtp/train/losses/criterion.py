"""What a tokenizer is trained against, whatever its medium."""

from jaxtyping import Float
from torch import Tensor, nn

from mmtp.tokenizers.quantizers import Quantized
from mmtp.train.losses.adversarial import Adversary, adaptive_weight
from mmtp.train.losses.balance import Balancer
from mmtp.train.losses.terms import ReconstructionLoss, Term, weighted_sum


class Criterion(nn.Module):
    """The reconstruction's terms, a discriminator's if there is one, balanced if wanted, and the quantizer's own loss.

    Args:
        reconstruction: how far a reconstruction is from its original.
        quantizer: weight of the quantizer's loss, which is added unbalanced, for it does not act on the reconstruction.
        adversary: a discriminator.
        balancer: what gives terms their shares; it knows all their names.
    """

    def __init__(
        self, reconstruction: ReconstructionLoss, quantizer: float, adversary: Adversary | None = None, balancer: Balancer | None = None
    ) -> None:
        super().__init__()
        self.reconstruction, self.quantizer = reconstruction, quantizer
        self.adversary, self.balancer = adversary, balancer

    def forward(
        self,
        output: Float[Tensor, "b c *size"],
        target: Float[Tensor, "b c *size"],
        quantized: Quantized,
        step: int,
        last_layer: nn.Parameter,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The tokenizer's loss, and numbers for the log.

        Args:
            output: reconstruction, values in [-1, 1].
            target: original.
            quantized: what the quantizer gave.
            step: decides whether the discriminator plays.
            last_layer: weight of the decoder's last layer.
        """
        terms, metrics = self.reconstruction.terms(output, target)
        if self.adversary and self.plays(step):
            fooling = self.adversary.fool(output, target)
            metrics |= {name: term.value.item() for name, term in fooling.items()}
            if self.adversary.config.adaptive:
                weight, value = fooling["adversarial"]
                metrics["adaptive"] = adaptive_weight(weighted_sum(terms), value, last_layer)
                fooling["adversarial"] = Term(weight * metrics["adaptive"], value)
            terms |= fooling
        loss = self.balancer(terms, output) if self.balancer else weighted_sum(terms)
        return loss + self.quantizer * quantized.loss, metrics

    def plays(self, step: int) -> bool:
        """Whether there is a discriminator that takes part in a step."""
        return self.adversary is not None and step >= self.adversary.config.start
