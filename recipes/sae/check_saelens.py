"""Load the shipped SAE with SAELens itself and compare its encoder with ours; write saelens.json.

pip install "sae-lens>=6,<7"
python check_saelens.py RUN        # a run folder of the preset: its read-outs are encoded
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from taught.features.sae import load_sae
from taught.presets import preset_path

FOLDER = preset_path("refusal-smollm2") / "sae"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    h = load_file(parser.parse_args().run / "readouts.safetensors")["h"].float()
    from sae_lens import SAE

    theirs = SAE.load_from_disk(str(FOLDER), device="cpu").float()
    ours = load_sae(FOLDER)
    with torch.no_grad():
        a, b = theirs.encode(h), ours.encode(h)
        back = theirs.decode(a)
    # A feature within rounding of its threshold jumps on in one and not in the other.
    found = {
        "sae_lens": importlib.metadata.version("sae-lens"),
        "class": type(theirs).__name__,
        "tokens": len(h),
        "largest_difference": float((a - b)[(a > 0) == (b > 0)].abs().max()),
        "largest_activation": float(b.abs().max()),
        "active_in_one_only": int(((a > 0) != (b > 0)).sum()),
        "active": int((b > 0).sum()),
        "fvu": float(((h - back) ** 2).sum() / ((h - h.mean(0)) ** 2).sum()),
    }
    (FOLDER / "saelens.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
