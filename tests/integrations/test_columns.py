"""Columns of weights, tasks and samples: through collators, packed, and what they may hold."""

import pytest
import torch
import torch.nn.functional as F
from integration_helpers import TASK_WEIGHTS, logged, tiny_model, tiny_rows, training_arguments

import segloss
from segloss.integrations.window import Samples, next_tokens, target_of

transformers = pytest.importorskip("transformers")
from integrations.test_trainer import LossTrainer, trainer  # noqa: E402  (needs transformers)

from segloss.integrations.columns import KeepColumns  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:`gradient_checkpointing`:FutureWarning",  # of trl's own settings
)


def tokenizer(side="right"):
    from integrations.test_trl import tokenizer

    made = tokenizer()
    made.padding_side = side
    return made


def ragged():
    """Rows of several lengths, a weight per token."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for length in (4, 7, 2, 5):
        ids = torch.randint(2, 61, (length,), generator=generator).tolist()
        weight = (1 + torch.arange(length, dtype=torch.float64) / 8).tolist()
        rows.append(
            {"input_ids": ids, "labels": ids, "token_weight": weight, "task_ids": length % 2}
        )
    return rows


# ------------------------------------------------------------------------------------ collators


@pytest.mark.parametrize("side", ["right", "left"])
def test_ragged_rows(side):
    """A token's weight stands where the collator puts the token."""
    collate = KeepColumns(transformers.DataCollatorForSeq2Seq(tokenizer(side)))
    rows = ragged()
    batch = collate(rows)
    assert batch["task_ids"].tolist() == [0, 1, 0, 1]
    for i, row in enumerate(rows):
        stands = batch["labels"][i] != -100
        assert batch["labels"][i][stands].tolist() == row["input_ids"]
        assert batch["token_weight"][i][stands].tolist() == row["token_weight"]
        assert not batch["token_weight"][i][~stands].any()
    assert collate.tokenizer.padding_side == side  # whatever is asked of it is the collator's


@pytest.mark.parametrize("side", ["right", "left"])
def test_ragged_rows_of_prompts(side):
    """Where labels do not say on which side rows are filled up, the mask does."""
    collate = KeepColumns(transformers.DataCollatorForSeq2Seq(tokenizer(side)))
    rows = [
        {"input_ids": [5, 6], "labels": [-100, -100], "token_weight": [2.0, 3.0]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "token_weight": [1.0, 1.0, 1.0]},
    ]
    stands = slice(0, 2) if side == "right" else slice(1, 3)
    assert collate(rows)["token_weight"][0, stands].tolist() == [2.0, 3.0]


def test_training_on_ragged_rows(tmp_path):
    rows = ragged()
    ours = trainer(
        tmp_path, rows=rows, data_collator=transformers.DataCollatorForSeq2Seq(tokenizer()),
        max_steps=1,
    )  # fmt: skip
    model, total, share = tiny_model(), 0.0, 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        nll = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        weight = torch.tensor(row["token_weight"][1:], dtype=torch.float64)
        total, share = total + (weight * nll).sum(), share + weight.sum()
    ours.train()
    assert ours.state.log_history[0]["loss"] == logged((total / share).item(), 1e-5)


def test_rows_that_are_joined():
    """A number per row becomes one per token of the row of all."""
    collate = KeepColumns(transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True))
    rows = [
        {"input_ids": [5, 6, 7], "task_ids": 1, "token_weight": [1.0, 2.0, 3.0]},
        {"input_ids": [8, 9], "task_ids": 0, "token_weight": [4.0, 5.0]},
    ]
    batch = collate(rows)
    assert batch["task_ids"].tolist() == [[1, 1, 1, 0, 0]]
    assert batch["token_weight"].tolist() == [[1, 2, 3, 4, 5]]
    samples = Samples.of(batch)
    assert samples.num_tokens().tolist() == [2 + 3, 5]
    assert samples.task.tolist() == [1, 0]


