"""Distillation: divergences of a student's distribution from a teacher's, token by token.

N tokens, V classes, k of them listed; p the student's probabilities, q the teacher's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from segloss.checks import check_choice, check_number
from segloss.losses.token import TokenLoss
from segloss.sources import TopK
from segloss.sweep.beside import Beside, Divergence, Top
from segloss.sweep.request import Request, TokenStats

__all__ = ["DistillationLoss"]

KINDS = ("forward", "reverse", "jsd")


class DistillationLoss(TokenLoss, function="distillation_loss", short="distill"):
    """The divergence of the student's distribution from a teacher's, without either's logits.

        log_p = torch.log_softmax(student.float() / temperature, -1)
        log_q = torch.log_softmax(teacher.float() / temperature, -1).detach()
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
        forward = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        reverse = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        jsd = (beta * (log_q.exp() * (log_q - log_m)).sum(-1)
               + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)).mean()

    Called `loss(student, target, teacher=teacher)`, alone or as a part of a sum, where the teacher
    is a tensor of logits (..., V), `DenseLogits`, `LinearLogits` or `TopK`; of the target only
    `ignore_index` and the class of `weight` are read. Gradients reach the student alone. Where the
    vocabularies are padded to different sizes, both distributions are over the classes both have.

    Args:
        divergence: "forward" is KL(q || p), the usual one; "reverse" is KL(p || q), which seeks the
            teacher's modes; "jsd" lies between the two.
        beta: of "jsd", in [0, 1], the teacher's share of the mixture. At 0 and 1, where that is 0,
            forward and reverse KL take its place, as in TRL and Liger.
        temperature: divides the logits of both; > 0.
        temperature_squared: multiply by temperature ** 2, which keeps the gradient's size about the
            same whatever the temperature (Hinton et al., section 2).

    Of `TopK(rest="uniform")`, "reverse" and "jsd" write the teacher out, a chunk at a time; of
    "renormalise" there is no "reverse", which is infinite; "ignore" keeps to temperature 1.

    Errors: TypeError or ValueError naming the argument.
    Sources: Hinton et al., arXiv 1503.02531; Agarwal et al., arXiv 2306.13649, eq. 1 (jsd).
    """

    reads_teacher = True
    takes_probabilities = True

    def __init__(
        self,
        divergence: str = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group=None,
    ):
        super().__init__(weight, ignore_index, reduction, group)
        check_choice("divergence", divergence, KINDS)
        self.divergence = divergence
        self.beta = check_number("beta", beta, 0, 1)
        self.temperature = check_number("temperature", temperature)
        if self.temperature == 0:
            raise ValueError("temperature is 0; it takes a number above 0")
        self.temperature_squared = bool(temperature_squared)

    @property
    def kind(self) -> str:
        if self.divergence == "jsd" and self.beta in (0, 1):
            return "reverse" if self.beta else "forward"
        return self.divergence

    def check_teacher(self, teacher) -> None:
        super().check_teacher(teacher)
        if not isinstance(teacher, TopK):
            return
        if teacher.rest == "renormalise" and self.kind == "reverse":
            raise ValueError(
                "teacher has rest='renormalise', with which reverse KL is infinite; it takes "
                "'uniform' or 'ignore', or divergence='jsd'"
            )
        if teacher.rest == "ignore" and self.temperature != 1:
            raise ValueError(
                f"temperature is {self.temperature}; a teacher with rest='ignore' takes 1, for the "
                "rest is what its normaliser at another temperature would need"
            )

    def stand_in(self, probabilities: Tensor) -> Tensor:
        if self.weight is not None:
            raise ValueError("weight of DistillationLoss is by the target's class; a target that "
                             "holds probabilities has none")  # fmt: skip
        return super().stand_in(probabilities)

    def of_both(self) -> Divergence:
        """What the two matrices are read for."""
        return Divergence(self.kind, self.beta, self.temperature)

    def of_student(self) -> Divergence:
        """The student's normaliser at the temperature."""
        return Divergence("lse", temperature=self.temperature)

    def writes_out(self, top: Top | None) -> bool:
        """Whether the value is no sum over the listed classes."""
        return top is None or (top.rest == "uniform" and self.kind != "forward")

    def reads_plain(self, beside: Beside) -> bool:
        return not self.writes_out(beside.top)

    def request_for(self, beside: Beside) -> Request:
        if self.writes_out(beside.top):
            return Request(divergences=(self.of_both(),))
        uniform = beside.top.rest == "uniform"
        own = () if self.temperature == 1 else (self.of_student(),)
        return Request(column_sums=uniform, divergences=own)

    def formula(self, stats: TokenStats) -> Tensor:
        if self.writes_out(stats.top):
            value = stats.divergence[self.of_both()]
        else:
            value = self.of_listed(stats, stats.top)
        return value * self.temperature**2 if self.temperature_squared else value

    def of_listed(self, stats: TokenStats, top: Top) -> Tensor:
        """The divergence (N,) from the listed classes alone, and what is known of the others."""
        listed = top.ids >= 0
        lse = stats.lse
        log_p = stats.top_log_prob
        if self.temperature != 1:
            lse = stats.divergence[self.of_student()]
            log_p = (log_p + stats.lse[:, None]) / self.temperature - lse[:, None]
        log_q = torch.where(listed, top.log_prob / self.temperature, -torch.inf)
        log_total = torch.logsumexp(log_q, -1)
        rest, num_others = None, None
        if top.rest == "uniform":
            num_others = stats.num_finite - listed.sum(-1)
            rest = top.log_rest(num_others) / self.temperature
            log_total = torch.logaddexp(log_total, rest + num_others.clamp(min=1).log())
            rest = rest - log_total
        if top.rest != "ignore":
            log_total = torch.where(log_total == -torch.inf, 0, log_total)
            log_q = log_q - log_total[:, None]
        value = divergence_of(self.kind, self.beta, log_p, log_q, listed)
        if top.rest == "renormalise" and self.kind == "jsd":
            others = 1 - torch.where(listed, log_p.exp(), 0).sum(-1)
            value = value - (1 - self.beta) * math.log1p(-self.beta) * others
        if rest is not None:
            log_p_sum = stats.logit_sum / self.temperature - stats.num_finite * lse
            log_p_sum = log_p_sum - torch.where(listed, log_p, 0).sum(-1)
            q = rest.exp()
            spread = q * (num_others * rest - log_p_sum)
            value = value + torch.where(q > 0, spread, 0)
        return value


def divergence_of(kind: str, beta: float, log_p: Tensor, log_q: Tensor, listed: Tensor) -> Tensor:
    """The divergence's sum (N,) over the listed classes (N, k)."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        # 0 log 0 is 0, and so is its gradient
        some = listed & (log_a > -torch.inf)
        ratio = torch.where(some, log_a - log_b, 0)
        return (torch.where(some, log_a, -torch.inf).exp() * ratio).sum(-1)

    if kind == "forward":
        return kl(log_q, log_p)
    if kind == "reverse":
        return kl(log_p, log_q)
    dead = ~listed | ((log_p == -torch.inf) & (log_q == -torch.inf))
    of_q, of_p = (torch.where(dead, 0, x) for x in (log_q, log_p))
    log_m = torch.logaddexp(of_q + math.log(beta), of_p + math.log1p(-beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
