"""What became of the keys and values of earlier studies, in one line each."""

from __future__ import annotations

# What it became, and how it is written.
_KEYS = {
    "sketch.store": ("estimator.store", ""),
    "sketch": ("estimator", "attribution: {estimator: {kind: sketch, dim: ...}}"),
    "attribution.moments": ("curvature.moments", "attribution: {curvature: {kind: adam, moments: ...}}"),
    "attribution.adam_eps": ("curvature.eps", "attribution: {curvature: {kind: adam, eps: ...}}"),
    "attribution.adam_batch": ("curvature.batch", "attribution: {curvature: {kind: adam, batch: ...}}"),
    "attribution.damping": ("curvature.damping", "attribution: {curvature: {kind: ekfac, damping: ...}}"),
    "attribution.checkpoints": (
        "trajectory.checkpoints",
        "attribution: {trajectory: {kind: checkpoints, checkpoints: [...]}}",
    ),
    "attribution.coefficients": ("targets", "name the targets without coefficient:*, e.g. [score, behavior:*]"),
}


def key(name: str) -> str | None:
    """What a key that was is called now, and how it is written; None for one that never was."""
    section, dot, rest = name.partition(".")
    if section == "pairs":
        return f"it is examples{dot}{rest} now"
    if name in _KEYS:
        became, how = _KEYS[name]
    elif section in _KEYS:
        became, how = f"{_KEYS[section][0]}{dot}{rest}", _KEYS[section][1]
    else:
        return None
    return f"it is attribution.{became} now" + (f": {how}" if how else "")


def value(key: str, given: str) -> str | None:
    """What a value that was is called now."""
    return "it is called forward now" if (key, given) == ("attribution.estimator", "jvp") else None
