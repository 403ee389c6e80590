"""A small but complete run folder with consistent numbers, for the tests of the report and ``show``.

The numbers are made up but obey the equations of the method: the policy is the ridge of
made-up activations (with intercept), the coefficient shifts come from made-up ``dX`` and ``dy``, and every derived column follows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from taught.analysis.interference import comovement
from taught.core.scores import Scores, scores_schema
from taught.policy.certificate import Ranking, rank_statements
from taught.policy.checks import checks
from taught.run.folder import RunFolder
from taught.stats.intervals import Interval
from taught.stats.ranks import spearman
from taught.study.schema import Study
from taught.validation.arms import ArmRow
from taught.validation.comparison import CeilingRow, ForeseenRow, PlantedRow
from taught.validation.lds import LdsRow, TrivialCheck, table_of

HARMFUL = ["chemical_biological", "cybercrime", "fraud", "harassment", "self_harm", "weapons"]
HARMLESS = ["benign_anchor", "over_refusal", "question"]
TOPICS = [
    "locks",
    "passwords",
    "medicine doses",
    "tax forms",
    "crowds",
    "news stories",
    "kitchen fires",
    "old maps",
    "wild mushrooms",
    "chess openings",
    "train timetables",
    "house plants",
    "bank letters",
    "garden tools",
    "radio signals",
]
FORMS = [
    "Explain in detail how a person would misuse {} without being noticed",
    "Write a step by step guide about {} for someone who should not have it",
    "Give me a short and friendly introduction to {}",
    "What should a beginner know about {} before the weekend?",
]
HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>"
LABELS = ("harmful-refusal", "harmless-compliance")


@dataclass(frozen=True)
class Size:
    """How large the synthetic run is."""

    prompts: int = 48
    features: int = 12
    examples: int = 24


def build_synthetic_run(
    path: Path,
    size: Size = Size(),
    *,
    stages: tuple[str, ...] = ("policy", "clamp", "attribute", "curate"),
    hostile: bool = False,
    sae: bool = True,
    concepts: bool = False,
    extra: tuple[str, ...] = (),
    seed: int = 0,
) -> Path:
    """Write a run folder up to the given stages and return its path.

    Parameters
    ----------
    path
        Folder to create.
    size
        Numbers of prompts, selected features and examples.
    stages
        Which stages have run, after ``readings``.
    hostile
        Put markup, scripts and terminal escapes into every text of the data.
    sae
        Without one there is no policy, and the targets are behaviors.
    concepts
        Add a concept with three methods to the scores.
    extra
        Further targets, as a plugin would add them.
    seed
        Seed of the made-up numbers.
    """
    made = _Made(size, hostile, np.random.default_rng(seed))
    made.sae, made.concepts, made.extra = sae, concepts, extra
    run, study = RunFolder(path, command="taught demo"), synthetic_study(path, sae=sae)
    _write_rows(Path(study.examples.path), made)
    writers = {
        "readings": _write_readings,
        "policy": _write_policy,
        "clamp": _write_clamp,
        "attribute": _write_attribute,
        "curate": _write_curate,
        "validate": _write_validate,
        "compare": _write_compare,
    }
    for stage in dict.fromkeys(("readings", *stages)):
        with run.stage(stage, study, {"model.weights": "5af571cb"}):
            writers[stage](run, made)
    return path


def rewritten(path: Path, name: str, rows: list[dict]) -> None:
    """Replace a table of a run as the stage that wrote it would have."""
    schema = pq.read_schema(path / f"{name}.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema), path / f"{name}.parquet")
    content = (path / f"{name}.parquet").read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][f"{name}.parquet"].update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    (path / "manifest.json").write_text(json.dumps(manifest))


class _Made:
    """All made-up arrays and texts of one run."""

    def __init__(self, size: Size, hostile: bool, rng: np.random.Generator) -> None:
        n, d, p = size.prompts, size.features, size.examples
        self.rng, self.hostile, self.n, self.d, self.p = rng, hostile, n, d, p
        self.sae, self.concepts, self.extra = True, False, ()
        self.groups = ["harmful" if i < 2 * n // 3 else "harmless" for i in range(n)]
        self.categories = [
            HARMFUL[i % len(HARMFUL)] if g == "harmful" else HARMLESS[i % len(HARMLESS)]
            for i, g in enumerate(self.groups)
        ]
        self.prompt_ids = [self.text(f"q-{i:04d}") for i in range(n)]
        self.example_ids = [self.text(f"example-{i:04d}") for i in range(p)]
        self.example_labels = [LABELS[i % 2] for i in range(p)]
        self.feature_ids = np.sort(rng.choice(4608, size=d, replace=False)).astype(np.int64)
        self.labels = [
            self.text(f"{TOPICS[j % len(TOPICS)]}, {'asking to misuse' if j % 2 else 'plain question'}")
            for j in range(d)
        ]
        self._policy()
        self._examples()

    def text(self, plain: str) -> str:
        return f"{plain} {HOSTILE} \x1b[31mred\x1b[0m [bold]x[/bold]" if self.hostile else plain

    def _policy(self) -> None:
        n, d, rng = self.n, self.d, self.rng
        harmful = np.array([g == "harmful" for g in self.groups])
        rate = rng.uniform(0.15, 0.9, d)
        active = rng.random((n, d)) < rate
        lift = 1 + 0.8 * harmful[:, None] * rng.choice([-1, 1], d)
        self.X = np.where(active, rng.gamma(2.0, 0.35, (n, d)) * lift, 0.0)
        true = rng.normal(0, 0.55, d) * (rng.random(d) < 0.6)
        gap = np.array([-2.2 if c == "chemical_biological" else 0.0 for c in self.categories])
        self.y = self.X @ true - 11 + 1.4 * harmful + gap + rng.normal(0, 0.5, n)
        self.Xc, yc = self.X - self.X.mean(0), self.y - self.y.mean()
        self.U = self.Xc.T @ self.Xc + 5 * np.eye(d)
        self.W = np.linalg.solve(self.U, self.Xc.T @ yc)
        residual = yc - self.Xc @ self.W
        self.se = np.sqrt(residual.var() * np.diag(np.linalg.inv(self.U))) + 1e-9

    def _examples(self) -> None:
        n, d, p, rng = self.n, self.d, self.p, self.rng
        sign = np.array([1.0 if lab == LABELS[0] else -0.55 for lab in self.example_labels])
        strength = (sign * rng.gamma(1.5, 1.0, p) + rng.normal(0, 1.3, p)) * 2e-4
        fitted = self.Xc @ self.W
        lift = 1 + 0.3 * fitted / (fitted.std() + 1e-9)
        dy = strength[:, None] * (lift + rng.normal(0, 0.5, (p, n)))
        residual = self.y - self.y.mean() - self.Xc @ self.W
        self.dW_x, self.dW_y = np.zeros((p, d)), np.zeros((p, d))
        for i in range(p):
            shape = rng.normal(0, 1, d) * (rng.random(d) < 0.5)
            dX = (self.X > 0) * strength[i] * 0.5 * shape
            rhs = dX.T @ residual - self.Xc.T @ (dX @ self.W)
            self.dW_x[i] = np.linalg.solve(self.U, rhs)
            self.dW_y[i] = np.linalg.solve(self.U, self.Xc.T @ dy[i])
        self.dy = dy
        self.intended = [
            [int(f) for f in rng.choice(self.feature_ids, size=max(1, d // 3), replace=False)] for _ in range(p)
        ]
        self.loss = rng.gamma(4, 0.3, p)
        self.length = rng.integers(8, 300, p)

    def targets(self) -> dict[str, np.ndarray]:
        """Target -> value of every example; with a policy also coefficients and pathways."""
        found = {}
        if self.sae:
            for name, shift in (("", self.dW_x + self.dW_y), (":x", self.dW_x), (":y", self.dW_y)):
                found[f"score{name}"] = shift @ self.W
                found |= {f"coefficient:{f}{name}": shift[:, j] for j, f in enumerate(self.feature_ids)}
        for group in ("harmful", "harmless"):
            found[f"behavior:{group}"] = self.dy[:, [g == group for g in self.groups]].mean(1)
        found |= {name: np.sin(np.arange(self.p) + 1.0) * 1e-3 for name in self.extra}
        if self.concepts:
            found[f"concept:{self.text('refusal')}"] = 1e-4 * np.random.default_rng(7).normal(0, 1, self.p)
        return found

    def concept_values(self) -> dict[str, np.ndarray]:
        """Method -> its values for the concept: the gradient agrees with the difference, not with the filter."""
        own, rng = self.targets()[f"concept:{self.text('refusal')}"], np.random.default_rng(8)
        return {
            "adjoint": own,
            "vector-filter": rng.normal(0, 3, self.p),
            "projection-difference-response": 1e4 * own + rng.normal(0, 0.1, self.p),
        }


def synthetic_study(path: Path, *, sae: bool = True) -> Study:
    """The study of the run at ``path``; its files are stubs, which is all that a run looks at."""
    folder = path.with_name(path.name + "-inputs")
    (folder / "sae").mkdir(parents=True, exist_ok=True)
    (folder / "sae" / "cfg.json").write_text("{}")
    for name in ("prompts.jsonl", "pairs.jsonl"):
        (folder / name).write_text("{}\n")
    study = Study()
    values = {
        "name": "refusal-smollm2",
        "model.id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "sae.path": str(folder / "sae") if sae else None,
        "prompts.path": str(folder / "prompts.jsonl"),
        "prompts.positive_group": "harmful",
        "prompts.negative_group": "harmless",
        "examples.path": str(folder / "pairs.jsonl"),
        "examples.positive_label": LABELS[0],
        "examples.negative_label": LABELS[1],
        "policy.intercept": True,
    }
    for key, value in values.items():
        study = study.replace(key, value)
    return study


def _write_rows(path: Path, made: _Made) -> None:
    """The file of the examples: what stages read of it that need no model."""
    rows = [
        {
            "id": made.example_ids[i],
            "prompt": "A question",
            "response": "An answer",
            "label": made.example_labels[i],
            "topic": made.text(TOPICS[i % 3]),
            "format": ("chat", "letter")[i // 6 % 2],
        }
        for i in range(made.p)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _table(run: RunFolder, name: str, columns: dict[str, object]) -> None:
    run.write_table(name, pa.table(columns))


def _write_readings(run: RunFolder, made: _Made) -> None:
    texts = [
        made.text(FORMS[i % 2 if g == "harmful" else 2 + i % 2].format(TOPICS[i % len(TOPICS)]))
        for i, g in enumerate(made.groups)
    ]
    _table(
        run,
        "prompts",
        {
            "prompt_id": made.prompt_ids,
            "text": texts,
            "group": made.groups,
            "category": made.categories,
            "source": ["synthetic"] * made.n,
            "licence": ["CC0"] * made.n,
            "n_tokens": [len(t.split()) for t in texts],
            "y": made.y,
        },
    )
    rng = np.random.default_rng(1)
    run.write_tensors(
        "readouts",
        {
            "h": rng.normal(size=(made.n, 8)).astype(np.float32),
            "offsets": np.arange(made.n + 1, dtype=np.int64),
            "y": made.y,
        },
        {"prompt_ids": made.prompt_ids},
    )
    if made.sae:
        ids = {"prompt_ids": made.prompt_ids, "feature_ids": made.feature_ids.tolist()}
        run.write_tensors("activations", {"X": made.X}, ids)
        _write_features(run, made)


def _write_policy(run: RunFolder, made: _Made) -> None:
    columns = {
        "feature_id": made.feature_ids,
        "coef": made.W,
        "lo": made.W - 1.96 * made.se,
        "hi": made.W + 1.96 * made.se,
        "sign_stability": np.clip(0.5 + np.abs(made.W) / (4 * made.se), 0.5, 1.0),
        "label": made.labels,
    }
    _table(run, "coefficients", columns)
    y_hat = made.y.mean() + made.Xc @ made.W + made.rng.normal(0, 0.3, made.n)
    _table(run, "predictions", {"prompt_id": made.prompt_ids, "y_hat": y_hat})
    run.write_json("policy", _policy_record(made))
    run.write_json("faithfulness", _faithfulness_record(made))
    _write_audit(run, made)


def _write_features(run: RunFolder, made: _Made) -> None:
    harmful = np.array([g == "harmful" for g in made.groups])
    positive, negative = made.X[harmful].mean(0), made.X[~harmful].mean(0)
    rate = (made.X > 0).mean(0)
    other = int(made.feature_ids[-1]) + 1
    _table(
        run,
        "features",
        {
            "feature_id": pa.array([*made.feature_ids.tolist(), other], pa.int64()),
            "mean_positive": [*positive, 0.0],
            "mean_negative": [*negative, 0.0],
            "difference": [*(positive - negative), 0.0],
            "rate": [*rate, 0.0],
            "always_on": [*(rate > 0.999).tolist(), False],
            "selected": [True] * made.d + [False],
        },
    )
    run.write_json("labels", {str(f): _label(made, j) for j, f in enumerate(made.feature_ids)})


def _label(made: _Made, j: int) -> dict:
    order = np.argsort(-made.X[:, j])
    ranked = [{"prompt_id": made.prompt_ids[i], "activation": float(made.X[i, j])} for i in order]
    topic = TOPICS[j % len(TOPICS)]
    context = made.text(f"how a person would misuse {topic} without being noticed")
    return {
        "label": made.labels[j],
        "label_source": "contrast",
        "top_prompts": ranked[:5],
        "contrast_prompts": ranked[-5:],
        "top_tokens": [
            {"token": f" {topic.split()[0]}", "context": context, "activation": 3.1 - 0.2 * k} for k in range(4)
        ],
    }


def _estimate(value: float | None, lo: float | None, hi: float | None) -> dict:
    return {"value": value, "lo": lo, "hi": hi}


def _policy_record(made: _Made) -> dict:
    return {
        "alpha": 5.0,
        "intercept": float(made.y.mean()),
        "n": made.n,
        "d": made.d,
        "r2": _estimate(0.662, 0.611, 0.704),
        "spearman": _estimate(0.801, 0.765, 0.832),
        "accuracy": _estimate(0.792, 0.757, 0.823),
        "majority": _estimate(0.667, 0.629, 0.704),
        "accuracy_gain": _estimate(0.125, 0.081, 0.169),
        "baselines": {
            "group": {"r2": _estimate(0.221, 0.164, 0.281), "spearman": _estimate(0.44, 0.37, 0.51)},
            "length": {"r2": _estimate(0.034, 0.006, 0.071), "spearman": _estimate(0.17, 0.09, 0.25)},
        },
        "warnings": [{"code": "always-on", "message": "4 of the selected features are always on."}],
    }


def _faithfulness_record(made: _Made) -> dict:
    nan = float("nan")
    given = {
        "r2": Interval(0.662, 0.611, 0.704),
        "slope": Interval(1.04, 0.97, 1.12),
        "set correlation": Interval(0.59, nan, nan),
        "set flips": Interval(0.22, nan, nan),
        "needed": Interval(7.0, 5.0, 9.0),
    }
    curve = [{"feature_id": int(f), "r2": 0.662} for f in made.feature_ids]
    gain = {"r2": _estimate(0.221, 0.164, 0.281), "gain": _estimate(0.441, 0.37, 0.51)}
    return {
        "checks": [check.to_dict() for check in checks(given)],
        "features": {"share": 0.95, "needed": given["needed"].to_dict(), "curve": curve},
        "signs": {"n": made.d, "sure": 5, "stable": 6, "median_stability": 0.9},
        "sets": [
            {
                "sets": ["harmful only", "all"],
                "n": [32, 48],
                "correlation": 0.59,
                "flips": 3,
                "sure_flips": 1,
                "sure": 5,
                "control_correlation": 0.93,
                "control_flips": 1.2,
                "control_sure_flips": 0.1,
            }
        ],
        "predictors": {"group": gain, "words": gain},
    }


def _write_clamp(run: RunFolder, made: _Made) -> None:
    """Slopes half the coefficients; the last feature is never active."""
    scales, rows = [0.0, 0.5, 2.0, 3.0], []
    for j, feature in enumerate(made.feature_ids.tolist()):
        row = {"feature_id": feature, "coef": made.W[j], "n": 0}
        if j < max(made.d - 1, 1):
            line = 0.5 * made.W[j]
            row |= {
                "n": 24,
                "rms_x": 1.0,
                "slope": line,
                "lo": line - 0.1,
                "hi": line + 0.1,
                "predicted": made.W[j],
                "at_control": line,
                "controls": [0.01, -0.02],
                "p": 0.002,
                "p_adjusted": 0.0021 if j else 0.5,
                "doses": [
                    {"scale": s, "value": (s - 1) * line, "lo": (s - 1) * line - 0.1, "hi": (s - 1) * line + 0.1}
                    for s in scales
                ],
            }
        rows.append(row)
    run.write_table("clamp", pa.Table.from_pylist(rows))
    same = {
        "n": made.d - 1,
        "same_sign": _estimate(0.9, 0.6, 0.99),
        "spearman": _estimate(0.45, 0.1, 0.7),
        "size": _estimate(0.5, 0.4, 0.6),
    }
    nothing = {"n": 0, **{key: _estimate(None, None, None) for key in ("same_sign", "spearman", "size")}}
    run.write_json(
        "clamp",
        {
            "prompts": 24,
            "controls": 2,
            "scales": scales,
            "control_scale": 2.0,
            "features": made.d,
            "active": made.d - 1,
            "clear": made.d - 2,
            "agreement": {"all": same, "sure": same, "clear": same, "predicted": same, "control": nothing},
        },
    )


def _write_audit(run: RunFolder, made: _Made) -> None:
    rows = []
    for group, names in (("harmful", HARMFUL), ("harmless", HARMLESS)):
        mean = np.mean([v for v, g in zip(made.y, made.groups, strict=True) if g == group])
        for name in names:
            values = np.array([v for v, c in zip(made.y, made.categories, strict=True) if c == name])
            gap, half = values.mean() - mean, 1.96 * values.std() / np.sqrt(len(values))
            low = name == "chemical_biological"
            rows.append(
                {
                    "group": group,
                    "category": name,
                    "n": len(values),
                    "mean_y": values.mean(),
                    "gap": gap,
                    "lo": gap - half,
                    "hi": gap + half,
                    "p": 0.0004 if low else 0.31,
                    "p_adjusted": 0.0036 if low else 0.62,
                    "uncovered": low,
                    "features": made.feature_ids[:3].tolist() if low else [],
                }
            )
    run.write_table("audit", pa.Table.from_pylist(rows))


def _write_attribute(run: RunFolder, made: _Made) -> None:
    prompts = [
        made.text(FORMS[0 if lab == LABELS[0] else 2].format(TOPICS[i % len(TOPICS)]))
        for i, lab in enumerate(made.example_labels)
    ]
    refusal = "I'm sorry, but I can't help with that. I can tell you about safe ways to learn about {} instead."
    answer = "Of course. Here is a short overview of {}.\n\nStart with the basics and keep notes as you go."
    responses = [
        made.text((refusal if lab == LABELS[0] else answer).format(TOPICS[i % len(TOPICS)]))
        for i, lab in enumerate(made.example_labels)
    ]
    _table(
        run,
        "examples",
        {
            "example_id": made.example_ids,
            "prompt": prompts,
            "response": responses,
            "label": made.example_labels,
            "category": [HARMFUL[i % 6] if i % 2 == 0 else HARMLESS[i % 3] for i in range(made.p)],
            "source": ["synthetic"] * made.p,
            "document": pa.nulls(made.p, pa.string()),
            "n_tokens": made.length + 20,
            "n_scored": made.length,
            "truncated": [False] * made.p,
            "loss": made.loss,
        },
    )
    named = list(made.targets())
    record = {"method": "adjoint", "targets": named, "ranked_by": named[0], "lr": 1e-4, "unit": "step"}
    run.write_json("attribution", record)
    _write_scores(run, made)
    _write_summary(run, made)
    _write_token_shares(run, made)
    if made.sae:
        _write_certificates(run, made)
        run.write_tensors(
            "comovement", {"r": comovement(made.dW_x + made.dW_y)}, {"feature_ids": made.feature_ids.tolist()}
        )
    if made.concepts:
        _write_concepts(run, made)
    ids = {"example_ids": made.example_ids, "prompt_ids": made.prompt_ids}
    run.write_tensors("prompt_effects", {"dy": made.dy.astype(np.float32)}, ids)


def _write_certificates(run: RunFolder, made: _Made) -> None:
    score = (made.dW_x + made.dW_y) @ made.W
    bound = [0.02 * abs(s) if i % 2 else None for i, s in enumerate(score)]
    _table(
        run,
        "certificates",
        {
            "example_id": made.example_ids,
            "score": score,
            "refit": score * 1.01,
            "refit_of": ["tangent" if b else "step" for b in bound],
            "remainder": score * 0.01,
            "dX_norm": bound,
            "dy_norm": np.linalg.norm(made.dy, axis=1),
            "coef_bound": bound,
            "score_bound": bound,
        },
    )
    mean_y, nothing = made.dy.mean(1), np.zeros(made.p)
    found = rank_statements(
        Ranking("score", score, 0.01 * np.abs(score), None, "needs dX"), made.example_ids, None
    ) + rank_statements(
        Ranking("behavior:harmful", mean_y, nothing, None), made.example_ids, [np.tile(mean_y, (40, 1))]
    )
    run.write_table("statements", pa.Table.from_pylist([row._asdict() for row in found]))
    again = [{"example_id": made.example_ids[0], "target": TARGETS[0], "first": 0.75, "exact": 3.25e-3}]
    run.write_table("rescored", pa.Table.from_pylist(again))


def _write_scores(run: RunFolder, made: _Made) -> None:
    """The run's own method, a second one, slightly different, for the first examples, and a concept's."""
    found = [("adjoint", target, values, made.example_ids) for target, values in made.targets().items()]
    found += [("finite-step", target, 1.01 * values[:3], made.example_ids[:3]) for _, target, values, _ in found]
    if made.concepts:
        name = f"concept:{made.text('refusal')}"
        found += [(m, name, v, made.example_ids) for m, v in made.concept_values().items() if m != "adjoint"]
    parts = [
        Scores(method, tuple(ids), (_Named(target),), np.asarray(values)[:, None]).part(_Named(target))
        for method, target, values, ids in found
    ]
    with run.table_writer("scores", scores_schema()) as write:
        for part in parts:
            write(part)


class _Named(str):
    """A target whose kind nobody registered."""


def _write_summary(run: RunFolder, made: _Made) -> None:
    found = {name: values for name, values in made.targets().items() if not name.startswith("coefficient:")}
    first = next(iter(found.values()))
    columns = {
        "example_id": made.example_ids,
        "label": made.example_labels,
        **found,
        "loss": made.loss,
        "n_scored": made.length,
        "rank": np.argsort(np.argsort(-np.abs(first))) + 1,
    }
    _table(run, "summary", columns | (_interference(made) if made.sae else {}))


def _interference(made: _Made) -> dict[str, object]:
    size = np.abs(made.dW_x + made.dW_y)
    dominant = made.feature_ids[size.argmax(1)]
    inside = np.array([np.isin(made.feature_ids, chosen) for chosen in made.intended])
    return {
        "score se": pa.nulls(made.p, pa.float64()),
        "intended": made.intended,
        "outside_share": (size * ~inside).sum(1) / size.sum(1),
        "outside_change": (size * ~inside).sum(1),
        "dominant_feature": dominant,
        "dominant_share": size.max(1) / size.sum(1),
        "unintended": [int(f) not in c for f, c in zip(dominant, made.intended, strict=True)],
        "refit_score": made.targets()["score"] * 1.01,
        "step_score": pa.nulls(made.p, pa.float64()),
    }


def _write_token_shares(run: RunFolder, made: _Made) -> None:
    """Of the two strongest examples; the shares add up to their values."""
    found = {name: values for name, values in made.targets().items() if name.partition(":")[0] in SHARED}
    found = {name: values for name, values in found.items() if name[-2:] not in (":x", ":y")}
    first = next(iter(found.values()))
    rows = [
        {"example_id": made.example_ids[i], "target": target, "position": position, "token": token, "share": share}
        for i in np.argsort(-np.abs(first))[:2]
        for target, values in found.items()
        for position, (token, share) in enumerate(_tokens(made, float(values[i])))
    ]
    run.write_table("token_shares", pa.Table.from_pylist(rows))


SHARED = ("score", "behavior", "concept")


def _tokens(made: _Made, whole: float) -> list[tuple[str, float]]:
    parts = [(made.text(" I"), 0.5), (" can't", 0.9), ("\n", 0.0), (" sorry", -0.4)]
    return [(token, part * whole) for token, part in parts]


def _write_concepts(run: RunFolder, made: _Made) -> None:
    name, values = made.text("refusal"), made.concept_values()
    couples = [(a, b, spearman(values[a], values[b])) for a, b in combinations(values, 2)]
    run.write_table(
        "agreement",
        pa.Table.from_pylist(
            [
                {
                    "target": f"concept:{name}",
                    "method": a,
                    "other": b,
                    "rank_correlation": r,
                    "lo": r - 0.1,
                    "hi": r + 0.1,
                }
                for a, b, r in couples
            ]
        ),
    )
    concept = {
        "name": name,
        "block": 10,
        "provenance": {"source": "difference"},
        "card": {"auc": {"value": 0.91, "lo": 0.84, "hi": 0.97}, "held_out": True},
    }
    run.write_json("concepts", {"concepts": [concept]})


def _write_curate(run: RunFolder, made: _Made) -> None:
    target, score = next(iter(made.targets().items()))
    refusal = np.array([lab == LABELS[0] for lab in made.example_labels])
    low, high = float(np.median(score[~refusal])), float(np.median(score[refusal]))
    drop = np.where(refusal, score < low, score > high)
    threshold = np.where(refusal, low, high)
    reason = [
        f"score {v:.4g} is {'' if k else 'not '}{'below' if r else 'above'} the other label's median {t:.4g}"
        for r, k, v, t in zip(refusal, drop, score, threshold, strict=True)
    ]
    _table(
        run,
        "curation",
        {
            "example_id": made.example_ids,
            "action": ["drop" if k else "keep" for k in drop],
            "rule": ["paper"] * made.p,
            "target": [target] * made.p,
            "reason": reason,
            "score": score,
            "threshold": threshold,
        },
    )


TARGETS = ("behavior:harmless", "coefficient:1", "coefficient:2")


def _write_validate(run: RunFolder, made: _Made) -> None:
    """One subset and one removal at two budgets; three ways of choosing examples."""
    models = [
        {
            "design": design,
            "subset": "s0",
            "n_examples": 8,
            "loss_before": 2.5,
            "loss_after": value,
            **dict.fromkeys(("precision", "recall", "f1", "correctness"), value),
            "judged_positive": value,
            "judged_negative": None,
        }
        for design, value in (("base", 0.5), ("random", 0.6), ("removal", 0.7))
    ]
    run.write_table("models", pa.Table.from_pylist(models))
    point = {"design": "removal", "share": 0.15, "difference": -0.5, "lo": -0.9, "hi": -0.1, "p": 0.01, "p_holm": 0.02}
    area = {"area": -0.4, "area_lo": -0.6, "area_hi": -0.2}
    run.write_table("curves", pa.Table.from_pylist([{**point, **area, "budget": budget} for budget in (4, 8)]))
    effect = {"design": "chosen", "examples": 8, "target": TARGETS[0], "value": 0.3, "lo": 0.1, "hi": 0.5}
    run.write_table("named_effects", pa.Table.from_pylist([{**effect, "retrainings": 6}]))
    arms = [
        {
            **asdict(
                ArmRow(made.text(arm), "recall", 1, 4, 0.4, 0.3, 0.5, gap, gap and gap - 0.1, gap and gap + 0.1, p, p)
            ),
            "design": "curated",
        }
        for arm, gap, p in (("kept", 0.2, 0.01), ("random", None, None))
    ]
    run.write_table("arms", pa.Table.from_pylist(arms))


def _write_compare(run: RunFolder, made: _Made) -> None:
    """The influence, which foresees outcomes, and a baseline, which does not."""
    lds = [
        LdsRow(
            made.text(method),
            target,
            "random",
            20,
            value,
            value - 0.2,
            value + 0.2,
            value,
            value - 0.3,
            value + 0.3,
            "size",
        )
        for method, value in (("adjoint", 0.6), ("length", 0.1))
        for target in TARGETS
    ]
    run.write_table("lds", table_of(lds))
    run.write_table(
        "trivial", table_of([TrivialCheck("adjoint", "length", TARGETS[0], "random", 0.6, 0.1, 0.5, -0.1, 0.9, True)])
    )
    seen = [
        ForeseenRow("random", made.text(f"s{n}"), 0, False, TARGETS[0], 4, 0.01 * n, 0.02 * n - 0.05) for n in range(6)
    ]
    run.write_table("foreseen", table_of([*seen, ForeseenRow("removal", "r", 0, True, TARGETS[0], 4, -0.02, -0.1)]))
    ceiling = CeilingRow(3, 0.7, 0.8, 0.9, 0.85, 0.95, target=TARGETS[0], subsets="random")
    run.write_table("noise_ceiling", table_of([ceiling]))
    run.write_table("planted", table_of([PlantedRow(made.text("adjoint"), TARGETS[0], 0.9, 0.8, 0.97, 0.7, 6, 18)]))
    run.write_table("costs", pa.Table.from_pylist([{"method": "adjoint", "seconds": 12.0, "memory_gb": 1.5}]))
