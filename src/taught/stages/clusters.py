"""The stage ``clusters``: examples by their active features, from the tables of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from taught.analysis.clusters import Clustering, cluster_examples
from taught.progress import Progress
from taught.run.folder import RunFolder
from taught.stages.targets import read_targets, stages_read, summary_targets
from taught.study.schema import ClustersSpec, Study


def clusters(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Cluster the examples of a run and compare each cluster with as many random examples."""
    spec = study.clusters or ClustersSpec()
    k, target = spec.k, spec.target
    with run.stage("clusters", study, reads=stages_read(target)):
        targets = [target] if target else list(summary_targets(run))
        summary = run.read_table("summary", ["example_id", "label", "intended"])
        example_ids = summary["example_id"].to_pylist()
        features = run.read_table("coefficients", ["feature_id", "label"])
        found = cluster_examples(
            example_ids,
            [own or [] for own in summary["intended"].to_pylist()],
            dict(zip(*(column.to_pylist() for column in features.columns), strict=True)),
            {found.name: found.values for found in read_targets(run, *targets)},
            _shifts(run, example_ids),
            kinds=summary["label"].to_pylist(),
            k=k,
        )
        _write(run, found, k)


def _shifts(run: RunFolder, example_ids: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Parts of the change of each coefficient by each example, in the order of ``example_ids``."""
    rows = (pc.field("target") == "coefficient") & (pc.field("pathway") == "total")
    rows &= pc.field("estimator") == run.study.attribution.estimator.kind
    ids = pa.array(example_ids, pa.string())
    for part in run.read_parts("influence", ["example_id", "feature_id", "value"], rows):
        place = pc.index_in(part["example_id"], ids).to_numpy()
        feature, value = part["feature_id"].to_numpy(), part["value"].to_numpy()
        for one in np.unique(feature):
            at = feature == one
            shift = np.zeros(len(example_ids))
            shift[place[at]] = value[at]
            yield int(one), shift


_FEATURE = pa.struct(
    [("feature_id", pa.int64()), ("label", pa.string()), ("inside", pa.float64()), ("outside", pa.float64())]
)
_CLUSTERS = pa.schema(
    [
        ("cluster", pa.int64()),
        ("name", pa.string()),
        ("n_examples", pa.int64()),
        ("features", pa.list_(_FEATURE)),
        ("examples", pa.list_(pa.string())),
    ]
    + [
        (name, pa.float64())
        for name in (
            "outside_share",
            "outside_random_lo",
            "outside_random_hi",
            "outside_by_chance",
            "outside_p",
            "outside_p_holm",
        )
    ]
)
_INFLUENCE = pa.schema(
    [("cluster", pa.int64()), ("target", pa.string())]
    + [
        (name, pa.float64())
        for name in ("mean", "lo", "hi", "random_lo", "random_hi", "p", "p_holm", "matched_p", "matched_p_holm")
    ]
)


def _write(run: RunFolder, found: Clustering, k: int | None) -> None:
    clusters = [row._asdict() | {"features": [feature._asdict() for feature in row.features]} for row in found.clusters]
    effects = [row._asdict() for row in found.effects]
    run.write_table("clusters", pa.Table.from_pylist(clusters, _CLUSTERS))
    run.write_table("cluster_influence", pa.Table.from_pylist(effects, _INFLUENCE))
    members = {
        "example_id": list(found.example_ids),
        "cluster": found.cluster,
        "similarity": pa.array(found.similarity, from_pandas=True),
    }
    run.write_table("cluster_members", pa.table(members))
    run.write_json(
        "clusters",
        {
            "examples": len(found.example_ids),
            "without": int((found.cluster == 0).sum()),
            "k": int((np.unique(found.cluster) > 0).sum()),
            "given": k is not None,
            "silhouette": max(found.silhouettes.values(), default=None),
            "silhouettes": [{"k": some, "silhouette": s} for some, s in found.silhouettes.items()],
            "sets": found.sets,
            "clustered": found.clustered,
            "draws": found.draws,
            "targets": list(dict.fromkeys(row.target for row in found.effects)),
        },
    )
