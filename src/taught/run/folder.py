"""Run folder: where the stages of one study keep their results, and when these may be reused.

A stage's results count only when the manifest says that the stage is complete, under the same
fingerprint (``fingerprint.py``), and each file still has the checksum that was recorded when it was
written. Everything else is refused by name or computed again; nothing is reused silently.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock, Timeout

import taught
from taught.environment import peak_memory_gb, products_by, versions
from taught.errors import UserError
from taught.run import files
from taught.run.fingerprint import Inputs, differences, fingerprint, stage_code, stage_inputs
from taught.run.manifest import NAME as MANIFEST
from taught.run.manifest import damaged, load_manifest, now, save_manifest
from taught.run.pieces import PartialFolder
from taught.run.stage import Stage
from taught.stages import BY_NAME, STAGES
from taught.study.load import dump_study
from taught.study.schema import Study

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq


@dataclass
class Running:
    """One stage while it runs.

    Attributes
    ----------
    name : one of ``taught.stages.STAGES``
    fingerprint : what its result depends on, as a digest
    done : its complete results are already there, under this fingerprint: nothing is to be done
    partial : finished pieces of an earlier attempt under this fingerprint; deleted on completion
    """

    name: str
    fingerprint: str
    done: bool
    partial: PartialFolder


class RunFolder:
    """A run folder, created when missing.

    Parameters
    ----------
    path : The folder. One that holds other files and no manifest is refused.
    fresh : Stages whose earlier results are deleted, once, when the stage begins; and with them what was made from
        them, where they are made under other inputs now
    command : the command that repeats the run, kept in the manifest

    Raises
    ------
    UserError
        Not a run folder, a damaged manifest, a newer format.
    """

    def __init__(self, path: str | Path, *, fresh: Collection[str] = (), command: str | None = None) -> None:
        self.folder = files.place(path)
        self.command = command
        self._fresh = set(fresh)
        self._active: Running | None = None
        self._locked = False
        self._manifest = load_manifest(self.folder)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run folder that exists; UserError when there is none."""
        if not (files.place(path) / MANIFEST).is_file():
            rule, fix = f"a run folder holds {MANIFEST}", "name the folder that `taught run STUDY --run FOLDER` made"
            raise UserError("not a run folder", value=str(path), rule=rule, fix=fix)
        return cls(path)

    # What is there

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest, as a copy."""
        return cast(dict[str, Any], json.loads(json.dumps(self._manifest)))

    @property
    def study(self) -> Study:
        """The study of this run, each section as a stage used it last; study.yaml shows it."""
        self._existing("study.yaml")
        return self._recorded()

    def _recorded(self) -> Study:
        try:
            return Study.recorded(self._manifest["study"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise damaged(self.path(MANIFEST), error) from None

    def path(self, name: str) -> Path:
        """Path of a file in this folder; it need not exist."""
        if Path(name).name != name:
            raise ValueError(f"a plain file name is wanted: {name!r}")
        return self.folder / name

    def is_done(self, stage: str, wanted: str) -> bool:
        """Whether the stage is complete under the fingerprint ``wanted``, with all its files.

        Raises
        ------
        UserError
            A file of the stage has changed since it was written.
        """
        if not self._is_complete(stage) or self._manifest["stages"][stage]["fingerprint"] != wanted:
            return False
        names = self._files_of(stage)
        there = all(self.path(name).is_file() for name in names)
        for name in names if there else ():
            self._check(name)
        return there

    def require(self, stage: str) -> None:
        """Raise a UserError unless a stage and those before it are complete and belong together."""
        if not self._is_complete(stage):
            state = "was not finished" if self._record(stage) else "has not been run"
            raise UserError(f"{stage} {state} in this run folder", value=str(self.folder), fix=self._command_for(stage))
        for before, made_with in self._made_from(stage).items():
            self.require(before)
            if made_with != self._manifest["stages"][before]["fingerprint"]:
                raise UserError(
                    f"{stage} was made with an earlier result of {before}",
                    value=str(self.folder),
                    rule=f"{before} was run again since, under another study, data or code",
                    fix=self._command_for(stage, fresh=True),
                )

    def require_before(self, name: str, study: Study, extra: Mapping[str, Any] | None = None) -> None:
        """Raise a UserError unless the stages before ``name`` are complete and of this study; nothing is changed."""
        self._chained(BY_NAME[name], study, extra)

    # Running a stage

    @contextmanager
    def stage(
        self, name: str, study: Study, extra: Mapping[str, Any] | None = None, reads: Collection[str] = ()
    ) -> Iterator[Running]:
        """Run one stage: ``with run.stage("policy", study) as stage: if stage.done: return ...``.

        The folder is locked meanwhile. The stage becomes complete when the body ends without an
        exception; otherwise it stays incomplete, is never trusted, and keeps its partial pieces.

        Parameters
        ----------
        name : one of ``taught.stages.STAGES``
        study : what is to be computed
        extra : further things that the result depends on and only the caller knows, as plain values:
            ``{"model.weights": sha256, "model.source": "..."}``
        reads : Stages that are read this time, beside those that this one always reads

        Raises
        ------
        UserError
            The folder holds results of another study, data, model or code; an earlier stage is
            missing; another command is writing here.
        """
        with self.locked():
            started = time.monotonic()
            inputs = self._chained(BY_NAME[name], study, extra, reads)
            stage = self._begin(name, inputs)
            if stage.done:
                self._clear_partial(name)  # killed between its completion and this
            else:
                self._write_head(stage, study, inputs, extra or {})
                self._active = stage
            try:
                yield stage
            finally:
                self._active = None
            if not stage.done:
                self._manifest["stages"][name].update(
                    status="complete",
                    finished=now(),
                    seconds=round(time.monotonic() - started, 2),
                    peak_memory_gb=peak_memory_gb(),
                    float32_products=None if BY_NAME[name].light else products_by(),
                )
                self._save()
                self._clear_partial(name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from writing here. A dead process holds no lock."""
        if self._locked:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "choose another --run folder"
            raise UserError("the run folder cannot be made", value=str(error), fix=fix) from None
        path = self.folder / ".lock"
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                "another command is writing to this run folder",
                value=str(self.folder),
                rule="one command at a time writes to a run folder",
                fix="wait until it ends, or choose another --run folder",
            ) from None
        except OSError as error:
            raise files.write_error(path, error) from error
        try:
            for folder in (self.folder, *(self.folder / "partial").glob("*")):
                files.remove_temporaries(folder)
            self._manifest = load_manifest(self.folder)
            self._locked = True
            yield
        finally:
            self._locked = False
            lock.release()

    # Writing

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write ``NAME.parquet``."""
        self._write(_with_suffix(name, ".parquet"), files.table_bytes(table))

    @contextmanager
    def table_writer(
        self, name: str, schema: pa.Schema, unique: Collection[str] = ()
    ) -> Iterator[Callable[[pa.Table], None]]:
        """Write ``NAME.parquet`` in parts: ``with run.table_writer(...) as write: write(part)``.

        Each part is a row group of its own. The file is there when the body ends without an
        exception, and whole; the body does nothing else that could fail on the disk.

        Parameters
        ----------
        unique : text columns of which no value stands twice in a part
        """
        name = _with_suffix(name, ".parquet")
        self._require_active(name)
        with files.replacing(self.path(name)) as file, files.row_groups(file, schema, unique) as write:
            yield write
        self._list(name, files.sha256_file(self.path(name)), self.path(name).stat().st_size)

    def write_json(self, name: str, record: object) -> None:
        """Write ``NAME.json``; NaN and infinity are refused (write null)."""
        self._write(_with_suffix(name, ".json"), files.json_bytes(record))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file under the name as given."""
        self._write(name, text.encode())

    def write_tensors(
        self,
        name: str,
        arrays: Mapping[str, np.ndarray],
        ids: Mapping[str, Sequence[Any]],
        axes: Mapping[str, Sequence[str | None]] | None = None,
    ) -> None:
        """Write ``NAME.safetensors`` and ``NAME.ids.json``.

        Parameters
        ----------
        arrays : name -> array
        ids : Name -> ids along an axis, e.g. ``{"prompt_ids": [...], "feature_ids": [...]}``. No id may stand twice.
        axes : array name -> name of the ids of each axis (None: an axis without ids), checked for length. Without it,
            each list of ids must have the length of some axis.

        Raises
        ------
        ValueError
            The ids do not fit the arrays.
        """
        # Ids as JSON holds them: numpy's scalars become Python values.
        listed = {key: [v.item() if hasattr(v, "item") else v for v in values] for key, values in ids.items()}
        files.check_ids(arrays, listed, axes)
        self._write(_with_suffix(name, ".safetensors"), files.tensors_bytes(arrays))
        self._write(f"{name.removesuffix('.safetensors')}.ids.json", files.json_bytes(listed))

    # Reading

    def read_table(
        self, name: str, columns: Sequence[str] | None = None, rows: pc.Expression | None = None
    ) -> pa.Table:
        """Read ``NAME.parquet``, or columns and rows of it; groups whose statistics exclude ``rows`` are not read."""
        import pyarrow.parquet as pq

        with self._sound(name):
            return pq.read_table(self.table_path(name), columns=columns, filters=rows)

    def footer(self, name: str) -> pq.FileMetaData:
        """What ``NAME.parquet`` holds (rows, columns), without reading it."""
        import pyarrow.parquet as pq

        with self._sound(name):
            return pq.read_metadata(self.table_path(name))

    def read_parts(self, name: str, columns: Sequence[str], rows: pc.Expression) -> Iterator[pa.Table]:
        """Read columns and rows of ``NAME.parquet``, a row group at a time: what would not fit into memory."""
        import pyarrow.dataset as ds

        for file in ds.dataset(self.table_path(name)).get_fragments():
            for part in file.split_by_row_group(rows):
                yield part.to_table(columns=list(columns), filter=rows)

    def table_path(self, name: str) -> Path:
        """Path of ``NAME.parquet``, unchanged since a stage wrote it; for reading it in parts."""
        name = _with_suffix(name, ".parquet")
        self._check(name)
        return self.path(name)

    def finished_tables(self) -> dict[str, Path]:
        """Name -> path of the tables of the finished stages.

        Their sizes are compared with what was written. Checksums are not, since a large table takes longer to hash than
        most questions to answer.
        """
        names = [name for stage in self.together() for name in self._files_of(stage) if name.endswith(".parquet")]
        for name in names:
            self._compare(name, None, self._existing(name).stat().st_size)
        return {name.removesuffix(".parquet"): self.path(name) for name in names}

    def read_json(self, name: str) -> Any:
        """Read ``NAME.json``."""
        with self._sound(name):
            found = files.parse_json(self._verified(_with_suffix(name, ".json")))
            if not isinstance(found, dict):
                raise ValueError("not a JSON object")
            return found

    def read_text(self, name: str) -> str:
        """Read a text file."""
        with self._sound(name):
            return self._verified(name).decode()

    def read_tensors(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
        """Read ``NAME.safetensors`` and its ids."""
        with self._sound(name):
            arrays = files.tensors_from_bytes(self._verified(_with_suffix(name, ".safetensors")))
        return arrays, self._ids(name)

    def _ids(self, name: str) -> dict[str, list[Any]]:
        ids: dict[str, list[Any]] = self.read_json(f"{name.removesuffix('.safetensors')}.ids.json")
        with self._sound(name):
            files.check_ids({}, ids, {})
        return ids

    def read_tensor_rows(
        self, name: str, tensor: str, axis: str, wanted: Collection[Any]
    ) -> tuple[list[Any], np.ndarray, dict[str, list[Any]]]:
        """Read those rows of one array of ``NAME.safetensors`` whose ids are wanted.

        Parameters
        ----------
        axis : Name of the ids of the rows, e.g. ``example_ids``.

        Returns
        -------
        ids of the rows, in the order of the file; the rows; all ids
        """
        import numpy as np
        from safetensors import safe_open

        file = _with_suffix(name, ".safetensors")
        self._check(file)
        ids = self._ids(name)
        with self._sound(name):
            places = [place for place, key in enumerate(ids[axis]) if key in wanted]
            with safe_open(self.path(file), framework="numpy") as tensors:
                whole = tensors.get_slice(tensor)
                rows = np.concatenate([whole[place : place + 1] for place in places])
        return [ids[axis][place] for place in places], rows, ids

    def together(self) -> Iterator[str]:
        """Finished stages; UserError unless they belong together, but for an older report."""
        for stage in filter(self._is_complete, BY_NAME):
            if stage != "report":
                self.require(stage)
            yield stage

    def verify(self) -> None:
        """Raise a UserError unless the finished stages belong together and no file has changed."""
        for stage in self.together():
            for name in self._files_of(stage):
                self._check(name)

    def made_by_other_code(self) -> dict[str, str]:
        """Stages that another version of the code made, and which: to be said, not hidden."""
        made_by = {stage: inputs["code"] for stage, inputs in self._manifest["inputs"].items()}
        study = self.study
        return {stage: code for stage, code in made_by.items() if code != stage_code(BY_NAME[stage], study)}

    # Inside

    def _files_of(self, stage: str) -> list[str]:
        return [name for name, file in self._manifest["files"].items() if file["stage"] == stage]

    def _command_for(self, stage: str, *, fresh: bool = False) -> str:
        if stage in ("curate", "validate", "report"):
            return f"taught {stage} {self.folder}"
        demo = str(self._manifest.get("command", "")).startswith("taught demo")
        if demo and not BY_NAME[stage].trains:
            return f"taught demo --run {self.folder}" + (" --fresh" if fresh else "")
        return f"taught run STUDY --run {self.folder} --to {stage}" + (f" --fresh {stage}" if fresh else "")

    def _save(self) -> None:
        save_manifest(self.folder, self._manifest)

    def _record(self, stage: str) -> dict[str, Any] | None:
        return cast("dict[str, Any] | None", self._manifest["stages"].get(stage))

    def _is_complete(self, stage: str) -> bool:
        record = self._record(stage)
        return record is not None and record["status"] == "complete"

    def _made_from(self, stage: str) -> dict[str, str]:
        """The stages whose results a stage was made from, and their fingerprints."""
        inputs = self._manifest["inputs"].get(stage, {})
        return {name: inputs[f"stage {name}"] for name in BY_NAME if f"stage {name}" in inputs}

    def _chained(
        self, stage: Stage, study: Study, extra: Mapping[str, Any] | None, reads: Collection[str] = ()
    ) -> Inputs:
        """What the result depends on; stages before it that do not belong to this study are refused."""
        chained = stage_inputs(stage, study, extra)
        needed = [name for name in stage.needs if BY_NAME[name].asked(study)]
        if_there = [name for name in stage.uses if self._is_complete(name)]
        for before in (*needed, *if_there, *reads):
            self.require(before)
            if not stage.light:  # these look at nothing but the folder
                made, wanted = self._manifest["inputs"][before], stage_inputs(BY_NAME[before], study)
                known = {**wanted, **{key: value for key, value in (extra or {}).items() if key in made}}
                self._refuse_other(before, made, known, known)
            chained[f"stage {before}"] = self._manifest["stages"][before]["fingerprint"]
        return chained

    def _begin(self, name: str, inputs: Inputs) -> Running:
        wanted, record = fingerprint(inputs), self._record(name)
        if name in self._fresh or BY_NAME[name].remade:
            self._fresh.discard(name)
            self._forget(name)
            if record is not None and record["fingerprint"] != wanted:
                self._forget_made_from(name)
        if self._record(name) is not None:
            self._refuse_other(name, self._manifest["inputs"][name], inputs)
        partial = PartialFolder(self.folder / "partial" / f"{name}-{wanted[:16]}")
        return Running(name, wanted, self.is_done(name, wanted), partial)

    def _forget_made_from(self, name: str) -> None:
        """Delete what was made from a stage's earlier result; an older report hides nothing and stays."""
        for later in BY_NAME:
            if name in self._made_from(later) and later != "report":
                self._forget(later)
                self._forget_made_from(later)

    def _refuse_other(self, stage: str, old: Inputs, new: Inputs, keys: Collection[str] | None = None) -> None:
        if changed := differences(old, new, keys):
            raise UserError(
                f"{self.folder} holds {stage} results made under other inputs: " + ", ".join(changed),
                value="; ".join(f"{key}: was {_shown(was)}, now {_shown(now)}" for key, (was, now) in changed.items()),
                rule="results are never reused under another study, model, data or code",
                fix="choose another --run folder, or make them anew: " + self._command_for(stage, fresh=True),
            )

    def _forget(self, name: str) -> None:
        """Delete one stage's own files and its record."""
        listed = self._files_of(name)
        self._manifest["stages"].pop(name, None)
        self._manifest["inputs"].pop(name, None)
        for file in listed:
            del self._manifest["files"][file]
        self._save()  # first: a file that is still there and not listed is never trusted
        for file in {*listed, *BY_NAME[name].writes} - {"study.yaml"}:
            try:
                self.path(file).unlink(missing_ok=True)
            except OSError as error:
                raise files.write_error(self.path(file), error) from error
        self._clear_partial(name)

    def _clear_partial(self, name: str) -> None:
        for pieces in (self.folder / "partial").glob(f"{name}-*"):
            shutil.rmtree(pieces, ignore_errors=True)
        with suppress(OSError):  # not there, not empty, or a disk that takes no change: no harm
            (self.folder / "partial").rmdir()

    def _write_head(self, stage: Running, study: Study, inputs: Inputs, extra: Mapping[str, Any]) -> None:
        """Say in the manifest what is about to run, before the first result is written."""
        attempts = (self._record(stage.name) or {}).get("attempts", 0)
        self._manifest.update(taught=taught.__version__, versions=dict(versions()))
        digests = {key: inputs[f"{key} sha256"] for key in study.flat() if f"{key} sha256" in inputs}
        read_from = {key: {"path": study.get(key), "sha256": digest} for key, digest in digests.items()}
        self._manifest.setdefault("data", {}).update(read_from)
        used = study.to_dict()
        if BY_NAME[stage.name].needs and "study" in self._manifest:  # what it does not read as stages before had it
            read = {key.partition(".")[0] for key in BY_NAME[stage.name].reads}
            used = {**self._manifest["study"], **{name: own for name, own in used.items() if name in read}}
        self._manifest["study"] = used
        if extra:
            self._manifest["weights"] = dict(extra)
        self._manifest["command"] = self.command
        self._manifest["stages"][stage.name] = {
            "status": "running",
            "fingerprint": stage.fingerprint,
            "command": self.command,
            "started": now(),
            "attempts": attempts + 1,
        }
        self._manifest["inputs"][stage.name] = inputs
        for file in self._files_of(stage.name):  # of an attempt that did not finish
            del self._manifest["files"][file]
        self._save()  # first: a killed run must leave a folder that is known as ours
        files.write_bytes(self.path("study.yaml"), dump_study(self._recorded()).encode())

    def _write(self, name: str, content: bytes) -> None:
        self._require_active(name)
        files.write_bytes(self.path(name), content)
        self._list(name, files.sha256_bytes(content), len(content))

    def _require_active(self, name: str) -> Running:
        if self._active is None:
            raise RuntimeError(f"{name} is written outside a stage")
        return self._active

    def _list(self, name: str, sha256: str, size: int) -> None:
        """Record a file that the running stage has written."""
        stage = self._require_active(name).name
        self._manifest["files"][name] = {"stage": stage, "sha256": sha256, "bytes": size}
        self._save()

    @contextmanager
    def _sound(self, name: str) -> Iterator[None]:
        """Name a file that is not what a stage writes, although its checksum is the one that the manifest says."""
        from safetensors import SafetensorError

        try:
            yield
        except (ValueError, LookupError, TypeError, OSError, SafetensorError) as error:
            raise UserError(
                f"{name} of the run folder cannot be read",
                value=f"{self.folder}: {error}",
                rule="files are as the stages wrote them",
                fix="make the run anew, in another --run folder",
            ) from error

    def _existing(self, name: str) -> Path:
        if not self.path(name).is_file():
            maker = next((stage.name for stage in STAGES if name in stage.writes), None)
            raise UserError(
                f"{name} is not in the run folder",
                value=str(self.folder),
                rule=f"it is written by {maker}" if maker else None,
                fix=self._command_for(maker) if maker else None,
            )
        return self.path(name)

    def _verified(self, name: str) -> bytes:
        """Return the content of a file that a stage wrote, unchanged since."""
        content = self._existing(name).read_bytes()
        self._compare(name, files.sha256_bytes(content), len(content))
        return content

    def _check(self, name: str) -> None:
        """Refuse a file that has changed since it was written; it may be larger than the memory."""
        path = self._existing(name)
        self._compare(name, files.sha256_file(path), path.stat().st_size)

    def _compare(self, name: str, sha256: str | None, size: int) -> None:
        """Refuse a file whose size, or whose checksum where it is given, is not the one written."""
        written = self._manifest["files"].get(name)
        if written is None:
            what, fix = f"{name} was not written by a stage of this run", "move it away and run the stage again"
            raise UserError(what, value=str(self.path(name)), fix=fix)
        if size != written["bytes"] or sha256 not in (None, written["sha256"]):
            raise UserError(
                f"{name} has changed since it was written",
                value=f"{self.path(name)}: {size} bytes, {written['bytes']} were written",
                rule="a result is read only with the checksum that was recorded for it",
                fix=f"make it anew: {self._command_for(written['stage'], fresh=True)}",
            )


def _shown(value: object) -> str:
    is_digest = isinstance(value, str) and len(value) == 64 and value.isalnum()
    return repr(value)[1:13] if is_digest else repr(value)


def _with_suffix(name: str, suffix: str) -> str:
    return name if name.endswith(suffix) else name + suffix
