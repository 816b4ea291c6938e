"""The verdicts of docs/models.md hold: every class by `make test-models`, forty of them always."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
TABLE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
ROWS = re.findall(r"^\| (\w+) \| ([a-z-]+) \| ([a-z ]+) \|", TABLE.read_text(), re.MULTILINE)[1:]
VERDICTS = {(name, kind): verdict for name, kind, verdict in ROWS}
# plain, tied, biased; scaled, capped, padded, masked; mixtures, states, recurrence; several heads
NAMES = """
    BambaForCausalLM BartForCausalLM BertLMHeadModel BioGptForCausalLM BloomForCausalLM
    CohereForCausalLM Cohere2ForCausalLM DeepseekV3ForCausalLM FalconH1ForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM GptOssForCausalLM GraniteForCausalLM
    HyperCLOVAXForCausalLM InklingForCausalLM JetMoeForCausalLM Llama4ForCausalLM LlamaForCausalLM
    MambaForCausalLM MixtralForCausalLM ModernBertDecoderForCausalLM OPTForCausalLM
    ProphetNetForCausalLM Qwen3ForCausalLM RecurrentGemmaForCausalLM RemBertForCausalLM
    xLSTMForCausalLM AyaVisionForConditionalGeneration Cohere2VisionForConditionalGeneration
    LlavaForConditionalGeneration MuseGlimmerForConditionalGeneration
    BartForConditionalGeneration MarianMTModel T5ForConditionalGeneration
    WhisperForConditionalGeneration BertForTokenClassification BertForSequenceClassification
    LlamaForSequenceClassification
"""
SOME = NAMES.split()
CHOSEN = [key for key in VERDICTS if key[0] in SOME]


@pytest.fixture(scope="module")
def sweep():
    """The module beside this one; a folder of tests is on no path."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location("sweep", f"{folder}/sweep.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["sweep"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)
        for name in ("sweep", "tiny"):
            sys.modules.pop(name, None)


quiet = pytest.mark.filterwarnings("ignore")  # of models, about themselves


@quiet
@pytest.mark.parametrize("key", CHOSEN, ids=" ".join)
def test_some(sweep, key):
    found = sweep.verdict_of(*key)
    assert found.verdict == VERDICTS[key], found.reason


def test_those_are_forty_of_all_kinds():
    assert {name for name, _ in CHOSEN} == set(SOME)
    assert len(SOME) == 40
    assert {kind for _, kind in CHOSEN} == {kind for _, kind in VERDICTS}


@pytest.mark.models
@quiet
@pytest.mark.parametrize("key", [key for key in VERDICTS if key not in CHOSEN], ids=" ".join)
def test_all(sweep, key):
    found = sweep.verdict_of(*key)
    assert found.verdict == VERDICTS[key], found.reason


@pytest.mark.models
def test_the_table_has_every_class(sweep):
    named = {(name, kind) for kind, names in sweep.classes().items() for name in names}
    assert named == set(VERDICTS)
