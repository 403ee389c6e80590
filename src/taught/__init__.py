"""Which training examples taught a model a behavior, and through which of its features.

Public names are imported on first use, so that ``import taught`` needs neither torch nor time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taught.api import influence
    from taught.core.names import TargetName
    from taught.core.scores import Scores
    from taught.data.examples import load_examples
    from taught.data.prompts import load_prompts
    from taught.errors import UserError
    from taught.features.sae import load_sae
    from taught.model.load import load_model
    from taught.policy.ridge import coefficient_shift, fit_policy
    from taught.run.folder import RunFolder
    from taught.study.load import load_study
    from taught.study.schema import Study
    from taught.training.record import Record

__version__ = "0.1.0"

_HOME = {
    "Scores": "taught.core.scores",
    "TargetName": "taught.core.names",
    "influence": "taught.api",
    "Record": "taught.training.record",
    "RunFolder": "taught.run.folder",
    "Study": "taught.study.schema",
    "UserError": "taught.errors",
    "coefficient_shift": "taught.policy.ridge",
    "fit_policy": "taught.policy.ridge",
    "load_model": "taught.model.load",
    "load_examples": "taught.data.examples",
    "load_prompts": "taught.data.prompts",
    "load_sae": "taught.features.sae",
    "load_study": "taught.study.load",
}

__all__ = [
    "Record",
    "RunFolder",
    "Scores",
    "Study",
    "TargetName",
    "UserError",
    "__version__",
    "coefficient_shift",
    "fit_policy",
    "influence",
    "load_examples",
    "load_model",
    "load_prompts",
    "load_sae",
    "load_study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'taught' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
