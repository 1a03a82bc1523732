"""The language-model losses every stage shares; padding on either side is excluded.

Shapes: B batch, S tokens, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor


def next_token_targets(ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """(B, S - 1): token t + 1 for each token t, -100 where either is padding.

    So the first token after left padding does not count: it has nothing to be predicted from.
    """
    target = ids_BS[:, 1:]
    return target if mask_BS is None else target.masked_fill((mask_BS[:, 1:] * mask_BS[:, :-1]) == 0, -100)


def next_token_loss(logits_BSV: Tensor, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of token t+1 given tokens <= t, nats."""
    target = next_token_targets(ids_BS, mask_BS)
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), target.flatten())


def distillation_loss(logits_BSV: Tensor, teacher_BSV: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student) per valid token, nats."""
    student, teacher = logits_BSV.float().log_softmax(-1), teacher_BSV.float().log_softmax(-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return divergence.mean() if mask_BS is None else divergence[mask_BS.bool()].mean()