def test_columns_of_a_decoder():
    """They go with the labels, whose rows are not as long as the encoder's."""
    collate = KeepColumns(transformers.DataCollatorForSeq2Seq(tokenizer()))
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [9], "token_weight": [2.0]},
        {"input_ids": [5], "labels": [9, 8, 7], "token_weight": [3.0, 4.0, 5.0]},
    ]
    assert collate(rows)["token_weight"].tolist() == [[2, 0, 0], [3, 4, 5]]


def test_what_a_collator_gives_itself_stays():
    def collate(examples):
        assert "task_ids" not in examples[0]
        return {"input_ids": torch.zeros(2, 3), "sample_weights": torch.ones(2)}

    batch = KeepColumns(collate)([{"task_ids": 1, "sample_weights": 5.0}] * 2)
    assert batch["sample_weights"].tolist() == [1.0, 1.0]
    assert batch["task_ids"].tolist() == [1, 1]
    assert KeepColumns(lambda examples: examples)([3, 4]) == [3, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "b"], "sample_ids is 'a'; the loss reads this column and takes numbers"),
        ([1, None], "sample_ids is missing in some rows; it takes a number for each"),
        ([[1, 2], [1, 2, 3]], r"sample_ids has shape \(2,\) in a row of 3 tokens; it takes one"),
        ([[[1, 2, 3]], [[1, 2, 3]]], r"sample_ids has shape \(1, 3\) in a row of 3 tokens"),
    ],
)
def test_columns_that_are_refused(values, message):
    collate = KeepColumns(transformers.default_data_collator)
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "sample_ids": v} for v in values]
    with pytest.raises(ValueError, match=message):
        collate(rows)


def test_a_collator_that_cuts_rows():
    collate = KeepColumns(lambda rows: {"input_ids": torch.zeros(len(rows), 2)})
    row = {"input_ids": [5, 6, 7], "token_weight": [1.0, 1.0, 1.0]}
    with pytest.raises(ValueError, match="3 numbers for a row that the collator cut to 2 tokens"):
        collate([row])
    with pytest.raises(ValueError, match="token_weight is given for 3 rows, of which the collat"):
        KeepColumns(lambda rows: {"input_ids": torch.zeros(2, 3)})([row] * 3)


def test_a_column_that_is_lost_on_the_way(tmp_path):
    rows = [row | {"token_weight": [1.0] * 9} for row in tiny_rows()]

    class OwnLoader(LossTrainer):
        def get_train_dataloader(self):
            def collate(rows):
                keys = ("input_ids", "labels")
                return {key: torch.tensor([row[key] for row in rows]) for key in keys}

            return torch.utils.data.DataLoader(self.train_dataset, 4, collate_fn=collate)

    arguments = training_arguments(tmp_path)
    ours = OwnLoader(tiny_model(), arguments, train_dataset=rows, task_weights=TASK_WEIGHTS)
    with pytest.raises(ValueError, match="task_ids, token_weight is a column of train_dataset"):
        ours.train()


def test_packing_of_trl_drops_columns(tmp_path):
    pytest.importorskip("trl")
    from integrations import test_trl

    words = [{"text": "w2 w3 w4", "task_ids": 1}] * 8
    options = {"dataset_kwargs": None, "max_length": 8, "rows": words, "packing": True}
    with pytest.raises(ValueError, match="task_ids is a column of train_dataset, but not among th"):
        test_trl.trainer(tmp_path, task_weights=TASK_WEIGHTS, **options)
    test_trl.trainer(tmp_path, **options)  # tasks without weights are not missed


# ------------------------------------------------------------------------------- what they hold


def batch(**columns):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    labels = torch.tensor([[-100, 6, 7], [-100, 9, 10]])
    return {"input_ids": ids, "labels": labels} | columns


