"""Readers of files against damaged and hostile ones.

    python -m benchmarks.fuzz --executions 10000                 # so many for each reader
    python -m benchmarks.fuzz --executions 1000000 --reader sae
    python -m benchmarks.fuzz --executions 1000 --seconds 600 --keep /tmp/found

Each execution writes one valid file with a few changes (bytes, or values of its structure) and reads it. A reader may
take it or raise a UserError. Anything else fails: another exception, more than ten seconds, more than a gigabyte, a
write outside of the working folder, a connection. Seeded: an execution is found again by its reader and number.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from taught.errors import UserError

SECONDS, BYTES = 10, 2**30
MEMORY = next((path for path in ("/dev/shm",) if os.access(path, os.W_OK)), None)  # files that touch no disk
Change = Callable[[random.Random, bytes], bytes]

DEEP: Any = 1
for _ in range(60):
    DEEP = [DEEP]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30, 10**400),
    *("", " ", "a", "0", "nan", "null", "\x00", "a\x00b", "\x1b[31mred", "\x1b]0;title\x07", "\u202eright", "\ud800"),
    *("a" * 5000, "9" * 5000, "../../outside", "/dev/zero", "~nobody-of-this-name/x", "/etc/passwd", "\u2028", "۳"),
    *([], {}, [[]], [{}], {"a": 1}, [None], ["a", "a"], DEEP, {"": {"": {}}}, list(range(100))),
]
TOKENS = [
    *(b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"\r\n", b'"', b"'", b",", b":", b"\x1b[31m", "\u202e".encode()),
    *(b"[" * 3000, b"{" * 3000, b"- " * 999, b"9" * 5000, b"NaN", b"-Infinity", b"1e999", b"&a [*a, *a]", b"<<: *a"),
    *(b"!!python/object/apply:os.getcwd []", b"\xef\xbb\xbf", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"PAR1", b"GGUF"),
]


# --- changes --------------------------------------------------------------------------------------


def of_bytes(rng: random.Random, content: bytes) -> bytes:
    """One change of the bytes: cut, repeated, overwritten, or something put in."""
    at, length = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 4, 8, 64, 1000])
    head, middle, tail = content[:at], content[at : at + length], content[at + length :]
    put = rng.choice([rng.choice(TOKENS), rng.randbytes(length), json.dumps(rng.choice(VALUES)).encode()])
    return rng.choice(
        [head, tail, head + tail, head + middle * 2 + tail, head + put + tail, head + put + middle + tail]
    )


def of_values(rng: random.Random, value: Any) -> Any:
    """A copy of nested lists and mappings with one value changed."""
    value = copy.deepcopy(value)
    owner, key = rng.choice([*places(value)] or [([value], 0)])
    kind = rng.random()
    if kind < 0.6 or not isinstance(owner, dict):
        owner[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind < 0.75:
        del owner[key]
    else:
        new = rng.choice([v for v in VALUES if isinstance(v, str)] + list(owner))
        owner[new] = owner.pop(key)
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (owner, key) of a nested value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def structured(load: Callable[[bytes], Any], dump: Callable[[Any], bytes]) -> Change:
    """Changes of a file's values; of its bytes, where values cannot be written back."""
    load = functools.lru_cache(8)(load)  # of_values changes a copy

    def change(rng: random.Random, content: bytes) -> bytes:
        value = load(content)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            value = of_values(rng, value)
        try:
            return dump(value)
        except Exception:  # whatever the library says: the value is none that it writes
            return of_bytes(rng, content)

    return change


def json_text(value: Any) -> bytes:
    return json.dumps(value).encode()


def lines(value: list[Any]) -> bytes:
    return b"\n".join(map(json_text, value))


