"""The stage ``clusters``: examples by their active features, from the tables of a run."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from taught.analysis.clusters import cluster_examples
from taught.progress import Progress
from taught.run.files import schema
from taught.run.folder import RunFolder
from taught.stages.scored import read_scores, read_shifts, run_targets
from taught.study.schema import ClustersSpec, Study


def clusters(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Cluster the examples of a run and compare each cluster with as many random examples."""
    spec = study.clusters or ClustersSpec()
    with run.stage("clusters", study):
        targets = [spec.target] if spec.target else [n for n in run_targets(run) if not n.endswith((":x", ":y"))]
        summary = run.read_table("summary", ["example_id", "label", "intended"])
        example_ids = summary["example_id"].to_pylist()
        features = run.read_table("coefficients", ["feature_id", "label"])
        scores = read_scores(run, targets)
        found = cluster_examples(
            example_ids,
            [own or [] for own in summary["intended"].to_pylist()],
            dict(zip(*(column.to_pylist() for column in features.columns), strict=True)),
            {str(name): scores[name] for name in scores.targets},
            read_shifts(run, example_ids),
            kinds=summary["label"].to_pylist(),
            k=spec.k,
        )
        clusters = [row._asdict() | {"features": [f._asdict() for f in row.features]} for row in found.clusters]
        run.write_table("clusters", pa.Table.from_pylist(clusters, _CLUSTERS))
        effects = [row._asdict() for row in found.effects]
        run.write_table("cluster_influence", pa.Table.from_pylist(effects, _INFLUENCE))
        similarity = pa.array(found.similarity, from_pandas=True)
        members = {"example_id": list(found.example_ids), "cluster": found.cluster, "similarity": similarity}
        run.write_table("cluster_members", pa.table(members))
        record = {
            "examples": len(found.example_ids),
            "without": int((found.cluster == 0).sum()),
            "k": int((np.unique(found.cluster) > 0).sum()),
            "given": spec.k is not None,
            "silhouette": max(found.silhouettes.values(), default=None),
            "silhouettes": [{"k": some, "silhouette": s} for some, s in found.silhouettes.items()],
            "sets": found.sets,
            "clustered": found.clustered,
            "draws": found.draws,
            "targets": list(dict.fromkeys(row.target for row in found.effects)),
        }
        run.write_json("clusters", record)


_FEATURE = schema("feature_id:int label:str inside:float outside:float")
_CLUSTERS = schema(
    "cluster:int name:str n_examples:int examples:[str] outside_share:float outside_random_lo:float "
    "outside_random_hi:float outside_by_chance:float outside_p:float outside_p_holm:float"
).insert(3, pa.field("features", pa.list_(pa.struct(_FEATURE))))
_INFLUENCE = schema(
    "cluster:int target:str mean:float lo:float hi:float random_lo:float random_hi:float p:float p_holm:float "
    "matched_p:float matched_p_holm:float"
)
