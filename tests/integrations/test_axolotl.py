"""The Axolotl plugin through Axolotl's plugin manager, configuration and trainer."""

import dataclasses
import warnings

import pytest
import torch
from integration_helpers import (
    PAIRS,
    assert_same_steps,
    plain_training,
    tiny_model,
    tiny_rows,
    token_nll,
    training_arguments,
    watch,
)

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
PLUGIN = "segloss.integrations.axolotl.SeglossPlugin"


@pytest.fixture(scope="module", autouse=True)
def axolotl():
    with warnings.catch_warnings():  # it imports TRL's experimental parts, which say so
        warnings.simplefilter("ignore")
        return pytest.importorskip("axolotl.core.trainers")


@pytest.fixture
def manager():
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    manager.plugins.clear()
    manager.register(PLUGIN)
    yield manager
    manager.plugins.clear()


def configuration(**settings):
    """As Axolotl validates a YAML file that names the plugin."""
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    needed = {
        "base_model": "tiny", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
        "micro_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.5,
        "num_epochs": 1, "plugins": [PLUGIN],
    }  # fmt: skip
    return validate_config(DictDefault(needed | settings))


def trainer(manager, folder, cfg, accumulation):
    from axolotl.core.training_args_base import AxolotlTrainingMixins
    from transformers import TrainingArguments

    @dataclasses.dataclass
    class Arguments(AxolotlTrainingMixins, TrainingArguments):
        """Axolotl's own class, without the module that also needs an older TRL."""

    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in tiny_rows()]
    return manager.get_trainer_cls(cfg)(
        model=tiny_model(),
        args=training_arguments(folder, accumulation, Arguments),
        train_dataset=datasets.Dataset.from_list(rows),
    )


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("expression", "name"), [("ce", "cross-entropy"), ("focal(gamma=2.0)", "focal")]
)
def test_training(expression, name, accumulation, manager, tmp_path):
    ours = trainer(manager, tmp_path, configuration(segloss_loss=expression), accumulation)
    assert type(ours).__mro__[2].__name__ == "AxolotlTrainer"
    assert_same_steps(watch(ours), plain_training(tiny_model(), tiny_rows(), PAIRS[name][1]))


def test_sample_weights(manager, tmp_path):
    cfg = configuration(segloss_sample_weights="irdro", segloss_sample_temperature=0.05)

    def loss(logits, target):
        nll, valid = token_nll(logits, target), target != -100
        means = nll.sum(1) / valid.sum(1)
        return (torch.softmax(means.detach() / 0.05, 0) * means).sum()

    found = watch(trainer(manager, tmp_path, cfg, 4))
    assert_same_steps(found, plain_training(tiny_model(), tiny_rows(), loss))


def test_settings(manager):
    cfg = configuration()
    assert (cfg.segloss_loss, cfg.segloss_head) == ("ce", "fused")
    with pytest.raises(ValueError, match="unknown loss 'focel'"):
        configuration(segloss_loss="focel")
    with pytest.raises(ValueError, match="segloss_sample_weights"):
        configuration(segloss_sample_weights="softmax")
    with pytest.raises(ValueError, match="use_eaft is set beside segloss_loss"):
        manager.get_trainer_cls(configuration(use_eaft=True))
