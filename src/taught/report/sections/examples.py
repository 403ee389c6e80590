"""Who moves what: the strongest examples for every target, all listed examples, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from taught.report.agreement import agreement_blocks
from taught.report.blocks import (
    Block,
    Column,
    Details,
    Example,
    Feature,
    Line,
    Sentence,
    Strips,
    Table,
    Text,
    Word,
    columns,
)
from taught.report.examples import (
    PRIMARY,
    SE,
    STRONGEST,
    Summary,
    ends,
    is_behavior,
    primary,
    scored,
    shown,
    summary_schema,
    targets,
    texts,
)
from taught.report.sections import Section, add
from taught.report.strips import Strip, strips
from taught.report.tables import Row, Rows, Tables
from taught.report.text import (
    amount,
    clean,
    common_power,
    count,
    interval_text,
    listed,
    percent,
    shorten,
    signed,
    tens,
    words,
)
from taught.stats.intervals import Interval

NOTHING = "No effect found"
NEGLIGIBLE = 0.02  # of the largest absolute value
MAINLY = 1.5  # one pathway this many times the other carries the score
ENDS = 5
NORMAL = 1.96
MAX_COLUMNS = 8
SAID = 4  # targets that a sentence names
OTHERS = ("prompt:", "concept:")  # single prompts are too many, concepts have a section of their own


def named_targets(names: Sequence[str]) -> list[str]:
    """Targets whose strongest examples are named: behaviors, then others, then the policy's score."""
    own = [name for name in names if not name.startswith(OTHERS)]
    return sorted(own, key=lambda name: name == PRIMARY)


def _blocks(tables: Tables) -> list[Block]:
    rows = shown(tables)
    lede = "What one training step on each example does to the targets. Positive: training on it raises the target."
    if tables.through_training:
        lede = (
            "What each example did to the targets of the trained model: their derivative in the weight that it has in "
            "the whole training run. Positive: training on it raised the target; without it, the target ends lower by "
            "about so much."
        )
    if tables.unit == "rank":
        lede = (
            "How the gradient of each example lies to those of the targets: values to rank examples by, without a "
            "unit. Positive: training on it raises the target. They do not add up, and their error is not known."
        )
    if PRIMARY in targets(tables):
        lede += (
            " S is the policy’s score. S > 0: the coefficient vector moves along itself, so the policy grows "
            "stronger as it is; that alone does not mean more of the behavior."
        )
    movers = [_movers(tables, rows, target) for target in named_targets(targets(tables))[:MAX_COLUMNS]]
    compared = dict.fromkeys(r["target"] for r in tables.rows("agreement") if not r["target"].startswith(OTHERS))
    agreed = (block for target in compared for block in agreement_blocks(tables, target))
    return [Text(lede), *movers, *_strips(tables), *_all(tables, rows), *agreed]


def _movers(tables: Tables, rows: Rows, target: str) -> Table:
    """The examples that raise a target most, then those that lower it most."""
    up, down = ends(rows, target, ENDS)
    power = common_power(row[target] for row in (*up, *down))
    errors = any(row.get(target + SE) for row in (*up, *down))
    head = f"{'Value' if tables.unit == 'rank' else 'Change'} {tables.per}"
    value = Column(head, "signed", power=power, plot="fit" if errors else None)
    made = []
    for row in (*up, *reversed(down)):
        own = texts(tables).get(row["example_id"], {})  # a document has no prompt
        said = shorten(str(own.get("prompt") or own.get("response") or ""), 90)
        made.append((Example(row["example_id"]), _with_error(row, target), row["label"], said))
    caption = f"{_capital(words(target))}: the examples that raise it most, and those that lower it most"
    heads = columns("Example", value, "Label", "Prompt, or text")
    return Table(heads, made, caption, empty="No example moves it.", head=2 * ENDS)


def _with_error(row: Row, target: str) -> float | Interval | None:
    value, se = row[target], row.get(target + SE)
    if value is None or se is None:
        return None if value is None else float(value)
    return Interval(value, value - NORMAL * se, value + NORMAL * se)


def _strips(tables: Tables) -> list[Block]:
    found: dict[str, list[tuple[str, Strip]]] = {}
    for strip in strips(tables.rows("token_shares")):
        if not strip.target.startswith(OTHERS):
            found.setdefault(strip.example_id, []).append((words(strip.target), strip))
    if not found:
        return []
    text = (
        "Which tokens carry it: the effect of an example is a sum over the tokens that it teaches. Here "
        f"for the {count(len(found), 'example')} with the largest effects; numbers stand in "
    )
    every = [
        Details(Example(example), [Strips(own, key=i == len(found) - 1)], open=i == 0)
        for i, (example, own) in enumerate(found.items())
    ]
    return [Text(Line((text, Word("token_shares.parquet", "code"), "."))), *every]