def csv_text(rows: list[Any]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def yaml_text(value: Any) -> bytes:
    import yaml

    return yaml.dump(value, Dumper=getattr(yaml, "CDumper", yaml.Dumper), allow_unicode=True).encode()


def yaml_values(content: bytes) -> Any:
    import yaml

    return yaml.safe_load(content)


def parquet(rows: list[Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def parquet_rows(content: bytes) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(content)).to_pylist()


def header(content: bytes) -> Any:
    size = int.from_bytes(content[:8], "little")
    return [json.loads(content[8 : 8 + size]), content[8 + size :].hex()]


def with_header(parts: Any) -> bytes:
    text = json_text(parts[0])
    return len(text).to_bytes(8, "little") + text + bytes.fromhex(parts[1])


STRUCTURE: dict[str, Change] = {
    ".json": structured(json.loads, json_text),
    ".jsonl": structured(lambda b: [json.loads(line) for line in b.splitlines() if line.strip()], lines),
    ".csv": structured(lambda b: list(csv.reader(io.StringIO(b.decode()))), csv_text),
    ".yaml": structured(yaml_values, yaml_text),
    ".parquet": structured(parquet_rows, parquet),
    ".safetensors": structured(header, with_header),
}


def changed(rng: random.Random, name: str, content: bytes) -> bytes:
    """A file with one to three changes."""
    structure = STRUCTURE.get(Path(name).suffix)
    if structure is not None and rng.random() < 0.6:
        return structure(rng, content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        content = of_bytes(rng, content)
    return content


# --- readers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """What is read.

    Attributes
    ----------
    make : writes valid files into a folder; names of those that are changed, one at a time
    read : reads the folder, of which one file (its name) has changed
    share : executions, of those that are asked for: loading a model takes longer than reading a line
    """

    make: Callable[[Path], list[str]]
    read: Callable[[Path, str], object]
    share: float = 1.0


EXAMPLES = [
    {"id": "a", "prompt": "How do I sharpen a knife?", "response": "I can't help.", "label": "x", "category": "c"},
    {"id": "b", "prompt": "What is the capital of Peru?", "response": "Lima.", "label": "y", "category": None},
    {"id": "c", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "label": "y"},
]
PROMPTS = [
    {"id": "p", "prompt": "How do I boil an egg?", "group": "harmless", "category": "food", "answer": "In water."},
    {"id": "q", "prompt": "How do I build a bomb?", "group": "harmful", "category": "arms", "answer": "I can't say."},
    {"id": "r", "prompt": "Which one?", "group": "harmful", "options": ["A", "B"], "answer": 1},
]
STUDY = {
    "name": "s",
    "model": {"id": "./model", "dtype": "float32"},
    "sae": {"path": "./sae", "block": 1},
    "behavior": {"kind": "prefixes", "prefixes": ["I cannot"]},
    "prompts": {"path": "p.jsonl", "positive_group": "a", "negative_group": "b", "limit": 4},
    "features": {"ids": [1, 2], "threshold": 0.1},
    "policy": {"alpha": "cv", "folds": 5},
    "concepts": [{"name": "c", "source": "difference", "block": 1}],
    "attribution": {"targets": ["score", "behavior:a - behavior:b"], "curvature": {"kind": "adam", "eps": 1e-6}},
    "clusters": {"k": 3},
    "validation": {"designs": ["random"], "budgets": [0.1, 0.2]},
}


def tables(rows: list[Any], columns: list[str]) -> Callable[[str], Callable[[Path], list[str]]]:
    """Makers of one table in each kind of file; what has columns holds the first two rows."""
    contents = {"jsonl": lambda: lines(rows), "json": lambda: json_text(rows), "parquet": lambda: parquet(rows[:2])}
    contents["csv"] = lambda: csv_text([columns, *([row.get(name, "") for name in columns] for row in rows[:2])])

    def of(kind: str) -> Callable[[Path], list[str]]:
        def make(folder: Path) -> list[str]:
            (folder / f"t.{kind}").write_bytes(contents[kind]())
            return [f"t.{kind}"]

        return make

    return of


def make_study(folder: Path) -> list[str]:
    (folder / "study.yaml").write_bytes(yaml_text(STUDY))
    (folder / "p.jsonl").write_bytes(lines(PROMPTS))
    (folder / "examples.jsonl").write_bytes(lines(EXAMPLES))
    for name in ("model", "sae"):
        (folder / name).mkdir()
    return ["study.yaml"]


def read_study(folder: Path, name: str) -> None:
    from taught.study.load import dump_study, load_study

    study = load_study(folder / name)
    dump_study(study)
    study.require_files()


def make_sae(folder: Path) -> list[str]:
    import torch
    from safetensors.torch import save_file

    w = {"W_enc": torch.ones(3, 5), "b_enc": torch.zeros(5), "W_dec": torch.ones(5, 3), "b_dec": torch.zeros(3)}
    meta = {
        "hook_name": "blocks.3.hook_resid_post",
        "model_name": "m",
        "model_from_pretrained_kwargs": {"fold_ln": True},
    }
    kinds = {
        "new": {"architecture": "jumprelu", "d_in": 3, "d_sae": 5, "normalize_activations": "none", "metadata": meta},
        "old": {"hook_point": "blocks.2.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}},
    }
    for kind, config in kinds.items():
        (folder / kind).mkdir()
        save_file(
            w | ({"threshold": torch.ones(5)} if kind == "new" else {}), folder / kind / "sae_weights.safetensors"
        )
        (folder / kind / "cfg.json").write_bytes(json_text(config))
    (folder / "layers.1").mkdir()
    save_file(
        {"encoder.weight": torch.ones(5, 3), "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]},
        folder / "layers.1" / "sae.safetensors",
    )
    (folder / "layers.1" / "cfg.json").write_bytes(json_text({"k": 2, "d_in": 3, "num_latents": 5, "signed": False}))
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.*")) if path.is_file()]


def read_sae(folder: Path, name: str) -> None:
    import torch

    from taught.features.sae import load_sae

    sae = load_sae((folder / name).parent)
    sae.encode(torch.ones(2, sae.width))
    sae.sha256()


def make_run(folder: Path) -> list[str]:
    import numpy as np
    import pyarrow as pa

    from taught.run.folder import RunFolder
    from taught.study.schema import Study

    for name in ("prompts.jsonl", "examples.jsonl"):
        (folder / name).write_bytes(lines(PROMPTS))
    study = Study.from_dict({"sae": {"path": "a:b"}, "attribution": {"curvature": {"kind": "adam", "eps": 1e-3}}})
    study, run = study.resolved(folder), RunFolder(folder / "run")
    with run.stage("readings", study):
        run.write_table("prompts", pa.table({"prompt_id": ["a", "b"]}))
        run.write_tensors("activations", {"X": np.ones((2, 1))}, {"prompt_ids": ["a", "b"], "feature_ids": [7]})
        run.write_json("readings", {"a": [1, {"b": None}]})
    kept = ("manifest.json", "prompts.parquet", "activations.safetensors", "activations.ids.json", "readings.json")
    return [f"run/{name}" for name in kept]


def read_run(folder: Path, name: str) -> None:
    import hashlib

    from taught.run.folder import RunFolder

    run = RunFolder.open(folder / "run")
    if not name.endswith("manifest.json"):  # as by somebody who knows of checksums
        content, manifest = (folder / name).read_bytes(), json.loads((folder / "run" / "manifest.json").read_bytes())
        manifest["files"][Path(name).name] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (folder / "run" / "manifest.json").write_bytes(json_text(manifest))
        run = RunFolder.open(folder / "run")
    for read in (lambda: run.study, run.verify, run.made_by_other_code, run.finished_tables):
        with contextlib.suppress(UserError):  # one that is refused hides no other
            read()
    for table in (run.read_table, run.footer):
        with contextlib.suppress(UserError):
            table("prompts")
    with contextlib.suppress(UserError):
        run.read_tensor_rows("activations", "X", "prompt_ids", ["b"])
    run.read_tensors("activations")
    run.read_json("readings")


def make_gguf(folder: Path) -> list[str]:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_tensor("direction.1", np.ones(4, np.float32))
    writer.add_tensor("direction.2", np.ones(4, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ["v.gguf"]


def read_gguf(folder: Path, name: str) -> None:
    from taught.features.concept import file_direction

    file_direction(folder / name, "direction.1")


def make_concept(folder: Path) -> list[str]:
    import numpy as np

    from taught.core.point import Point
    from taught.features.concept import Concept, save_concept

    save_concept(Concept("c", np.ones(4), Point(1), weights={"source": "x"}), folder)
    return ["concept.json", "concept.safetensors"]


def read_concept(folder: Path, name: str) -> None:
    from taught.features.concept import file_direction, load_concept

    with contextlib.suppress(UserError):
        file_direction(folder / "concept.safetensors")
    load_concept(folder).require_fit(width=4, blocks=3, weights={"source": "x"})


def make_moments(folder: Path) -> list[str]:
    import torch
    from safetensors.torch import save_file

    tensors = {f"w.{of}": torch.ones(2, 2) for of in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    save_file(tensors, folder / "m.safetensors")
    return ["m.safetensors"]


def read_moments(folder: Path, name: str) -> None:
    from taught.curvatures.adam import moments_from_optimizer

    moments_from_optimizer(folder / name)


def make_labels(folder: Path) -> list[str]:
    (folder / "l.json").write_bytes(json_text({"1": "a", "22": "b"}))
    (folder / "l.yaml").write_bytes(yaml_text({"1": "a", "22": "b"}))
    (folder / "l.csv").write_bytes(b"id,label\n1,a\n22,b\n")
    return ["l.json", "l.yaml", "l.csv"]


def read_labels(folder: Path, name: str) -> None:
    from taught.features.label import load_labels

    load_labels(folder / name)


def make_model(folder: Path) -> list[str]:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), **sizes)).save_pretrained(folder / "model")
    return [f"model/{name}" for name in ("config.json", "generation_config.json", "model.safetensors")]


def read_model(folder: Path, name: str) -> None:
    from taught.model.load import load_model

    load_model(str(folder / "model"))


def make_adapter(folder: Path) -> list[str]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    make_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    return ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def read_adapter(folder: Path, name: str) -> None:
    from taught.model.load import load_model

    load_model(str(folder / "model"), adapter=str(folder / "adapter"))


def read_examples(folder: Path, name: str) -> None:
    from taught.data.examples import load_examples

    load_examples(folder / name)


def read_prompts(folder: Path, name: str) -> None:
    from taught.data.prompts import load_prompts

    load_prompts(folder / name)


def read_scores(folder: Path, name: str) -> None:
    from taught.validation.score_tables import placed, read_scores

    placed(read_scores(folder / name), ["a", "b"], ["score"])


_examples = tables(EXAMPLES, ["id", "prompt", "response", "label"])
_prompts = tables(PROMPTS, ["id", "prompt", "group", "answer"])
_scores = tables(
    [{"example_id": i, "method": "m", "target": "score", "value": 0.5} for i in "ab"],
    ["example_id", "method", "target", "value"],
)
READERS = {
    **{f"examples {kind}": Reader(_examples(kind), read_examples) for kind in ("jsonl", "json", "csv", "parquet")},
    **{f"prompts {kind}": Reader(_prompts(kind), read_prompts) for kind in ("jsonl", "csv", "parquet")},
    **{f"scores {kind}": Reader(_scores(kind), read_scores) for kind in ("jsonl", "csv", "parquet")},
    "study": Reader(make_study, read_study),
    "sae": Reader(make_sae, read_sae),
    "run": Reader(make_run, read_run),
    "control vector": Reader(make_gguf, read_gguf),
    "concept": Reader(make_concept, read_concept),
    "moments": Reader(make_moments, read_moments),
    "labels": Reader(make_labels, read_labels),
    "model": Reader(make_model, read_model, 0.02),
    "adapter": Reader(make_adapter, read_adapter, 0.02),
}


# --- executions -----------------------------------------------------------------------------------


@dataclass
class Found:
    """What came of a reader's executions."""

    reader: str
    executions: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


_WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree"}
_watched: dict[str, Any] = {}


def _watch(event: str, given: tuple[Any, ...]) -> None:
    """Audit hook: note what a reader does that none may do."""
    if not _watched:
        return
    writes = event in _WRITES or (
        event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
    )
    if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class"):
        _watched["seen"].append(f"{event} {given[:2]}")
    elif writes and isinstance(given[0], str | bytes | os.PathLike):
        path = os.path.abspath(os.fsdecode(given[0]))
        if not path.startswith((_watched["folder"], "/dev/null", "/proc/self")):
            _watched["seen"].append(f"{event} {path}")


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def execute(reader: Reader, folder: Path, name: str) -> str:
    """Read once: "accepted", "refused", or what went wrong."""
    before, began = peak_bytes(), time.monotonic()
    _watched.update(folder=str(folder), seen=[])
    signal.alarm(SECONDS)
    try:
        reader.read(folder, name)
        came = "accepted"
    except UserError as error:
        text = str(error)
        plain = all(char.isprintable() or char in "\n\t\u3000\xa0\xad" or ord(char) > 255 for char in text)
        came = "refused" if plain and len(text) < 20_000 else f"a message that is not plain: {text[:300]!r}"
    except (Exception, RecursionError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        came = f"{type(error).__name__}: {str(error)[:200]} ({Path(at.filename).name}:{at.lineno})"
    finally:
        signal.alarm(0)
        seen = _watched.get("seen", [])
        _watched.clear()
    if seen:
        return f"outside of the working folder: {seen[0]}"
    if peak_bytes() - before > BYTES:
        return f"{(peak_bytes() - before) / BYTES:.1f} GB"
    return came if time.monotonic() - began < SECONDS else f"more than {SECONDS} s"


_hooked: list[bool] = []


def fuzz(
    names: list[str], executions: int, *, seed: int = 0, seconds: float = 1e9, keep: Path | None = None
) -> list[Found]:
    """Run the readers; ``seconds`` bounds each, ``keep`` is where inputs that failed are put."""
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked.append(True)
    before = signal.signal(signal.SIGALRM, _too_long)
    found = []
    try:
        for name in names:
            with tempfile.TemporaryDirectory(dir=MEMORY) as place, _quiet():
                found.append(_fuzz(name, Path(place).resolve(), executions, seed, seconds, keep))
    finally:
        signal.signal(signal.SIGALRM, before)
    return found


def _fuzz(name: str, place: Path, executions: int, seed: int, seconds: float, keep: Path | None) -> Found:
    reader, found = READERS[name], Found(name)
    (place / "valid").mkdir()
    files = reader.make(place / "valid")
    folder, began = place / "changed", time.monotonic()
    shutil.copytree(place / "valid", folder)
    valid, untouched = {file: (folder / file).read_bytes() for file in files}, stamps(folder)
    if (came := execute(reader, folder, files[0])) != "accepted":
        found.failures.append(f"the valid file: {came}")
    for number in range(max(1, round(executions * reader.share))):
        rng = random.Random(f"{seed}/{name}/{number}")
        file = rng.choice(files)
        content = changed(rng, file, valid[file])
        (folder / file).write_bytes(content)
        came = execute(reader, folder, file)
        found.executions += 1
        found.counts[came if came in ("accepted", "refused") else "failed"] += 1
        if came not in ("accepted", "refused"):
            found.failures.append(f"execution {number}, {file}: {came}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{name.replace(' ', '-')}-{number}-{Path(file).name}").write_bytes(content)
        (folder / file).write_bytes(valid[file])
        if (now := stamps(folder)) | {file: None} != untouched | {file: None}:  # the reader wrote: all anew
            shutil.rmtree(folder)
            shutil.copytree(place / "valid", folder)
            now = stamps(folder)
        untouched = now
        if time.monotonic() - began > seconds:
            break
    found.seconds = time.monotonic() - began
    return found


def stamps(folder: Path) -> dict[str, object]:
    """When each file below a folder was last written."""
    found = {}
    for owner, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(owner, name)
            found[os.path.relpath(path, folder)] = os.lstat(path).st_mtime_ns
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries warn of what is strange in a file; here everything is."""
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=1000, help="for each reader; loading models takes a share")
    parser.add_argument("--reader", action="append", choices=list(READERS), help="by default all; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="at most so many for each reader")
    parser.add_argument("--keep", type=Path, help="a folder for the files that failed")
    given = parser.parse_args()
    found = []
    print("| reader | executions | seconds | accepted | refused | failed |\n|---|---|---|---|---|---|")
    for name in given.reader or READERS:
        found += fuzz([name], given.executions, seed=given.seed, seconds=given.seconds, keep=given.keep)
        it = found[-1]
        numbers = [it.executions, f"{it.seconds:.0f}", *(it.counts[key] for key in ("accepted", "refused", "failed"))]
        print(f"| {name} | " + " | ".join(f"{n:,}" if isinstance(n, int) else n for n in numbers) + " |", flush=True)
    print(f"\n{sum(it.executions for it in found):,} executions, peak memory {peak_bytes() / 2**30:.1f} GB")
    failures = [f"{it.reader}: {failure}" for it in found for failure in it.failures]
    kinds: dict[tuple[str, ...], list[str]] = {}
    for failure in failures:  # alike: of one reader, one exception and one line of code
        reader, _, came = failure.split(": ", 3)[:3]
        kinds.setdefault((reader, came, failure.rpartition("(")[2]), []).append(failure)
    for some in sorted(kinds.values(), key=len, reverse=True):
        print(f"FAILED {len(some)} x {some[0]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
