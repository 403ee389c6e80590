"""Would a wrong block be noticed? FVU of the shipped SAE on the residuals of other blocks.

    python blocks.py            # a minute on two cores

The limit ``sae.max_fvu`` of the preset stands between its own block and its neighbours.
"""

from __future__ import annotations

import torch

from taught.core.point import Point
from taught.features.sae import fraction_variance_unexplained
from taught.model.readout import read_prompts
from taught.stages.subject import open_subject, prompt_inputs, study_prompts
from taught.study.load import load_study

PROMPTS = 120
BLOCKS = (5, 10, 12, 13, 14, 15, 16, 17, 18, 20, 25)


def main() -> None:
    study = load_study("refusal-smollm2").replace("prompts.limit", PROMPTS)
    subject = open_subject(study)
    encoded = subject.encode(study_prompts(study))
    prompts = prompt_inputs(encoded, study.readout.position)
    print("| block | FVU |\n|---:|---:|")
    for block in BLOCKS:
        h = read_prompts(subject.loaded.model, prompts, subject.behavior, Point(block)).h
        with torch.no_grad():
            fvu = fraction_variance_unexplained(subject.sae, h)
        print(f"| {block} | {float(fvu):.2f} |")


if __name__ == "__main__":
    main()
