"""Teacher-forced likelihoods: what a model thinks of a given response, worn or not."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safeglasses.model.vlm import VLM, Batch


@dataclass(frozen=True)
class Forced:
    """Next-token distributions along the responses of one batch; the turn's end is part of a response."""

    log_probs: Float[Tensor, "sample token vocab"]
    """Log-probabilities; column t predicts the t-th token of the window."""
    token_log_probs: Float[Tensor, "sample token"]
    """Log-probability of the token that stands there; 0 outside the response. Natural logarithm."""
    mask: Bool[Tensor, "sample token"]
    """Which columns predict a token of the response."""

    @property
    def totals(self) -> Float[Tensor, " sample"]:
        """Log-probability of each whole response, in nats."""
        return self.token_log_probs.sum(1)

    def kl_from(self, base: "Forced") -> Float[Tensor, ""]:
        """KL(base ‖ self) in nats, averaged over all predicted response tokens of the batch."""
        per_token = (base.log_probs.exp() * (base.log_probs - self.log_probs)).sum(-1)
        return (per_token * self.mask).sum() / self.mask.sum()


def force(vlm: VLM, batch: Batch) -> Forced:
    """Run the model along given responses. Gradients flow unless the caller forbids them.

    Only the columns from the earliest response on are turned into logits: with 32,000 words and 600 picture tokens
    the others would be most of the memory.
    """
    start = int(batch.prompt_length.min()) - 1
    logits = vlm.forward(batch, logits_from=start)
    log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
    targets = batch.inputs["input_ids"][:, start + 1 :]
    mask = batch.response_mask[:, start + 1 :]
    tokens = log_probs.gather(-1, targets[..., None])[..., 0] * mask
    return Forced(log_probs, tokens, mask)
