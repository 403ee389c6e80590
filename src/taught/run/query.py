"""Questions to the tables of a run, ready-made or in SQL: DuckDB reads only what they need.

Each table that a finished stage wrote is a view, under the name of its file. Nothing else can be
read and nothing written: a query is one SELECT, files other than the run's tables and the network
are out of reach. DuckDB is an optional dependency, ``pip install 'taught[query]'``.

A query compares the sizes of the tables with what was written, not their checksums, which would
take seconds per gigabyte; ``taught show`` and ``taught report`` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taught.errors import UserError
from taught.run.folder import RunFolder

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

TOP = 20
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
PATHWAYS = ("x", "y", "total")
MEMORY_GB = 4.0
ABOUT = {
    "prompts": "evaluation prompts with their behavior y",
    "features": "every feature of the SAE, on the prompts",
    "coefficients": "the policy: a coefficient with its interval for each selected feature",
    "audit": "mean behavior of each category of prompts",
    "clamp": "what scaling each feature in the model does to y",
    "examples": "the examples as they were scored",
    "influence": "effect of every example on every target, by pathway",
    "summary": "one row an example: score, pathways, interference",
    "token_shares": "shares of the response tokens of the strongest examples",
    "certificates": "what the linear values of each example leave out",
    "statements": "do the strongest examples stay the strongest",
    "curation": "which examples to keep and to drop, and why",
    "clusters": "examples grouped by their active features",
    "cluster_members": "the cluster of each example",
    "cluster_influence": "mean influence of each cluster beside random examples",
    "concept_influence": "value of every example for every concept, by method",
    "concept_agreement": "rank correlation between concept methods",
    "concept_tokens": "shares of response tokens in concept influence",
    "subsets": "the examples of each subset that was trained on",
    "outcomes": "what training on each subset did to every target",
    "models": "losses and soft metrics of the retrained models",
    "curves": "training without, or only on, the strongest examples, against random ones",
    "named_effects": "effect of training with the strongest examples, with its interval",
    "arms": "metrics of ways of choosing examples, against random ones",
    "answers": "the retrained models' own answers",
    "lds": "how well each method foresaw the outcomes",
    "lds_differences": "differences between methods in that",
    "trivial": "how well trivial predictors do in their place",
    "noise_ceiling": "how well outcomes of other seeds foresee outcomes: what a method can reach",
    "planted": "how well each method finds planted examples",
    "costs": "time and memory of the methods compared",
    "scores": "values of the methods compared, example by example",
}
_CLOSED = {  # nothing is fetched, nothing spilled to disk, no variable of ours is a table
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
}


def select(run: RunFolder | Path | str, sql: str, *, memory_gb: float = MEMORY_GB) -> pa.Table:
    """Answer one SELECT over the run's tables.

    Parameters
    ----------
    sql
        A query in DuckDB's SQL; the view's column ``group`` is written ``"group"``.
    memory_gb
        What DuckDB may use.

    Raises
    ------
    UserError
        Not one SELECT, or one that cannot be answered; DuckDB is not installed; the folder is no
        run.
    """
    return _answer(_opened(run), sql, (), memory_gb)


def tables(run: RunFolder | Path | str) -> pa.Table:
    """List the tables that can be asked: view, what it is about, rows, columns (name and type)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    footers = {name: pq.read_metadata(path) for name, path in _opened(run).finished_tables().items()}
    columns = [
        ", ".join(f"{field.name} {field.type}" for field in footer.schema.to_arrow_schema())
        for footer in footers.values()
    ]
    rows = [footer.num_rows for footer in footers.values()]
    about = [ABOUT.get(name, "") for name in footers]
    return pa.table({"view": list(footers), "about": about, "rows": rows, "columns": columns})


def top_examples(
    run: RunFolder | Path | str,
    top: int = TOP,
    *,
    feature: int | None = None,
    group: str | None = None,
    pathway: str | None = None,
    label: str | None = None,
    memory_gb: float = MEMORY_GB,
) -> pa.Table:
    """Examples with the largest absolute effect on the score, a coefficient or a group's mean y.

    Parameters
    ----------
    top
        How many.
    feature
        Id of the feature whose coefficient is meant; None: the score.
    group
        Group of prompts whose mean y is meant.
    pathway
        ``x``, ``y`` or ``total``, the default; a mean y has pathway ``y`` only.
    label
        Only examples with this label.

    Returns
    -------
    table of example_id, label, value, se; ties go to the smaller example id

    Raises
    ------
    UserError
        No such feature, group, pathway or label; see also :func:`select`.
    """
    run = _opened(run)
    run.require("attribute")
    if top < 1:
        raise UserError("at least one example is asked for", value=top, fix="for example: --top 20")
    values: list[Any] = [*_target(run, feature, group, pathway)]
    where = "target = ? AND pathway = ? AND estimator = ? AND isfinite(value)"
    for column, value in (("feature_id", feature), ('"group"', group)):
        if value is not None:
            where += f" AND {column} = ?"
            values.append(value)
    if label is not None:
        _refuse_unknown("label", label, run.read_table("summary", ["label"]))
        where += " AND example_id IN (SELECT example_id FROM summary WHERE label = ?)"
        values.append(label)
    order = "ORDER BY abs(value) DESC, example_id"
    strongest = f"SELECT example_id, value, se FROM influence WHERE {where} {order} LIMIT {top}"
    sql = f"SELECT example_id, label, value, se FROM ({strongest}) JOIN summary USING (example_id)"
    return _answer(run, f"{sql} {order}", values, memory_gb)


