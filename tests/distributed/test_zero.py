"""`head_loss` under DeepSpeed's ZeRO-1, 2 and 3, on two processes: `make test-deepspeed`.

ZeRO keeps the gradients and the weights that the optimizer holds in float32, whatever the model's
dtype. A model in float64 therefore loses that rounding and nothing else: its first gradients are
one process's to float32's last bit, later ones are of weights that were rounded.
"""

import dataclasses
import os
import tempfile

import pytest
import torch

pytest.importorskip("transformers")
from engine_cases import (
    CASES,
    EMPTY,
    LR,
    OWN,
    STEPS,
    assert_close,
    assert_same,
    errors_of,
    loss_of,
    refusal_of_weight,
)
from ranks import spawn

pytestmark = pytest.mark.deepspeed

EPS = torch.finfo(torch.float32).eps
WHOLE = [*CASES, *EMPTY]
PAIRS = [
    *((1, case) for case in CASES if case.loss == "sum"),
    *((2, case) for case in (*WHOLE, *OWN)),
    *((3, case) for case in WHOLE),
]
SINGLE = [
    (stage, dataclasses.replace(case, dtype=torch.float32))
    for stage, case in PAIRS
    if case.loss == "sum" and case.model in ("trainable", "lora", "tied")
]


def config_of(stage: int, **options) -> dict:
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,  # shards the smallest weights too
        "overlap_comm": False,
        "reduce_bucket_size": 100_000,
        "contiguous_gradients": False,
    }
    return {
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1.0 unless one says so
        "zero_optimization": zero,
        **options,
    }


def engine_of(model, stage: int):
    import deepspeed

    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    config = config_of(stage, **sizes)
    if stage == 3:  # which cuts a float64 model that is given so, and refuses to do it itself
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(case, stage: int, rank: int, group) -> list:
    from deepspeed.utils import safe_get_full_grad

    from segloss.integrations.transformers import head_loss

    model = case.make()
    engine = engine_of(model, stage)
    criterion, steps = loss_of(case.loss, group), []
    for step in range(STEPS):
        ids, target = case.data(step, rank, group.size())
        loss, outputs = head_loss(engine, criterion, target, input_ids=ids)
        assert outputs.logits.shape[1] == 1
        engine.backward(loss * group.size())
        grads = {
            name: safe_get_full_grad(p).clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        steps.append((loss.item(), grads))
        engine.step()
    return steps


# (stage, micro-batches of a step, loss): a region loss is one of each micro-batch
LOGGED = [(stage, count, "focal") for stage in (2, 3) for count in (1, 2)]
LOGGED += [(stage, 1, "0.6 ce + 0.4 lovasz") for stage in (2, 3)]


def logged_by_a_trainer(stage: int, accumulation: int, name: str, folder: str) -> list:
    """[(loss, nll)] of two steps of `LossMixin`."""
    from integration_helpers import PAIRS, in_order, tiny_model, tiny_rows, training_arguments
    from integrations.test_trainer import LossTrainer

    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    arguments = training_arguments(folder, accumulation, deepspeed=config_of(stage, **sizes))
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in tiny_rows()]
    model = tiny_model().float() if stage == 3 else tiny_model()
    trainer = in_order(LossTrainer(model, arguments, train_dataset=rows, loss=PAIRS[name][0]))
    trainer.train()
    return [(line["loss"], line["nll"]) for line in trainer.state.log_history if "loss" in line]


def refused(call, case) -> str:
    with pytest.raises(TypeError) as error:
        call(engine_of(case.make(), 3), case.data(0)[0])
    return str(error.value)


def ranks_results(rank, group):
    import deepspeed

    from segloss.integrations.transformers import head_logits, head_loss

    deepspeed.init_distributed("gloo")
    found: dict = {
        (stage, str(case), case.dtype): train(case, stage, rank, group)
        for stage, case in (*PAIRS, *SINGLE)
    }
    found["head_logits"] = refused(lambda model, ids: head_logits(model, input_ids=ids), WHOLE[0])
    with tempfile.TemporaryDirectory() as folder:
        found |= {key: logged_by_a_trainer(*key, folder) for key in LOGGED}
    found["weight"] = refusal_of_weight(engine_of(WHOLE[0].make(), 3).module)
    for case in OWN:
        found[str(case)] = refused(
            lambda model, ids: head_loss(model, loss_of("ce"), ids, input_ids=ids), case
        )
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    return spawn(ranks_results, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("stage, case", PAIRS, ids=str)
def test_gradients_are_those_of_one_process(found, stage, case):
    first, true_first = case.truth()[0]
    for rank in found:
        steps = rank[stage, str(case), torch.float64]
        assert steps[0][0] == pytest.approx(first, rel=1e-13)
        assert_close(steps[0][1], true_first, EPS)
        assert_same(steps, case, 1e-6)


@pytest.mark.parametrize("stage, case", SINGLE, ids=str)
def test_float32_loses_no_more_than_on_one_process(found, stage, case):
    """To twice the error of one process in float32, which sums in another order."""
    exact = dataclasses.replace(case, dtype=torch.float64).truth()
    for rank in found:
        for ours, own, true in zip(
            rank[stage, str(case), torch.float32], case.truth(), exact, strict=True
        ):
            allowed = errors_of(own[1], true[1])
            for name, error in errors_of(ours[1], true[1]).items():
                assert error <= 2 * allowed[name] + 1e-6, name


@pytest.mark.parametrize("key", LOGGED, ids=str)
def test_what_loss_mixin_logs_is_one_process_s(found, key):
    """The second step's too, of weights that the first has trained."""
    from integration_helpers import (
        PAIRS,
        plain_cross_entropy,
        plain_training,
        tiny_model,
        tiny_rows,
    )

    plain = PAIRS[key[2]][1]
    true = plain_training(tiny_model(), tiny_rows(), plain)
    nll: list = []

    def and_nll(logits, target):
        nll.append(plain_cross_entropy(logits, target).item())
        return plain(logits, target)

    plain_training(tiny_model(), tiny_rows(), and_nll)
    for rank in found:
        assert [loss for loss, _ in rank[key]] == pytest.approx([v for v, _ in true], rel=1e-6)
        assert [value for _, value in rank[key]] == pytest.approx(nll, rel=1e-6)


def test_head_logits_name_the_call_that_serves(found):
    for rank in found:
        assert "sharded by ZeRO-3" in rank["head_logits"] and "head_loss" in rank["head_logits"]


def test_a_placeholder_names_the_call_that_serves(found):
    for rank in found:
        assert "weight is an empty ZeRO-3 placeholder" in rank["weight"]
        assert "head_loss(model, loss, target, **inputs)" in rank["weight"]


@pytest.mark.parametrize("case", OWN, ids=str)
def test_zero_3_refuses_a_head_in_parts(found, case):
    for rank in found:
        text = rank[str(case)]
        assert "gathers the parts one by one" in text and "give the loss model(...).logits" in text