def _all(tables: Tables, rows: Rows) -> list[Block]:
    """All listed examples with everything that the summary says, to be sorted and filtered."""
    summary = Summary.read(tables)
    first, names = primary(tables), targets(tables)
    there = {clean(name) for name in summary_schema(tables).names}
    heads, keys = [Column("Example")], ["example_id"]
    for name in names[:MAX_COLUMNS]:
        alike = [key for key in names if key.partition(":")[0] == name.partition(":")[0]]
        power = common_power(row[key] for row in rows for key in alike)
        heads.append(Column(words(name), "signed", power=power, bar=name == first))
        paths = [path for path in (f"{name}:x", f"{name}:y") if path in there]
        heads += [Column(f"{path[-1]} path", "signed", power=power) for path in paths]
        keys += [name, *paths]
    heads[2:2], keys[2:2] = columns("Label", "Category"), ["label", "category"]
    if tables.with_policy and "outside_share" in there:
        heads += columns(("Outside", "percent"), ("Acts mainly on", "id"))
        keys += ["outside_share", "dominant"]
    heads += columns(("Tokens", "number", 0), ("Loss", "number"))
    keys += ["n_scored", "loss"]
    categories = {i: str(row.get("category") or "") for i, row in texts(tables).items()}
    made = []
    for row in rows:
        own = row | {"example_id": Example(row["example_id"]), "category": categories.get(row["example_id"], "")}
        if row.get("dominant_feature") is not None:
            mark = {True: " unintended", False: " intended"}.get(row["unintended"], "")
            own["dominant"] = Line((Feature(row["dominant_feature"]), mark))
        made.append([own.get(key) for key in keys])
    filters = {"label": sorted({row["label"] for row in rows}), "category": sorted({*categories.values()} - {""})}
    filters |= {"unintended": []} if "unintended" in there else {}
    total, by = len(summary), f"|{words(first)}|"
    caption: list[object] = [count(total, "example")]
    if total > len(rows):
        which = f"the {STRONGEST} with the largest {by} and those that this page names; all in "
        caption += [f", showing {len(rows):,} of {total:,}: {which}", Word("summary.parquet", "file")]
    caption.append(f", in order of {by} unless sorted")
    table = Table(heads, made, Line(caption), head=0, sortable=True, tall=True, filters=filters)
    text = "Tokens: those that the example teaches; loss: as in training, before it."
    if tables.with_policy:
        text = (
            "Outside: share of the absolute coefficient change on features that are not intended: not named so in "
            "the data or, without names, not active on the example’s own prompt. Acts mainly on: the feature that "
            f"moves most; “unintended” when it is one of those ({summary.unintended} of {len(summary)}). {text}"
        )
    if len(names) > MAX_COLUMNS:
        text += f" {count(len(names) - MAX_COLUMNS, 'more target')} in summary.parquet."
    if unscored := len(summary) - len(summary.finite):
        text += f" {count(unscored, 'example')} without a score: see examples.parquet."
    return [table, Text(text, "note")]


# The verdict


def _sentences(tables: Tables) -> list[Sentence | None]:
    rows, names = shown(tables), named_targets(targets(tables))
    topics: dict[str, list[str]] = {"Behavior": [], "Other targets": [], "Policy": []}
    for name in names:
        topics["Behavior" if is_behavior(name) else "Policy" if name == PRIMARY else "Other targets"].append(name)
    return [moved_sentence(topic, rows, own, tables.per) for topic, own in topics.items()]


def moved_sentence(topic: str, rows: Rows, names: Sequence[str], per: str = "per step") -> Sentence | None:
    """The examples that raise and lower each target most, by how much and along which pathway."""
    if not names:
        return None
    parts = [text for name in names[:SAID] if (text := _moved(rows, name))]
    if not parts:
        return Sentence(topic, "none", f"{NOTHING}: no example moves {listed([words(n) for n in names])}.")
    text = f"{'; '.join(parts)}. Changes are {per}."
    named = [_with_error(row, name) for name in names[:SAID] for side in ends(rows, name, 1) for row in side]
    unsure = all(isinstance(e, Interval) and e.includes_zero for e in named)
    if unsure:
        text += f" {NOTHING}: every interval includes zero."
    if PRIMARY in names:
        text += " That an example strengthens the policy does not by itself mean more of the behavior."
    if len(names) > SAID:
        text += f" {count(len(names) - SAID, 'more target')} in the section on examples."
    return Sentence(topic, "none" if unsure else "found", text)


def _moved(rows: Rows, target: str) -> str:
    known = scored(rows, target)
    power, largest = common_power(row[target] for row in known), max((abs(r[target]) for r in known), default=0.0)
    parts = []
    for does, own in zip(("raises", "lowers"), ends(known, target, 1), strict=True):
        if own and abs(own[0][target]) >= NEGLIGIBLE * largest:
            parts.append(f"{own[0]['example_id']} ({own[0]['label']}) {does} it most, {_amount(own[0], target, power)}")
        else:
            parts.append(f"no example {does} it by more than {percent(NEGLIGIBLE)} of the largest change")
    return f"{_capital(words(target))}: {', '.join(parts)}" if largest else ""


def _amount(row: Row, target: str, power: int) -> str:
    found, x, y = _with_error(row, target), row.get(f"{target}:x"), row.get(f"{target}:y")
    text = interval_text(found, power=power) + tens(power) if isinstance(found, Interval) else amount(found, power)
    if x is None or y is None:
        return text
    through = "through both pathways"
    if abs(x) > MAINLY * abs(y):
        through = "mainly through feature activation"
    elif abs(y) > MAINLY * abs(x):
        through = "mainly through output probability"
    return f"{text}, {through} (x {signed(x, power=power)}, y {signed(y, power=power)})"


def _capital(text: str) -> str:
    """Words begin with a capital letter, a name that is typed like this stays."""
    return text[:1].upper() + text[1:] if " " in text else text


add(Section("examples", "Examples", ("summary",), _blocks, _sentences, overview=True, heading="Who moves it"))
