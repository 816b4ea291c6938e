"""Preference and reinforcement learning in TRL, its head ours.

    python -m segloss.integrations.examples.preferences

A tiny random model and a vocabulary of its own; nothing is downloaded.
"""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import datasets
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from segloss.integrations.trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer

V = 64
PAIRS = [
    {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{60 - i}"}
    for i in range(2, 18)
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per id."""
    words = {"[pad]": 0, "[eos]": 1, **{f"w{i}": i for i in range(2, V)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[pad]", eos_token="[eos]")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes, **heads, **ids))


def train(trainer_class: type, config_class: type, rows: list[dict], steps: int, **more) -> list:
    """What is logged of the steps."""
    options = more.pop("options", {})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library
        arguments = config_class(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-2,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, bf16=False,
            use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, **options,
        )  # fmt: skip
        trainer: Any = trainer_class(
            model=model(), args=arguments, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(), **more,
        )  # fmt: skip
        trainer.train()
        return trainer.state.log_history[:-1]


def dpo(steps: int = 20) -> list:
    """Chosen answers become likelier than rejected ones, beside the model as it was."""
    return train(DPOTrainer, trl.DPOConfig, PAIRS, steps, ref_model=model())


def kto(steps: int = 20) -> list:
    """The same of answers that are good or bad, each for itself."""
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
    return train(KTOTrainer, trl.KTOConfig, rows, steps, ref_model=model())


def even_words(completions: list[str], **columns) -> list[float]:
    """The share of words with an even number."""
    shares = []
    for text in completions:
        numbers = [int(word[1:]) for word in text.split()]
        shares.append(sum(number % 2 == 0 for number in numbers) / max(len(numbers), 1))
    return shares


def reinforced(trainer_class: type, config_class: type, steps: int) -> list:
    rows = [{"prompt": row["prompt"]} for row in PAIRS]
    options = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.9, "beta": 0.0}
    return train(trainer_class, config_class, rows, steps, reward_funcs=even_words, options=options)


def grpo(steps: int = 20) -> list:
    """Sampled answers with the better reward of their group become likelier."""
    return reinforced(GRPOTrainer, trl.GRPOConfig, steps)


def rloo(steps: int = 20) -> list:
    return reinforced(RLOOTrainer, trl.RLOOConfig, steps)


def main() -> None:
    for name, run in (("DPO", dpo), ("KTO", kto)):
        logs = run()
        print(f"{name}: loss {logs[0]['loss']:.3f} -> {logs[-1]['loss']:.3f}")
    for name, run in (("GRPO", grpo), ("RLOO", rloo)):
        logs = run()
        print(f"{name}: reward {logs[0]['reward']:.2f} -> {logs[-1]['reward']:.2f}")


if __name__ == "__main__":
    main()
