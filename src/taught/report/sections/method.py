"""Equations, how to read signs and units, and the settings that numbers depend on."""

from __future__ import annotations

from taught.report.blocks import Beside, Block, Facts, Items, Sentence, Text
from taught.report.sections import Section, add
from taught.report.tables import Row, Rows, Tables
from taught.report.text import amount, common_power, count, listed, number, percent, words

# by attribution.curvature
STEP = {
    "identity": "one plain SGD step",
    "adam": "one step of Adam",
    "ekfac": "one step in the metric of EK-FAC",
    "astra": "one step in the damped Gauss-Newton metric",
}
SMOOTH = 0.8  # metasmoothness below it is said; runs that were foreseen well have .83 and more
MISSED = 0.25  # share of a change that the derivative may miss
SETTINGS = (
    "sae.encoder sae.block sae.point readout.position features.threshold features.max_features policy.alpha "
    "policy.intercept policy.folds policy.bootstrap attribution.estimator attribution.curvature attribution.trajectory "
    "attribution.lr"
)


def _blocks(tables: Tables) -> list[Block]:
    curvature = tables.setting("attribution.curvature") or "identity"
    spec = tables.study.get("attribution") or {}
    trajectory = spec.get("trajectory")
    along = trajectory if isinstance(trajectory, dict) and trajectory.get("kind") == "checkpoints" else {}
    points = len(tables.checkpoints or spec.get("checkpoints") or [])
    places = "state of the recorded run" if along.get("run") else count(points, "checkpoint") if points else ""
    lr = "lr that of each checkpoint" if places else f"lr = {tables.setting('attribution.lr')}"
    inverse = "" if curvature == "identity" else "C⁻¹ "
    equations = [
        ("One step on an example", f"δθ = −lr {inverse}∇L(example),   {lr}"),
        ("Influence on a target F", "⟨∇F, δθ⟩"),
    ]
    if tables.through_training:
        equations = [
            ("Training run", "θ(w),   step loss Σᵢ wᵢ L(example i) / n,   w = 1"),
            ("Influence on a target F", "dF(θ(w)) / dwᵢ   at w = 1"),
        ]
    elif tables.with_policy:
        equations = [
            ("Policy", "W = U⁻¹ Xᵀy,   U = XᵀX + α I"),
            ("Residual", "r = y − X W"),
            equations[0],
            ("Feature-activation pathway, x", "ΔW(x) = U⁻¹ (ΔXᵀ r − Xᵀ ΔX W)"),
            ("Output-probability pathway, y", "ΔW(y) = U⁻¹ Xᵀ Δy"),
            ("Score", "S = Σⱼ Wⱼ (ΔW(x)ⱼ + ΔW(y)ⱼ)"),
        ]
    left: list[Block] = [Facts(equations, "equations")]
    if tables.with_policy:
        source = "Source: Symbolic Mechanistic Data Attribution (arXiv 2606.29171)."
        left.append(Text(f"{source} With an intercept, X and y are centred over prompts.", "note"))
    shown = [(key, value) for key in SETTINGS.split() if (value := tables.setting(key)) is not None]
    settings = [(key, str(value).lower() if isinstance(value, bool) else str(value)) for key, value in shown]
    step = STEP.get(curvature, f"one step in the metric of {curvature}")
    if points == 1 and tables.checkpoints:
        step += f" from {tables.checkpoints[0]}"
    elif places:
        step += f" from each {'of ' * bool(points)}{places}, added up,"
    around = "these weights" if places else "the model as it is"
    right: list[Block] = [Text("How to read signs and units", "title"), Items(_reading(tables, step, around))]
    return [Beside(left, [*right, Text("Settings", "title"), Facts(settings, "list")])]


def _reading(tables: Tables, step: str, around: str) -> list[str]:
    said = ["A positive value raises its target when the model is trained on the example."]
    if tables.through_training:
        said += [
            f"The run begins at the weights of {tables.start}; they should not have seen the examples.",
            "Values are derivatives of the trained model’s target in the weight of an example in the whole run; the "
            "behavior is in natural logarithms. Leaving examples out changes the target by about minus their sum.",
            "They are about this run. Where the examples come in another order, one of them may do more or less.",
            *map(smoothness_text, tables.smoothness),
        ]
    elif tables.unit == "rank":
        said.append(
            "Values rank examples and have no unit: they are no changes per step, they do not add up, and they are "
            "compared with other methods by rank. Their standard errors are not known."
        )
    else:
        said += [
            f"Values are changes per {step} at the learning rate above; the behavior is in natural logarithms.",
            f"Everything is a first-order estimate around {around}, not the effect of a whole training run.",
        ]
    if tables.newton:
        said.append("Such a step is Newton’s, whatever training did: read the order of the examples, not the size.")
    if tables.with_policy:
        said += [
            "S > 0: the example pushes the coefficient vector along itself. It is not by itself more of the behavior.",
            "Intended features of an example: those that its column intended names, else those active on its prompt.",
        ]
    return said


def smoothness_text(found: Row) -> str:
    """How smooth training is, and how far the derivative foresaw a change of all weights."""
    text = f"Metasmoothness {number(found['score'])} (1: training changes evenly with the examples’ weights)."
    shown = [row for row in found["targets"] if not row["target"].startswith(("coefficient:", "prompt:"))]
    for row in shown[:4]:
        power = common_power([row["predicted"], row["measured"]])
        text += (
            f" All weights moved at random by {percent(found['h'])}: {words(row['target'])} foreseen "
            f"{amount(row['predicted'], power)}, measured {amount(row['measured'], power)}."
        )
    return text


def derivative_sentence(smoothness: Rows) -> Sentence | None:
    """A caution where the derivative through training did not foresee what other weights did."""
    rough = [one["score"] for one in smoothness if one["score"] < SMOOTH]
    missed = dict.fromkeys(
        row["target"]
        for one in smoothness
        for row in one["targets"]
        if not row["target"].startswith("coefficient:")
        and abs(row["measured"] - row["predicted"]) > MISSED * max(abs(row["measured"]), abs(row["predicted"]))
    )
    if not rough and not missed:
        return None
    text = "The derivative through training may not hold."
    if rough:
        text += f" Metasmoothness is {number(min(rough))}, under {SMOOTH}: try attribution.trajectory.eps_root=1e-8."
    if missed:
        moved = listed([words(name) for name in missed])
        text += f" With other weights of the examples, {moved} moved otherwise than was foreseen."
    return Sentence("Derivative", "caution", text)


def _sentences(tables: Tables) -> list[Sentence]:
    sentence = derivative_sentence(tables.smoothness)
    return [] if sentence is None else [sentence]


add(Section("method", "Method", (), _blocks, _sentences))
