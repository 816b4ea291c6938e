"""Segloss losses in Axolotl, from its YAML::

    plugins:
      - segloss.integrations.axolotl.SeglossPlugin
    segloss_loss: 0.6*ce + 0.4*lovasz
    segloss_sample_weights: irdro
    segloss_sample_temperature: 1.0

`SeglossArgs` describes each setting.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, field_validator

from segloss.losses import parse_loss
from segloss.weighting import SampleWeighting

__all__ = ["SeglossArgs", "SeglossPlugin"]


class SeglossArgs(BaseModel):
    """The settings that the plugin adds to Axolotl's."""

    segloss_loss: str = Field(
        default="ce", description="a loss or a weighted sum, as `segloss train --loss` takes it"
    )
    segloss_head: Literal["fused", "logits"] = Field(
        default="fused", description="fused: logits are never made; logits: the model's own"
    )
    segloss_sample_weights: Literal[
        "none", "irdro", "linupper", "quadratic", "extremes", "rank"
    ] = Field(default="none", description="the scheme of `segloss.SampleWeighting`")
    segloss_sample_temperature: float = Field(
        default=1.0, gt=0, description="small: the largest loss takes all"
    )
    segloss_sample_burn_in: int = Field(
        default=0, ge=0, description="optimizer steps with equal sample weights at first"
    )

    @field_validator("segloss_loss")
    @classmethod
    def check_loss(cls, value: str) -> str:
        try:
            parse_loss(value)
        except Exception as error:
            raise ValueError(str(error)) from None
        return value


OTHER_LOSSES = (
    "chunked_cross_entropy",
    "cut_cross_entropy",
    "use_eaft",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
)


class SeglossPlugin(BasePlugin):
    """Puts `LossMixin` before Axolotl's trainer, for supervised fine-tuning and pre-training.

    Packed samples are told apart by their position_ids. What Axolotl's own `compute_loss` does
    beside the loss, counting tokens for `include_tkps`, is not done.
    """

    def get_input_args(self) -> str:
        return "segloss.integrations.axolotl.SeglossArgs"

    def get_trainer_cls(self, cfg: Any) -> type:
        for name in ("rl", "reward_model", "process_reward_model", "diffusion"):
            if cfg.get(name):
                raise ValueError(f"{name} is {cfg[name]!r}; SeglossPlugin takes fine-tuning only")
        for name in OTHER_LOSSES:
            if cfg.get(name):
                raise ValueError(f"{name} is set beside segloss_loss; leave one of them out")
        # imported late: plugins are loaded before Axolotl has patched what its trainer imports
        from axolotl.core.trainers import AxolotlTrainer

        from segloss.integrations.transformers import LossMixin

        class SeglossTrainer(LossMixin, AxolotlTrainer):
            def __init__(self, *args, **kwargs):
                loss, head = parse_loss(cfg["segloss_loss"]), cfg["segloss_head"]
                weights = sample_weighting(cfg)
                super().__init__(*args, loss=loss, head=head, sample_weights=weights, **kwargs)

        return SeglossTrainer


def sample_weighting(cfg: Any) -> SampleWeighting | None:
    if cfg["segloss_sample_weights"] == "none":
        return None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return SampleWeighting(
        cfg["segloss_sample_weights"],
        cfg["segloss_sample_temperature"],
        cfg["segloss_sample_burn_in"],
        group=torch.distributed.group.WORLD if distributed else None,
    )
