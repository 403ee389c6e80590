"""What became of the keys and values of earlier studies, in one line each."""

from __future__ import annotations

_KEYS = {
    "sketch.store": "attribution.estimator.store",
    "sketch": "attribution.estimator",
    "pairs": "examples",
    "attribution.moments": "attribution.curvature.moments",
    "attribution.adam_eps": "attribution.curvature.eps",
    "attribution.adam_batch": "attribution.curvature.batch",
    "attribution.damping": "attribution.curvature.damping",
    "attribution.checkpoints": "attribution.trajectory.checkpoints",
    "attribution.coefficients": "attribution.targets",
}
_HOW = {
    "sketch": "attribution: {estimator: {kind: sketch, dim: ...}}",
    "attribution.moments": "attribution: {curvature: {kind: adam, moments: ...}}",
    "attribution.adam_eps": "attribution: {curvature: {kind: adam, eps: ...}}",
    "attribution.adam_batch": "attribution: {curvature: {kind: adam, batch: ...}}",
    "attribution.damping": "attribution: {curvature: {kind: ekfac, damping: ...}}",
    "attribution.checkpoints": "attribution: {trajectory: {kind: checkpoints, checkpoints: [...]}}",
    "attribution.coefficients": "name the targets without coefficient:*, e.g. [score, behavior:*]",
}
_VALUES = {("attribution.estimator", "jvp"): "it is called forward now"}


def key(name: str) -> str | None:
    """What a key that was is called now, and how it is written; None for one that never was."""
    section, dot, rest = name.partition(".")
    if name in _KEYS and name != section:
        became, how = _KEYS[name], _HOW.get(name)
    elif section in _KEYS:
        became, how = f"{_KEYS[section]}{dot}{rest}", _HOW.get(section)
    else:
        return None
    return f"it is {became} now" + (f": {how}" if how else "")


def value(key: str, given: str) -> str | None:
    """What a value that was is called now."""
    return _VALUES.get((key, given))
