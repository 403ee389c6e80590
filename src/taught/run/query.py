"""Questions to the tables of a run, ready-made or in SQL: DuckDB reads only what they need.

Each table that a finished stage wrote is a view, under the name of its file. Nothing else can be
read and nothing written: a query is one SELECT, files other than the run's tables and the network
are out of reach. DuckDB is an optional dependency, ``pip install 'taught[query]'``.

A query compares the sizes of the tables with what was written, not their checksums, which would
take seconds per gigabyte; ``taught show`` and ``taught report`` do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages import STAGES

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

TOP = 20
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
MEMORY_GB = 4.0
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
    holds = {name: what for stage in STAGES for name, what in stage.writes.items()}
    about = [holds.get(f"{name}.parquet", "").partition(":")[0] for name in footers]
    return pa.table({"view": list(footers), "about": about, "rows": rows, "columns": columns})


def targets(run: RunFolder | Path | str, method: str | None = None) -> list[str]:
    """Targets that a method's scores are about; by default the run's own method."""
    run = _opened(run)
    import pyarrow.compute as pc

    rows = pc.field("method") == (method or run.study.attribution.method)
    found: list[str] = run.read_table("scores", ["target"], rows)["target"].unique().to_pylist()
    return found


def top_examples(
    run: RunFolder | Path | str,
    target: str,
    top: int = TOP,
    *,
    method: str | None = None,
    label: str | None = None,
    memory_gb: float = MEMORY_GB,
) -> pa.Table:
    """Examples with the largest absolute value for a target.

    Parameters
    ----------
    target
        As it stands in ``scores.parquet``: ``score``, ``coefficient:17:x``, ``behavior:harmless``.
    top
        How many.
    method
        Whose scores; the run's own by default.
    label
        Only examples with this label.

    Returns
    -------
    table of example_id, label, value, se; ties go to the smaller example id

    Raises
    ------
    UserError
        No such target, method or label; see also :func:`select`.
    """
    run = _opened(run)
    if top < 1:
        raise UserError("at least one example is asked for", value=top, fix="for example: --top 20")
    values = _of(run, target, method)
    where = "target = ? AND method = ? AND isfinite(value)"
    if label is not None:
        _refuse_unknown("label", label, run.read_table("summary", ["label"])["label"].unique().to_pylist())
        where += " AND example_id IN (SELECT example_id FROM summary WHERE label = ?)"
        values = [*values, label]
    order = "ORDER BY abs(value) DESC, example_id"
    strongest = f"SELECT example_id, value, se FROM scores WHERE {where} {order} LIMIT {top}"
    sql = f"SELECT example_id, label, value, se FROM ({strongest}) JOIN summary USING (example_id)"
    return _answer(run, f"{sql} {order}", values, memory_gb)


def quantiles(
    run: RunFolder | Path | str, target: str, *, method: str | None = None, memory_gb: float = MEMORY_GB
) -> pa.Table:
    """Quantiles of a target's values by label.

    Returns
    -------
    table of label, n and a column for each of ``QUANTILES``
    """
    run = _opened(run)
    by_label = (
        f"SELECT label, count(*) AS n, quantile_cont(value, {list(QUANTILES)}) AS q "
        "FROM scores JOIN (SELECT example_id, label FROM summary) USING (example_id) "
        "WHERE target = ? AND method = ? GROUP BY label"
    )
    each = ", ".join(f'q[{i}] AS "q{q:g}"' for i, q in enumerate(QUANTILES, 1))
    return _answer(
        run, f"SELECT label, n, {each} FROM ({by_label}) ORDER BY label", _of(run, target, method), memory_gb
    )


def _opened(run: RunFolder | Path | str) -> RunFolder:
    return run if isinstance(run, RunFolder) else RunFolder.open(run)


def _of(run: RunFolder, target: str, method: str | None) -> list[Any]:
    """Target and method of what is asked for, which the run has."""
    run.require("attribute")
    method = method or run.study.attribution.method
    known = targets(run, method)
    if not known:
        _refuse_unknown("method", method, run.read_table("scores", ["method"])["method"].unique().to_pylist())
    _refuse_unknown("target", target, known)
    return [target, method]


def _refuse_unknown(what: str, value: object, known: Iterable[Any]) -> None:
    names = sorted(str(item) for item in known if item is not None)
    if value in names:
        return
    close = difflib.get_close_matches(str(value), names, n=1)
    raise UserError(
        f"no such {what} in this run",
        value=value,
        rule=f"one of {', '.join(names[:10])}" + (" ..." if len(names) > 10 else ""),
        fix=f"did you mean {close[0]}?" if close else None,
    )


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
                fix="`taught show RUN tables` lists the views and their columns",
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