@pytest.mark.parametrize("rows", ["sample_weights", "token_weight", "task weights", "all"])
def test_weights_that_leave_nothing(rows, tmp_path):
    """Loss 0, gradients 0, as without valid tokens."""
    columns = {
        "sample_weights": {"sample_weights": torch.zeros(2)},
        "token_weight": {"token_weight": torch.zeros(2, 3)},
        "task weights": {"task_ids": torch.tensor([0, 0])},
        "all": {"token_weight": torch.zeros(2, 3), "sample_weights": torch.zeros(2)},
    }[rows]
    model = tiny_model()
    ours = trainer(tmp_path, model, task_weights=torch.zeros(2) if rows == "task weights" else None)
    model.train()
    loss = ours.compute_loss(model, batch(**columns))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_row_of_weight_zero_trains_nothing(tmp_path):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "sample_weights": 0.0}
    arguments = training_arguments(tmp_path, max_steps=1, per_device_train_batch_size=1)
    ours = LossTrainer(tiny_model(), arguments, train_dataset=[row])
    ours.train()
    assert ours.state.log_history[0]["loss"] == 0
    for name, value in tiny_model().named_parameters():
        assert torch.equal(value, ours.model.get_parameter(name))


def test_a_weight_of_zero_takes_a_row_out(tmp_path):
    model = tiny_model()
    ours = trainer(tmp_path, model)
    model.train()
    alone = {key: value[:1] for key, value in batch().items()}
    expected = ours.compute_loss(model, alone)
    for columns in (
        {"sample_weights": torch.tensor([3.0, 0.0])},
        {"token_weight": torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])},
    ):
        torch.testing.assert_close(ours.compute_loss(model, batch(**columns)), expected)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            {"sample_weights": torch.tensor([1.0, -0.5])},
            "sample_weights has the value -0.5; it",
        ),
        ({"sample_weights": torch.tensor([1.0, torch.nan])}, "sample_weights has the value nan"),
        ({"sample_weights": torch.tensor([1.0, torch.inf])}, "sample_weights has the value inf"),
        (
            {"token_weight": torch.tensor([[1.0, 1, -2], [1, 1, 1]])},
            "token_weight has the value",
        ),
        ({"sample_weights": torch.tensor([True, False])}, "it takes floats >= 0"),
        ({"task_ids": torch.tensor([0, -1])}, "task_ids has -1; it takes integers 0 to K - 1"),
        (
            {"task_ids": torch.tensor([0, 3])},
            "task_ids has the value 3; with task_weights of 3",
        ),
        ({"task_ids": torch.tensor([0.0, 1.0])}, "task_ids is .*; it takes integers 0 to K - 1"),
        (
            {"task_ids": torch.tensor([0, 1, 2])},
            r"task_ids is .*; it takes one number per row",
        ),
        (
            {"task_ids": torch.tensor([[0, 1, 1], [0, 0, 0]])},
            "task_ids differs within a sample; it takes one number for each",
        ),
    ],
)
def test_what_is_no_weight_and_no_task(column, message, tmp_path):
    model = tiny_model()
    given = {"task_ids": torch.tensor([0, 1])} | column
    ours = trainer(tmp_path, model, task_weights=TASK_WEIGHTS)
    model.train()
    with pytest.raises((ValueError, TypeError), match=message):
        ours.compute_loss(model, batch(**given))


def test_a_place_without_a_loss_says_nothing(tmp_path):
    """A collator may fill weights up with what it likes."""
    model = tiny_model()
    ours = trainer(tmp_path, model)
    model.train()
    filled = torch.tensor([[-100.0, 1, 2], [torch.nan, 1, 2]])
    clean = torch.tensor([[0.0, 1, 2], [0.0, 1, 2]])
    found, expected = (ours.compute_loss(model, batch(token_weight=w)) for w in (filled, clean))
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------- packing


