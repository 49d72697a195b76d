"""Teacher-forced likelihoods: what a model thinks of a given response, worn or not."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import kl_div

from safeglasses.model.vlm import VLM, Batch


@dataclass(frozen=True)
class Forced:
    """Next-token distributions along the responses of one batch; the turn's end is part of a response.

    Only tokens of responses are kept, sample after sample: a distribution over 32,000 words is dear, and the padding of
    responses and prompts of many lengths would be most of them.
    """

    log_probs: Float[Tensor, "token vocab"]
    """Log-probabilities of what could have stood at each response token."""
    token_log_probs: Float[Tensor, " token"]
    """Log-probability of the token that stands there. Natural logarithm."""
    sample: Int[Tensor, " token"]
    """Which sample of the batch each token belongs to."""
    samples: int
    """Size of the batch."""

    @property
    def totals(self) -> Float[Tensor, " sample"]:
        """Log-probability of each whole response, in nats."""
        return self.token_log_probs.new_zeros(self.samples).index_add(0, self.sample, self.token_log_probs)

    def kl_from(self, base: "Forced") -> Float[Tensor, ""]:
        """KL(base ‖ self) in nats, averaged over all response tokens of the batch."""
        return kl_div(self.log_probs, base.log_probs, reduction="batchmean", log_target=True)


def force(vlm: VLM, batch: Batch) -> Forced:
    """Run the model along given responses. Gradients flow unless the caller forbids them.

    Only the columns from the earliest response on are turned into logits: with 32,000 words and 600 picture tokens
    the others would be most of the memory.
    """
    start = int(batch.prompt_length.min()) - 1
    mask = batch.response_mask[:, start + 1 :]
    logits = vlm.forward(batch, logits_from=start)[:, :-1][mask]
    log_probs = torch.log_softmax(logits.float(), -1)
    targets = batch.ids[:, start + 1 :][mask]
    tokens = log_probs.gather(-1, targets[:, None])[:, 0]
    return Forced(log_probs, tokens, mask.nonzero()[:, 0], len(mask))
