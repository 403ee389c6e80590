"""What ``compare`` and ``validate`` found: methods by targets, planted examples, removal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from taught.report.text import MINUS, clean, common_power, count, number, percent, signed, tens
from taught.run.folder import RunFolder

Row = dict[str, Any]
COEFFICIENTS = "coefficients, median"
CEILING = "noise ceiling"
ARM_DESIGNS = {"curation": "The published way of choosing examples, and others", "curated": "What taught curate kept"}


@dataclass(frozen=True)
class Cell:
    """LDS of one method on one target: raw and controlled, with 95% intervals where there are."""

    raw: float | None
    raw_ends: tuple[float, float] | None
    controlled: float | None
    controlled_ends: tuple[float, float] | None


@dataclass(frozen=True)
class DesignTable:
    """One design of subsets: methods by targets, the noise ceiling last where it is known."""

    design: str
    subsets: int
    controls: str
    targets: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def design_tables(rows: Sequence[Row], ceilings: Sequence[Row] = ()) -> list[DesignTable]:
    """The tables ``lds`` and ``noise_ceiling`` by design; coefficients come down to their median.

    A method that knew the outcome but for the noise of training would reach the ceiling (raw).
    """
    tables = []
    noise = [
        {
            **row,
            "method": CEILING,
            "raw": row["ceiling"],
            "raw_lo": row["lo"],
            "raw_hi": row["hi"],
            "controlled": None,
            "controlled_lo": None,
            "controlled_hi": None,
        }
        for row in ceilings
    ]
    for design in dict.fromkeys(row["subsets"] for row in rows):
        some = [row for row in (*rows, *noise) if row["subsets"] == design]
        plain = [t for t in dict.fromkeys(row["target"] for row in some) if ":" not in t or t.startswith("behavior:")]
        of = {(row["method"], row["target"]): row for row in some}
        methods = list(dict.fromkeys(r["method"] for r in some if r["raw"] is not None))
        made = []
        for method in methods:
            cells = [_cell(of.get((method, target))) for target in plain]
            coefficients = [row for row in some if row["method"] == method and row["target"].startswith("coefficient")]
            made.append((method, (*cells, _median(coefficients))))
        tables.append(DesignTable(design, some[0]["n"], some[0]["controls"], (*plain, COEFFICIENTS), tuple(made)))
    return tables


def _cell(row: Row | None) -> Cell:
    if row is None:
        return Cell(None, None, None, None)
    return Cell(row["raw"], _ends(row, "raw"), row["controlled"], _ends(row, "controlled"))


def _ends(row: Row, name: str) -> tuple[float, float] | None:
    lo, hi = row[f"{name}_lo"], row[f"{name}_hi"]
    return None if lo is None or hi is None else (lo, hi)


def _median(rows: Sequence[Row]) -> Cell:
    def middle(name: str) -> float | None:
        values = [row[name] for row in rows if row[name] is not None]
        return median(values) if values else None

    return Cell(middle("raw"), None, middle("controlled"), None)


def warnings(rows: Sequence[Row], method: str) -> list[str]:
    """A sentence for every target on which a trivial predictor does as well as the method."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        of_one = row["target"].startswith("coefficient")
        if row["explained"] and row["method"] == method and not of_one:
            found.setdefault((row["target"], row["subsets"]), []).append(row)
    sentences = []
    for (target, design), some in found.items():
        best = max(some, key=lambda row: abs(row["trivial_lds"] or 0.0))
        sentences.append(
            f"{target}, {design} subsets: {best['trivial']} alone predicts about as well as "
            f"{method} ({signed(best['trivial_lds'])} against {signed(best['lds'])})"
        )
    return sentences


def compared_tables(run: RunFolder) -> Iterator[RenderableType]:
    """Everything for the terminal."""
    there = run.finished_tables()
    if "lds" in there:
        noise = run.read_table("noise_ceiling").to_pylist() if "noise_ceiling" in there else []
        for table in design_tables(run.read_table("lds").to_pylist(), noise):
            yield Text(
                f"\nLDS on {table.subsets} {table.design} subsets: raw / controlled for {table.controls}", "bold"
            )
            yield _lds_table(table)
    if "trivial" in there:
        rows = run.read_table("trivial").to_pylist()
        found = warnings(rows, rows[0]["method"])
        yield from (Text(clean(sentence), "yellow") for sentence in found)
        if found:
            yield Text("look at the controlled values there", "yellow")
    if "planted" in there:
        yield _planted_table(run.read_table("planted").to_pylist())
    if "curves" in there:
        for sentence in curve_sentences(run.read_table("curves").to_pylist(), run.study.validation.remove_by):
            yield Text("\n" + sentence)
    if "named_effects" in there:
        for effect in run.read_table("named_effects").to_pylist():
            yield Text("\n" + effect_sentence(effect))
    if "arms" in there:
        for design, rows in arms_by_design(run.read_table("arms").to_pylist()).items():
            yield _arms_table(design, rows)