LENGTHS = (14, 11, 6)
PLACES = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.tensor([1, 2, 3]), torch.tensor(LENGTHS))[None]
BEGINS = torch.tensor([0, 14, 25, 31], dtype=torch.int32)
PACKINGS = {
    "position_ids": {"position_ids": PLACES},
    "position_ids of Qwen2-VL": {"position_ids": PLACES.expand(3, 1, -1)},
    "position_ids of Qwen2.5-Omni": {"position_ids": PLACES.expand(4, 1, -1)},
    "cu_seq_lens_q": {"cu_seq_lens_q": BEGINS, "cu_seq_lens_k": BEGINS},
    "cu_seqlens": {"cu_seqlens": BEGINS},
    "seq_idx": {"seq_idx": NUMBERS - 1},
    "sample_ids": {"sample_ids": 7 - NUMBERS},
    "numbered mask": {"attention_mask": NUMBERS},
}


@pytest.mark.parametrize("how", PACKINGS)
def test_packed_rows_predict_as_many_tokens_as_apart(how):
    """Labels are the input: no place predicts the first token of the sample that follows."""
    labels = torch.arange(31)[None]
    samples = Samples.of({"labels": labels, **PACKINGS[how]})
    assert sorted(samples.num_tokens().tolist()) == [5, 10, 13]
    target = target_of({"labels": labels, **PACKINGS[how]})
    expected = next_tokens(labels).clone()
    expected[0, [13, 24]] = -100
    assert torch.equal(target, expected)


def test_a_picture_within_a_sample_begins_none():
    """Places in height and width start again, those in the text do not."""
    text = torch.tensor([[0, 1, 2, 2, 2, 2, 4, 0, 1]])
    height = torch.tensor([[0, 1, 2, 2, 3, 3, 4, 0, 1]])
    width = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 0, 1]])
    labels = torch.arange(9)[None]
    batch = {"labels": labels, "position_ids": torch.stack([text, height, width])}
    assert Samples.of(batch).num_tokens().tolist() == [6, 1]
    first = batch | {"position_ids": torch.stack([text * 0, height, width])}
    assert Samples.of(first).num_tokens().tolist() == [6, 1]


def test_padding_on_the_left_begins_no_sample():
    """The row is one sample, whose first label is predicted from padding, as in a model's own loss
    and as where no position_ids are given."""
    labels = torch.tensor([[-100, -100, 5, 6, 7]])
    for places in ([0, 0, 0, 1, 2], [1, 1, 0, 1, 2]):
        batch = {
            "labels": labels, "position_ids": torch.tensor([places]),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
        }  # fmt: skip
        assert Samples.of(batch).num_tokens().tolist() == [3]


def test_lengths_that_are_no_vector():
    labels = torch.arange(4)[None]
    with pytest.raises(ValueError, match=r"cu_seqlens is .*; it takes cumulated lengths, \(b \+ 1"):
        target_of({"labels": labels, "cu_seqlens": torch.tensor([[0, 4]])})


def test_packed_training_equals_rows_apart(tmp_path):
    """A loss of samples, of two rows packed into one."""
    model = tiny_model(attn_implementation="eager")
    ids = torch.randint(2, 61, (2, 8))
    places = torch.arange(8).expand(2, 8)
    ours = trainer(tmp_path, model, loss=segloss.DiceLoss(per_sample=True))
    model.train()
    apart = ours.compute_loss(model, {"input_ids": ids, "labels": ids})
    packed = {"input_ids": ids.reshape(1, 16), "labels": ids.reshape(1, 16)}
    together = ours.compute_loss(model, packed | {"position_ids": places.reshape(1, 16)})
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=0)


def test_a_column_that_the_first_rows_lack(tmp_path):
    row = {"input_ids": [5, 6], "labels": [5, 6]}
    rows = [row, {**row, "sample_weights": 2.0}]
    collate = KeepColumns(transformers.default_data_collator)
    with pytest.raises(ValueError, match="sample_weights is missing in some rows"):
        collate(rows)
    made = LossTrainer(tiny_model(), training_arguments(tmp_path), train_dataset=rows)
    assert made._columns == ["sample_weights"]
