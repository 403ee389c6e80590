"""The result in a few plain sentences, with numbers and intervals and no causal overclaim."""

from __future__ import annotations

from taught.analysis.skills import Skill
from taught.report.blocks import Block, Column, Items, Sentence, Table, Text, Verdict, columns
from taught.report.examples import Summary
from taught.report.sections import Section, add, sentences_of
from taught.report.tables import Tables
from taught.stats.intervals import Interval

WITHOUT_SAE = (
    "This run has no SAE. One would add which features the behavior rests on, how far they explain it, and "
    "through which of them an example acts: sae: in the study."
)


def _blocks(tables: Tables) -> list[Block]:
    nothing = "Nothing was computed in this run yet. taught run STUDY computes what the study asks for."
    sentences = sentences_of(tables)
    found: list[Block] = [Verdict(sentences) if sentences else Text(nothing, "note")]
    if warnings := tables.json("policy").get("warnings"):
        said = [w["message"] if isinstance(w, dict) else str(w) for w in warnings]
        found.append(Items([f"Note: {text}" for text in said], warning=True))
    if known := _skills(tables):
        accuracy = Column("Accuracy", "interval", plot=(0.0, 1.0))
        heads = columns("Group", ("Questions", "number", 0), accuracy, ("Chance", "number"))
        rows = [(s.group, s.n, Interval(s.accuracy, s.lo, s.hi), s.chance) for s in known]
        flagged = frozenset(place for place, skill in enumerate(known) if skill.warning)
        caption = "Share of the questions whose right option the model finds likeliest, with exact 95% interval"
        found.append(Table(heads, rows, caption, fold=20, sortable=True, flagged=flagged))
    return found if tables.with_policy else [*found, Text(WITHOUT_SAE, "note")]


def _skills(tables: Tables) -> list[Skill]:
    return [Skill(**record) for record in tables.json("readings").get("skills") or []]


def _sentences(tables: Tables) -> list[Sentence]:
    return [Sentence("Skill", "caution", f"{w}.") for skill in _skills(tables) if (w := skill.warning) is not None]


def head_facts(tables: Tables) -> list[tuple[str, str]]:
    """What went into the run."""
    facts = []
    if tables.setting("model.id"):
        facts.append(("Model", str(tables.setting("model.id"))))
    if places := tables.checkpoints:
        facts.append(("Influence at", ", ".join(places[:3]) + (f" and {len(places) - 3} more" if places[3:] else "")))
    behavior = tables.study.get("behavior") or {}
    if said := tables.json("readings").get("behavior"):
        facts.append(("Behavior", f"{said['meaning']} ({said['unit']})"))
    elif behavior.get("prefixes"):
        facts.append(("Behavior", "answer begins " + " or ".join(f"“{p}”" for p in behavior["prefixes"])))
    elif behavior.get("kind"):
        facts.append(("Behavior", str(behavior["kind"])))
    if "prompts" in tables:
        groups = [str(p.get("group") or "ungrouped") for p in tables.rows("prompts")]
        first = tables.setting("prompts.positive_group")
        names = sorted(dict.fromkeys(groups), key=lambda name: name != first)
        facts.append(("Prompts", ", ".join(f"{groups.count(name):,} {name}" for name in names)))
    if "coefficients" in tables:
        facts.append(("Features", f"{len(tables.rows('coefficients'))}"))
    if "summary" in tables:
        facts.append(("Examples", f"{len(Summary.read(tables)):,}"))
    if sample := tables.json("sample"):
        by = f", over {', '.join(sample['by'])}" if sample["by"] else ""
        facts.append(("Sample", f"{sample['sampled']:,} of {sample['read']:,}{by}"))
    if repeats := tables.rows("duplicates"):
        facts.append(("Repeats", f"{len(repeats):,} examples repeat another one"))
    if method := tables.json("attribution").get("method"):
        facts.append(("Method", str(method)))
    return facts


add(Section("verdict", "Verdict", (), _blocks, _sentences, overview=True))