def quantiles(run: RunFolder | Path | str, *, feature: int | None = None, memory_gb: float = MEMORY_GB) -> pa.Table:
    """Quantiles of the effects by label, for each target and pathway.

    Parameters
    ----------
    feature
        Id of the feature whose coefficient is meant; None: the score and the groups' mean y.

    Returns
    -------
    table of target, feature_id, group, pathway, label, n and a column for each of ``QUANTILES``
    """
    run = _opened(run)
    run.require("attribute")
    values: list[Any] = [_estimator(run)]
    where = "estimator = ? AND target IN ('score', 'mean_y')"
    if feature is not None:
        _refuse_unknown("feature_id", feature, run.read_table("coefficients", ["feature_id"]))
        where = "estimator = ? AND target = 'coefficient' AND feature_id = ?"
        values.append(feature)
    keys = 'target, feature_id, "group", pathway, label'
    by_label = (
        f"SELECT {keys}, count(*) AS n, quantile_cont(value, {list(QUANTILES)}) AS q "
        f"FROM influence JOIN (SELECT example_id, label FROM summary) USING (example_id) "
        f"WHERE {where} GROUP BY {keys}"
    )
    each = ", ".join(f'q[{i}] AS "q{q:g}"' for i, q in enumerate(QUANTILES, 1))
    sql = f"SELECT {keys}, n, {each} FROM ({by_label}) ORDER BY {keys}"
    return _answer(run, sql, values, memory_gb)


def _opened(run: RunFolder | Path | str) -> RunFolder:
    return run if isinstance(run, RunFolder) else RunFolder.open(run)


def _estimator(run: RunFolder) -> str:
    return run.study.attribution.estimator.kind


def _target(run: RunFolder, feature: int | None, group: str | None, pathway: str | None) -> tuple[str, str, str]:
    """Target, pathway and estimator of what is asked for."""
    if feature is not None and group is not None:
        raise UserError(
            "a coefficient and a group's mean y are two questions",
            value=f"feature {feature}, group {group}",
            fix="ask for one of them",
        )
    allowed = PATHWAYS if group is None else ("y",)
    pathway = pathway or allowed[-1]
    if pathway not in allowed:
        raise UserError("no such pathway", value=pathway, rule=f"one of {', '.join(allowed)}")
    if feature is not None:
        _refuse_unknown("feature_id", feature, run.read_table("coefficients", ["feature_id"]))
    if group is not None:
        _refuse_unknown("group", group, run.read_table("prompts", ["group"]))
    target = "mean_y" if group is not None else "score" if feature is None else "coefficient"
    return target, pathway, _estimator(run)


def _refuse_unknown(column: str, value: object, table: pa.Table) -> None:
    known = sorted(item for item in table[column].unique().to_pylist() if item is not None)
    if value not in known:
        shown = ", ".join(map(str, known[:10])) + (" ..." if len(known) > 10 else "")
        raise UserError(f"no such {column.replace('_', ' ')}", value=value, rule=f"one of {shown}")


def _answer(run: RunFolder, sql: str, values: Sequence[Any], memory_gb: float) -> pa.Table:
    duckdb = _duckdb()
    with _connected(run.finished_tables(), memory_gb) as connection:
        try:
            kinds = [statement.type for statement in connection.extract_statements(sql)]
            if kinds != [duckdb.StatementType.SELECT]:
                raise UserError("a query is one SELECT", value=sql, rule="a run is only read")
            return connection.sql(sql, params=list(values)).to_arrow_table()
        except duckdb.OutOfMemoryException as error:
            raise UserError(
                "the query needs more memory",
                value=str(error),
                rule=f"at most {memory_gb:g} GB",
                fix="ask for fewer rows or columns, or taught.run.query.select(..., memory_gb=...)",
            ) from None
        except duckdb.Error as error:
            raise UserError(
                "the query cannot be answered",
                value=str(error),
                fix="`taught query RUN` lists the views and their columns",
            ) from None


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError:
        raise UserError("DuckDB is not installed", fix="pip install 'taught[query]'") from None
    return duckdb


def _connected(paths: dict[str, Path], memory_gb: float) -> duckdb.DuckDBPyConnection:
    """A database in memory whose views are these files, and that reaches nothing else."""
    quoted = {name: _quoted(path) for name, path in paths.items()}
    settings = _CLOSED | {"memory_limit": f"{memory_gb:g}GB"}
    connection = _duckdb().connect(":memory:", config=settings)
    connection.execute("SET enable_progress_bar = false")  # it goes to standard output
    connection.execute(f"SET allowed_paths = [{', '.join(quoted.values())}]")
    for name, path in quoted.items():
        connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet({path})")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _quoted(path: Path) -> str:
    text = str(path.resolve())
    if any(char in text for char in "*?["):
        raise UserError(
            "DuckDB takes this path for a pattern",
            value=text,
            rule="no *, ? or [ in the path of the run folder",
            fix="rename the folder",
        )
    return "'" + text.replace("'", "''") + "'"
