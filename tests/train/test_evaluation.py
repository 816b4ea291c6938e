"""Scores against what is counted by hand and what a plain loop over the model gives."""

import math
import shutil

import numpy as np
import pytest
import torch
from train.tiny import examples, write_jsonl

from segloss.train.config import settings
from segloss.train.errors import UserError
from segloss.train.evaluation import choose, evaluate, macro_f1, results, same
from segloss.train.run import Run


@pytest.fixture
def run(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    rows = examples("a", 24)
    file = write_jsonl(folder / "data.jsonl", rows)
    words = ["--model", str(model_folder), "--data", str(file), "--eval-items", "8"]
    return Run(settings([*words, "--output", str(folder / "run"), "--bf16", "false"]))


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_sums_answers_and_choices_are_those_of_a_plain_loop(run, tokenizer, head):
    run.trainer.args.per_device_eval_batch_size = 3
    run.trainer.head = head
    rows = evaluate(run.trainer, run.held_out, "title")
    model = run.trainer.model.eval()
    for item, found in zip(run.held_out, rows, strict=True):
        assert found["task"] == item["task"] and found["expected"] == item["answer"]
        with torch.no_grad():
            logits = model(torch.tensor([item["input_ids"]])).logits[0].double()
        log_prob = logits.log_softmax(-1)
        labels = [(i, t) for i, t in enumerate(item["labels"]) if t != -100]
        nll = -sum(log_prob[i - 1, t].item() for i, t in labels)
        assert found["nll"] == pytest.approx(nll, rel=1e-5)
        assert found["tokens"] == len(labels) == len(item["answer"]) + 1
        assert found["hits"] == sum(log_prob[i - 1].argmax() == t for i, t in labels)
        entropy = -(log_prob.exp() * log_prob).sum(-1)
        expected = sum(entropy[i - 1].item() for i, _ in labels)
        assert found["entropy"] == pytest.approx(expected, rel=1e-5)
        ids = list(item["prompt_ids"])
        for _ in range(len(item["input_ids"]) - len(item["prompt_ids"]) + 4):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        new = ids[len(item["prompt_ids"]) :]
        assert found["answer"] == tokenizer.decode(new, skip_special_tokens=True)
        assert found["choice"] == constrained(model, item)
    # of which truncation has left no prompt
    (found,) = evaluate(run.trainer, [run.held_out[0] | {"prompt_ids": []}], "title")
    assert "tokens" in found and not {"answer", "choice"} & set(found)


def constrained(model, item):
    """Greedy decoding with only the options' tokens allowed, one at a time."""
    ids = list(item["prompt_ids"])
    alive = list(zip(item["options"], item["option_ids"], strict=True))
    while len(alive) > 1:
        at = len(ids) - len(item["prompt_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        ids.append(max({o[at] for _, o in alive}, key=lambda token: logits[token].item()))
        alive = [(text, o) for text, o in alive if o[at] == ids[-1]]
    return alive[0][0].strip()


ALIKE = ([1, 2, 9], [1, 3, 9], [1, 3, 4, 9])
APART = ([5, 6, 9], [7, 9])


@pytest.mark.parametrize(
    ("options", "number", "steps"),
    [
        (ALIKE, 0, [{1}, {2, 3}, {9}]),
        (ALIKE, 1, [{1}, {2, 3}, {4, 9}]),  # which begins the next one
        (ALIKE, 2, [{1}, {2, 3}, {4, 9}]),
        (APART, 0, [{5, 7}]),
        (APART, 1, [{5, 7}]),
        (([5, 6], [5, 6, 7]), 1, [{5}, {6}, {7}]),  # a tokenizer that ends no text
    ],
)
def test_what_may_come_next_and_the_option_that_it_spells(run, monkeypatch, options, number, steps):
    seen = []

    def generate(input_ids, max_new_tokens, prefix_allowed_tokens_fn, **_):
        """A model that wants the tokens of one option, and the end after them."""
        ids = input_ids
        for wanted in [*options[number], 9, 9][:max_new_tokens]:
            seen.append(set(prefix_allowed_tokens_fn(0, ids[0])))
            assert wanted in seen[-1]
            ids = torch.cat([ids, torch.tensor([[wanted]])], 1)
        return ids

    monkeypatch.setattr(run.trainer.model, "generate", generate)
    texts = [f" option {i}" for i in range(len(options))]
    item = {"prompt_ids": [40, 41], "options": texts, "option_ids": list(options), "found": {}}
    choose(run.trainer, [item])
    assert item["found"]["choice"] == f"option {number}" and seen == steps


def test_macro_f1():
    true, said = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 0])
    # class 0: 2 of 3 said, 2 of 3 true; class 1: 1 of 2, 1 of 2; class 2: 0
    assert macro_f1(true, said, [0, 1, 2]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert macro_f1(true, said, [0]) == pytest.approx(2 / 3)
    assert macro_f1(true, said, []) == 0


def found_of(answers, choices, expected, **others):
    options = sorted({*expected, *choices})
    return [
        {"task": "t", "options": options, "found": {
            "nll": 2.0 * (i + 1), "hits": 1.0, "entropy": 0.5, "tokens": 2.0,
            "expected": answer, "answer": given, "choice": choice.strip(),
        }}
        for i, (given, choice, answer) in enumerate(zip(answers, choices, expected, strict=True))
    ]  # fmt: skip


class Facts:
    majority = {"t": " b"}  # noqa: RUF012


class Least:
    min_class_items = 1


def test_results_by_hand():
    items = found_of([" a.", "x", "B", "b"], [" a", " a", " b", " b"], [" a", " b", " b", " b"])
    (row,) = results(items, Facts, Least)
    assert row["items"] == 4 and row["nll"][0] == pytest.approx((2 + 4 + 6 + 8) / 8)
    assert row["token_accuracy"][0] == 0.5 and row["entropy"] == 0.25
    assert row["exact_match"][0] == row["accuracy"][0] == 0.75
    assert row["chance"] == 0.5 and row["classes"] == 2
    assert row["macro_f1"][0] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert row["majority"]["accuracy"] == 0.75 and row["majority"]["answer"] == "b"
    assert row["majority"]["macro_f1"] == pytest.approx((0 + 6 / 7) / 2)
    for name in ("nll", "accuracy", "macro_f1"):
        value, low, high = row[name]
        assert low < value < high

    class Three:
        min_class_items = 3

    (row,) = results(items, Facts, Three)  # of class a there is one item
    assert row["classes"] == 1 and row["macro_f1"][0] == pytest.approx(4 / 5)


def test_the_usual_answer_may_be_empty():
    """As of a turn that is a call of a tool, or of nothing to say."""
    items = found_of(["", "", "x"], ["", "", ""], ["", "", "b"])

    class Nothing:
        majority = {"t": ""}  # noqa: RUF012

    (row,) = results(items, Nothing, Least)
    assert row["majority"] == {
        "answer": "", "accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(0.4),
    }  # fmt: skip


def test_an_interval_is_the_binomial_s():
    number, share = 400, 0.3
    right = [i < share * number for i in range(number)]
    choices = [" a" if r else " b" for r in right]
    (row,) = results(found_of([""] * number, choices, [" a"] * number), Facts, Least)
    value, low, high = row["accuracy"]
    width = 1.96 * math.sqrt(share * (1 - share) / number)
    assert value == share
    assert (low, high) == pytest.approx((share - width, share + width), abs=0.006)


@pytest.mark.parametrize(
    ("answer", "expected", "equal"),
    [
        ("48 points", " 48  Points.", True),
        ("yes\nand more", " yes", True),
        ("no", " yes", False),
        ("a\nb", "a\nb", True),
        ("a", "a\nb", False),
        ("", " yes", False),
        ("", "", True),
        ("yes", "", False),
    ],
)
def test_same(answer, expected, equal):
    assert same(answer, expected) is equal


def test_weights_that_are_not_finite(train, model_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = train("--model", folder)
    assert code == 2 and "Traceback" not in err
    assert "the weights of model.norm.weight are not finite" in err
    code, _, err = train("--model", folder, "--head", "logits", "--output", tmp_path / "two")
    assert code == 2 and "the loss on the held-out items of 'parity' is nan" in err


def test_generation_config_of_the_model_does_not_take_part(run, model_folder):
    """num_return_sequences and a penalty would change the answers, or their number."""
    plain = evaluate(run.trainer, run.held_out, "title")
    config = run.trainer.model.generation_config
    config.num_return_sequences, config.repetition_penalty = 2, 5.0
    try:
        assert evaluate(run.trainer, run.held_out, "title") == plain
        assert run.trainer.model.generation_config is config
    finally:
        config.num_return_sequences, config.repetition_penalty = None, None


def test_a_mixture_of_experts_that_returns_its_routers(tmp_path, command, tokenizer):
    import transformers

    folder = tmp_path / "mixtral"
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
            output_router_logits=True, eos_token_id=256, pad_token_id=257,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "x" * (i + 1), "completion": " y" if i % 2 else " z"} for i in range(16)]
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    code, out, err = command(
        *("train", "--model", folder, "--data", file, "--output", tmp_path / "run"),
        *("--steps", 2, "--eval-items", 6),
    )
    assert code == 0 and "| data |" in out, err


def test_a_model_whose_head_cannot_be_fused_says_what_to_do(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise TypeError("BertLMHeadModel has no decoder below its head")

    monkeypatch.setattr("segloss.train.evaluation.loss_of", refuse)
    with pytest.raises(UserError, match="below its head; --head logits takes the model's own"):
        evaluate(run.trainer, run.held_out, "title")


def test_an_answer_to_nothing_has_a_loss_alone(command, model_folder, tokenizer, tmp_path):
    import copy

    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = shutil.copytree(model_folder, tmp_path / "model")
    talking.save_pretrained(folder)
    rows = [{"messages": [{"role": "assistant", "content": f"hello {i}"}]} for i in range(4)]
    file = write_jsonl(tmp_path / "said.jsonl", rows)
    code, out, err = command("evaluate", folder, "--data", file, "--eval-items", 4)
    assert code == 0 and "| said |     4 | model |" in out and "exact match" not in out[:99], err


def test_an_answer_of_a_test_split_that_training_has_not():
    """It counts as wrong, and as a class that never comes out."""
    items = found_of(["a", "b", "a"], [" a", " b", " a"], [" a", " b", " c"])
    for item in items:
        item["options"] = [" a", " b"]
    (row,) = results(items, Facts, Least)
    assert row["accuracy"][0] == pytest.approx(2 / 3) and row["classes"] == 3
    assert row["macro_f1"][0] == pytest.approx((2 / 3 + 1 + 0) / 3)