def curve_sentences(points: Sequence[Row], target: str) -> list[str]:
    """One for every budget, and of several budgets one for the area of the curve."""
    sentences = []
    for design in dict.fromkeys(point["design"] for point in points):
        some = [point for point in points if point["design"] == design]
        sentences += [removal_sentence(point, target) for point in some]
        if len(some) > 1:
            area, lo, hi = (_digits(some[0][name]) for name in ("area", "area_lo", "area_hi"))
            sentences.append(f"Over these {len(some)} budgets the mean difference ({design}) is {area} [{lo}, {hi}]")
    return sentences


def removal_sentence(point: Row, target: str) -> str:
    """What training without, or with only, the named examples did, against random ones as many."""
    how = "without" if point["design"] == "removal" else "only on"
    return (
        f"Training {how} the {point['budget']} examples ({percent(point['share'])}) that raise "
        f"{target} most moves it by {_digits(point['difference'])} [{_digits(point['lo'])}, "
        f"{_digits(point['hi'])}] against as many random ones"
    )


def effect_sentence(effect: Row) -> str:
    """What training with the named examples does, by the subsets that were chosen to ask for it."""
    how = {"chosen": "in the place of average ones", "couples": "added to others"}
    return (
        f"The {effect['examples']} examples that raise {effect['target']} most, {how[effect['design']]}, "
        f"change it by {_digits(effect['value'])} [{_digits(effect['lo'])}, "
        f"{_digits(effect['hi'])}] ({effect['retrainings']} retrainings)"
    )


def arms_by_design(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What was compared -> the rows of its arms."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(ARM_DESIGNS[row.get("design", "curation")], []).append(row)
    return found


def arm_table(rows: Sequence[Row]) -> tuple[list[tuple[str, int]], list[tuple[str, int, list[Row]]]]:
    """Each arm with its examples; each metric with the power of ten of its values, and every arm's."""
    arms = {row["arm"]: row["examples"] for row in rows}
    of = {(row["arm"], row["metric"]): row for row in rows}
    metrics = dict.fromkeys(row["metric"] for row in rows)
    cells = {name: [of[arm, name] for arm in arms] for name in metrics}
    return list(arms.items()), [
        (name, common_power(row["value"] for row in some), some) for name, some in cells.items()
    ]


def _arms_table(design: str, rows: Sequence[Row]) -> Table:
    arms, metrics = arm_table(rows)
    shown = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        title_justify="left",
        title=f"\n{design} (* differs from random, Holm)",
        title_style="bold",
    )
    shown.add_column(Text("trained on", "dim"))
    for arm, examples in arms:
        shown.add_column(Text(f"{clean(arm)}\n{count(examples, 'example')}", "dim"), justify="right")
    for metric, power, cells in metrics:
        values = [number(cell["value"], 3, power=power) + "*" * differs(cell) for cell in cells]
        shown.add_row(f"{clean(metric)}{tens(power)}", *values)
    return shown


def differs(cell: Row) -> bool:
    """Whether an arm's metric differs from the random arm's after Holm's correction."""
    return cell["p_holm"] is not None and cell["p_holm"] < 0.05


def _digits(value: float) -> str:
    """Two digits that count, whatever the size."""
    return f"{value:+.2g}".replace("-", MINUS)


def _lds_table(table: DesignTable) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column(Text("method", "dim"), no_wrap=True)
    for target in table.targets:
        shown.add_column(Text(clean(target), "dim"), justify="right", overflow="fold")
    for method, cells in table.rows:
        shown.add_row(clean(method), *(_short(cell) for cell in cells))
    return shown


def _short(cell: Cell) -> str:
    return "" if cell.raw is None else f"{_two(cell.raw)}\u00a0/\u00a0{_two(cell.controlled)}"


def _two(value: float | None) -> str:
    return number(value)


def _planted_table(rows: Sequence[Row]) -> Table:
    planted, others = rows[0]["planted"], rows[0]["others"]
    shown = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        title=f"\n{planted} planted examples among {planted + others}: AUC",
        title_justify="left",
        title_style="bold",
    )
    targets = [t for t in dict.fromkeys(row["target"] for row in rows) if not t.startswith("coefficient")]
    shown.add_column(Text("method", "dim"))
    for target in targets:
        shown.add_column(Text(clean(target), "dim"), justify="right")
    of = {(row["method"], row["target"]): row for row in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [of.get((method, target)) for target in targets]
        shown.add_row(clean(method), *("" if r is None else _auc(r) for r in found))
    return shown


def _auc(row: Row) -> str:
    return f"{row['auc']:.2f} [{row['lo']:.2f}, {row['hi']:.2f}]"
