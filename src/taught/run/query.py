"""Questions to the tables of a run in SQL: DuckDB reads only what they need.

Each table that a finished stage wrote is a view, under the name of its file. Nothing else can be
read and nothing written: a query is one SELECT, files other than the run's tables and the network
are out of reach. DuckDB is an optional dependency, ``pip install 'taught[query]'``.

A query compares the sizes of the tables with what was written, not their checksums, which would
take seconds per gigabyte; ``taught show`` and ``taught report`` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages import STAGES

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

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
    sql : a query in DuckDB's SQL; the view's column ``group`` is written ``"group"``
    memory_gb : what DuckDB may use

    Raises
    ------
    UserError
        Not one SELECT, or one that cannot be answered; DuckDB is not installed; the folder is no run.
    """
    run, duckdb = _opened(run), _duckdb()
    with _connected(run.finished_tables(), memory_gb) as connection:
        try:
            kinds = [statement.type for statement in connection.extract_statements(sql)]
            if kinds != [duckdb.StatementType.SELECT]:
                raise UserError("a query is one SELECT", value=sql, rule="a run is only read")
            return connection.sql(sql).to_arrow_table()
        except duckdb.OutOfMemoryException as error:
            raise UserError(
                "the query needs more memory",
                value=str(error),
                rule=f"at most {memory_gb:g} GB",
                fix="ask for fewer rows or columns, or taught.run.query.select(..., memory_gb=...)",
            ) from None
        except duckdb.Error as error:
            fix = "`taught show RUN tables` lists the views and their columns"
            raise UserError("the query cannot be answered", value=str(error), fix=fix) from None


def tables(run: RunFolder | Path | str) -> pa.Table:
    """List the tables that can be asked: view, what it is about, rows, columns (name and type)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    footers = {name: pq.read_metadata(path) for name, path in _opened(run).finished_tables().items()}
    schemas = [footer.schema.to_arrow_schema() for footer in footers.values()]
    columns = [", ".join(f"{field.name} {field.type}" for field in schema) for schema in schemas]
    rows = [footer.num_rows for footer in footers.values()]
    holds = {name: what for stage in STAGES for name, what in stage.writes.items()}
    about = [holds.get(f"{name}.parquet", "").partition(":")[0] for name in footers]
    return pa.table({"view": list(footers), "about": about, "rows": rows, "columns": columns})


def _opened(run: RunFolder | Path | str) -> RunFolder:
    return run if isinstance(run, RunFolder) else RunFolder.open(run)


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError:
        raise UserError("DuckDB is not installed", fix="pip install 'taught[query]'") from None
    return duckdb


def _connected(paths: dict[str, Path], memory_gb: float) -> duckdb.DuckDBPyConnection:
    """A database in memory whose views are these files, and that reaches nothing else."""
    texts = {name: str(path.resolve()) for name, path in paths.items()}
    if pattern := next((text for text in texts.values() if any(char in text for char in "*?[")), None):
        what, rule = "DuckDB takes this path for a pattern", "no *, ? or [ in the path of the run folder"
        raise UserError(what, value=pattern, rule=rule, fix="rename the folder")
    quoted = {name: "'" + text.replace("'", "''") + "'" for name, text in texts.items()}
    settings = _CLOSED | {"memory_limit": f"{memory_gb:g}GB"}
    connection = _duckdb().connect(":memory:", config=settings)
    connection.execute("SET enable_progress_bar = false")  # it goes to standard output
    connection.execute(f"SET allowed_paths = [{', '.join(quoted.values())}]")
    for name, path in quoted.items():
        connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet({path})")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection
