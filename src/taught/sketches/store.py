"""Store of sketches: a folder of shards that grows and is read without the model.

A shard is a safetensors file with ``values`` float16 [n, K] and ``scale`` float32 [n] (a row is their product), and
beside it a JSON file that names the rows and the checksum. It counts once the JSON is there, which is written last;
both are written whole. Shards are named by their rows, so several processes can fill one store without talking to each
other, and a killed one leaves only whole shards. ``store.json`` says what all rows depend on: a store made under
anything else is refused, with what differs.

A row is known by its id and the digest of the tokens behind it: an example or prompt whose text has
changed is another row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taught.core.example import Dpo, Example
from taught.errors import UserError, reading
from taught.run import files
from taught.run.fingerprint import differences

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "store.json"
FORMAT = 1


@dataclass(frozen=True, order=True)
class Row:
    """One sketch: ``feature`` is -1 for the loss of an example and for y of a prompt."""

    id: str
    digest: str
    feature: int = -1


@dataclass(frozen=True, eq=False)
class Shard:
    """Rows that lie together, in order.

    Attributes
    ----------
    path : its safetensors file
    rows : n rows
    prompts, features : which features were looked for on which prompts (id, digest); one without a
        row is inactive there
    losses : of examples, [n]; else empty
    sha256 : of the safetensors file
    """

    path: Path
    rows: tuple[Row, ...]
    prompts: tuple[tuple[str, str], ...]
    features: tuple[int, ...]
    losses: tuple[float, ...]
    sha256: str


def digest(tokens: Sequence[int], *more: float) -> str:
    """What a row's tokens come to: the first 32 hex digits of a SHA-256."""
    return hashlib.sha256(json.dumps([list(tokens), *more]).encode()).hexdigest()[:32]


def example_digest(example: Example) -> str:
    """What an example's tokens, their weights and its link come to.

    A reference that is the base model follows from its weights, which stores and retrainings know anyway.
    """
    link = example.link
    more = [] if not isinstance(link, Dpo) else [link.beta, *([link.reference] if link.given else [])]
    return digest([n for s in example.sequences for n in (*s, -1)], *(w for of in example.weights for w in of), *more)


class SketchStore:
    """The folder of one projection of one model's gradients.

    Parameters
    ----------
    folder : Made with the first shard when missing
    identity : what every row depends on, as plain values; None to open a store as it is

    Raises
    ------
    UserError
        The store was made under another identity (what differs is named), is of a newer format, or
        there is none and no identity was given.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder).expanduser()
        found = self._found()
        if found is None and identity is None:
            raise UserError(
                "not a store of sketches",
                value=str(self.folder),
                rule=f"a store holds {NAME}",
                fix="make one: taught run STUDY --to attribute --set attribution.estimator=sketch",
            )
        if identity is not None:
            identity = json.loads(files.json_bytes(identity))  # as it is read again: a tuple is a list there
        if found is not None and identity is not None and (changed := differences(found, identity)):
            raise UserError(
                f"{self.folder} holds sketches made under other conditions: " + ", ".join(changed),
                value="; ".join(f"{k}: was {was!r}, now {now!r}" for k, (was, now) in changed.items()),
                rule="one store holds one projection of one model's gradients",
                fix="name another folder: --set attribution.estimator.store=FOLDER",
            )
        self.identity: dict[str, Any] = dict(found if identity is None else identity)  # type: ignore[arg-type]

    @property
    def dim(self) -> int:
        """Numbers a sketch has."""
        return int(self.identity["projection.dim"])

    def prepare(self) -> None:
        """Make the folder and ``store.json`` unless they are there."""
        files.make_folder(self.folder)
        if self._found() is None:
            record = {"format": FORMAT, "identity": self.identity}
            files.write_bytes(self.folder / NAME, files.json_bytes(record))

    def shards(self, kind: str) -> list[Shard]:
        """All whole shards of a kind (``examples`` or ``prompts``), by name."""
        return [_read_shard(file) for file in sorted(self.folder.glob(f"{kind}-*.json"))]

    def rows(self, kind: str) -> set[Row]:
        """Rows that are there."""
        return {row for shard in self.shards(kind) for row in shard.rows}

    def save(
        self,
        kind: str,
        rows: Sequence[Row],
        values: NDArray[np.float32],
        *,
        prompts: Sequence[tuple[str, str]] = (),
        features: Sequence[int] = (),
        losses: Sequence[float] = (),
    ) -> None:
        """Keep rows as one shard; ``values`` [n, K], the others as in :class:`Shard`.

        Raises
        ------
        UserError
            No space left (with the bytes needed), or the folder cannot be written to.
        """
        import numpy as np

        order = sorted(range(len(rows)), key=rows.__getitem__)
        rows, values = [rows[i] for i in order], values[order]
        scale = np.maximum(np.abs(values).max(1), np.finfo(np.float32).tiny)
        arrays = {"values": (values / scale[:, None]).astype(np.float16), "scale": scale.astype(np.float32)}
        content = files.tensors_bytes(arrays)
        listed = {
            "rows": [[row.id, row.digest, row.feature] for row in rows],
            "prompts": [list(prompt) for prompt in prompts],
            "features": [int(k) for k in features],
        }
        name = f"{kind}-{hashlib.sha256(json.dumps([*listed.values()]).encode()).hexdigest()[:24]}"
        record = {
            **listed,
            "losses": [losses[i] for i in order] if losses else [],
            "sha256": files.sha256_bytes(content),
            "bytes": len(content),
        }
        self.prepare()
        files.write_bytes(self.folder / f"{name}.safetensors", content)
        files.write_bytes(self.folder / f"{name}.json", files.json_bytes(record))

    def values(self, shard: Shard) -> NDArray[np.float32]:
        """Sketches of one shard, float32 [n, K].

        Raises
        ------
        UserError
            The file is missing, or is not the one that was written.
        """
        import numpy as np

        content = shard.path.read_bytes() if shard.path.is_file() else b""
        if files.sha256_bytes(content) != shard.sha256:
            raise UserError(
                "a shard of the store is damaged",
                value=str(shard.path),
                rule="its checksum is the one that was recorded when it was written",
                fix="delete it and make it anew: taught run STUDY --to attribute --fresh attribute",
            )
        arrays = files.tensors_from_bytes(content)
        values: NDArray[np.float32] = arrays["values"].astype(np.float32)
        return values * arrays["scale"][:, None]

    def read(self, kind: str) -> Iterator[tuple[Shard, NDArray[np.float32]]]:
        """All shards with their sketches, by name; one is in memory at a time."""
        return ((shard, self.values(shard)) for shard in self.shards(kind))

    def examples(self, rows: Mapping[Row, int]) -> Iterator[tuple[list[int], NDArray[np.float32], NDArray[np.float64]]]:
        """Of some examples what ``rows`` says of them, their sketches [n, K] and losses [n], shard by shard."""
        import numpy as np

        for shard in self.shards("examples"):
            theirs = [n for n, row in enumerate(shard.rows) if row in rows]
            if theirs:
                ours = [rows[shard.rows[n]] for n in theirs]
                yield ours, self.values(shard)[theirs], np.array(shard.losses)[theirs]

    def drop_damaged(self) -> list[str]:
        """Forget shards that are damaged, so that they are made anew; their names.

        Cost: reads the whole store.
        """
        dropped = []
        for file in sorted(self.folder.glob("*-*.json")):
            try:
                self.values(_read_shard(file))
            except UserError:
                file.unlink(missing_ok=True)
                file.with_suffix(".safetensors").unlink(missing_ok=True)
                dropped.append(file.stem)
        return dropped

    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.glob("*") if file.is_file())

    def _found(self) -> dict[str, Any] | None:
        file, errors = self.folder / NAME, (ValueError, KeyError, TypeError, OSError)
        fix = "name another folder: --set attribution.estimator.store=FOLDER"
        with reading("the store cannot be read", file, errors, fix=fix):
            try:
                record = files.parse_json(file.read_bytes())
            except FileNotFoundError:
                return None
            if record["format"] > FORMAT:
                rule, fix = f"at most {FORMAT}", "update taught"
                raise UserError("the store is of a newer format", value=record["format"], rule=rule, fix=fix)
            return dict(record["identity"])


def _read_shard(file: Path) -> Shard:
    errors = (ValueError, KeyError, TypeError, OverflowError, OSError)
    fix = "delete this file and make the store again"
    with reading("a shard's list of rows cannot be read", file, errors, fix=fix):
        record = files.parse_json(file.read_bytes())
        return Shard(
            file.with_suffix(".safetensors"),
            tuple(Row(str(i), str(d), int(k)) for i, d, k in record["rows"]),
            tuple((str(i), str(d)) for i, d in record["prompts"]),
            tuple(map(int, record["features"])),
            tuple(map(float, record["losses"])),
            str(record["sha256"]),
        )
