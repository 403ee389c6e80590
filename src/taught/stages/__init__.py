"""The stages of a run, in order. Each is one function of the same name in the file of that name.

A stage reads the files of those before it, computes, and writes its own. Importing this imports
none of them; file formats: docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from taught.errors import UserError, did_you_mean
from taught.run.stage import Stage

if TYPE_CHECKING:
    from taught.progress import Progress
    from taught.run.folder import RunFolder
    from taught.study.schema import Study

__all__ = ["BY_NAME", "STAGES", "asked", "require_stage", "run"]

_CURVED = ("adam", "ekfac", "astra", "autocorrelation", "trackstar", "trak")  # what a comparison may rest on
_READ = ("model", "sae", "readout", "behavior", "prompts")  # what the model is read with
_DRAWN = ("limit", "spread", "even", "seed", "near_duplicate", "drop_duplicates", "drop_overlap", "drop_truncated")
_EXAMPLES = tuple(f"examples.{key}" for key in ("path", "kind", "turns", "max_tokens", *_DRAWN))


def _has_policy(study: Study) -> bool:
    return study.sae.path is not None


def _curates(study: Study) -> bool:
    """A map is of skills that are wanted: what raises them is dropped only where the study says so."""
    named = any(value is not None for value in vars(study.curation).values())
    return study.bins is None or named or "curated" in study.validation.designs


STAGES = (
    Stage(
        "readings",
        "read the prompts: their behavior, and the features of the SAE on them",
        {
            "study.yaml": "the study, each section as it was used last",
            "prompts.parquet": "evaluation prompts with their behavior y: prompt_id, text, group, category, source, "
            "licence, n_tokens, y; of a choice margin, of the right option over the best other one",
            "readouts.safetensors": "`y` float64 [N]; with an SAE `h` float32 [M, D] residuals at the read-out tokens "
            "of all prompts and `offsets` int64 [N+1]; ids: prompt_ids",
            "readouts.ids.json": "ids of the rows",
            "features.parquet": "every feature of the SAE, on the prompts: feature_id, mean_positive, mean_negative, "
            "difference, rate, always_on, selected",
            "activations.safetensors": "`X` float64 [N, d] of the selected features; ids: prompt_ids, feature_ids",
            "activations.ids.json": "ids of the rows and columns",
            "labels.json": "feature_id (as text) -> label, where it is from, words, prompts and tokens on which it is "
            "active",
            "readings.json": "read-out, block, point, encoder, unexplained variance, tokens of the behavior; of a "
            "choice the accuracy of each group, beside chance",
        },
        reads=(*_READ, "features"),
    ),
    Stage(
        "policy",
        "fit and judge the policy: which features the behavior rests on, how well, and where the gaps are",
        {
            "coefficients.parquet": "the policy: feature_id, coef, lo, hi (95% bootstrap), sign_stability, label",
            "predictions.parquet": "prompt_id, y_hat: the held-out prediction of each prompt's y",
            "policy.json": "how well it predicts; below",
            "faithfulness.json": "the faithfulness card; below",
            "audit.parquet": "mean behavior of each category of prompts beside the others of its group",
        },
        needs=("readings",),
        reads=("policy", "prompts"),
        asked=_has_policy,
    ),
    Stage(
        "clamp",
        "check the policy by edits in the model: scale each feature and read the behavior again",
        {
            "clamp.parquet": "what scaling each feature in the model does to y, beside its coefficient",
            "clamp.json": "agreement of slopes with coefficients, over all features and over some",
        },
        needs=("readings", "policy"),
        reads=(*_READ, "clamp", "policy.bootstrap", "policy.seed"),
        asked=lambda study: study.clamp is not None and _has_policy(study),
    ),
    Stage(
        "concepts",
        "make the study's concepts: directions in the residual stream, each with a card",
        {
            "concepts.safetensors": "`directions` float64 [C, D]; ids: names",
            "concepts.ids.json": "ids of the rows",
            "concepts.json": "each concept: name, block, point, position, tokens, weights, provenance, card",
        },
        needs=("readings",),
        reads=(*_READ, "concepts"),
        asked=lambda study: bool(study.concepts),
    ),
    Stage(
        "attribute",
        "score the examples: what training on each one does to every target",
        {
            "examples.parquet": "the examples as they were scored: example_id, prompt, response (of a preference the "
            "chosen one), rejected, label, category, source, document (of a window: whose), n_tokens, n_scored, "
            "truncated, loss",
            "scores.parquet": "influence of every example on every target: example_id, method, target, value, se; one "
            "row group for a method and a target",
            "summary.parquet": "one row an example: its label, its value for each target that is no coefficient, "
            "rank, interference; below",
            "attribution.json": "method, targets, what examples are ranked by, and of sketches the store and its error",
            "agreement.parquet": "rank correlation between two methods on one target, with its interval",
            "prompt_effects.safetensors": "`dy` float32 [P, N]: change of y of each prompt; ids: example_ids, "
            "prompt_ids",
            "prompt_effects.ids.json": "ids of the rows and columns",
            "feature_prompt_effects.safetensors": "`dX` float32 [P, N, d]: change of each feature on each prompt, "
            "where the estimator gives it",
            "feature_prompt_effects.ids.json": "ids of the axes",
            "comovement.safetensors": "`r` float64 [d, d]: correlation over examples of the coefficients' changes",
            "comovement.ids.json": "ids of the rows and columns",
            "dropped.json": "ids of examples that were left out: overlap, duplicate, truncated",
            "sample.json": "where the examples were drawn from more: seed, and of each stratum how many were read and "
            "sampled, and the weight of one of them",
            "duplicates.parquet": "examples that repeat others, looked for among documents, and to leave them out: "
            "example_id, of, exact, overlap",
            "certificates.parquet": "what the linear values of each example leave out",
            "statements.parquet": "do the strongest examples stay the strongest",
            "rescored.parquet": "the strongest examples of each target by sketches, scored again: example_id, target, "
            "first (as in the scores, in their unit), exact (by the adjoint, per step)",
            "token_shares.parquet": "shares of the tokens of the strongest examples: example_id, target, position, "
            "answer (0; of a preference 1 for the rejected one), token, share",
        },
        needs=("readings", "policy", "concepts"),
        reads=(*_READ, *_EXAMPLES, "attribution", "bins.questions"),
        code=("taught.targets.behavior", "taught.targets.policy", "taught.targets.concept"),
    ),
    Stage(
        "clusters",
        "group the examples by their active features",
        {
            "clusters.parquet": "clusters of examples by their active features, each with a name",
            "cluster_influence.parquet": "mean influence of each cluster beside as many random examples",
            "cluster_members.parquet": "the cluster of each example",
            "clusters.json": "how the number of clusters was found",
        },
        needs=("readings", "policy", "attribute"),
        reads=("clusters",),
        asked=lambda study: study.clusters is not None and _has_policy(study),
        light=True,
        remade=True,
    ),
    Stage(
        "bins",
        "map the kinds of documents on the benchmarks: which topics and formats raise which, and how sure that is",
        {
            "bins.parquet": "what the documents of each bin do to each benchmark, with intervals and corrected p",
            "contrasts.parquet": "the same of differences between benchmarks; z is the published dz",
            "bin_documents.parquet": "the bin of each document, and its influence on each benchmark: document_id, row, "
            "column, benchmark, value, n_examples (its windows)",
            "bins.json": "columns, benchmarks, documents without a label, empty names of the taxonomy, draws, and "
            "correlations of the benchmarks' profiles",
        },
        needs=("attribute",),
        reads=("bins",),
        asked=lambda study: study.bins is not None,
        light=True,
        remade=True,
    ),
    Stage(
        "curate",
        "say which examples to keep and which to drop, and why",
        {
            "curation.parquet": "which examples to keep and to drop, and why",
            "curation.json": "the rule, how many examples go and what that changes, as predicted",
            "keep.jsonl": "your rows that stay, with their reason",
            "drop.jsonl": "your rows to drop, with their reason",
            "swap.jsonl": "of preferences: your rows with chosen and rejected answer exchanged, under the rule swap-k",
            "unscored.jsonl": "your rows that were not scored, with their reason",
        },
        needs=("attribute",),
        asked=_curates,
        reads=("curation", "examples.positive_label", "examples.negative_label", "sae.path"),
        light=True,
        remade=True,
    ),
    Stage(
        "validate",
        "train the model again on some of the examples, and see what that does",
        {
            "subsets.parquet": "the examples of each subset that was trained on",
            "outcomes.parquet": "what training on each subset did to every target: design, subset, repeat, target, "
            "value",
            "models.parquet": "losses and soft metrics of the retrained models",
            "curves.parquet": "training without, or only on, the strongest examples, against random ones",
            "named_effects.parquet": "effect of training with the strongest examples, with its interval",
            "arms.parquet": "metrics of ways of choosing examples, against random ones",
            "verdicts.parquet": "forgetting the named documents, or training on them alone, against random ones like "
            "them, target by target; below",
            "forgetting.parquet": "each run of unlearning: steps, rates, guard, and why it stopped",
            "answers.parquet": "the retrained models' own answers",
            "validation.json": "the recipe, the base model's metrics, how often each example was trained on",
        },
        needs=("readings", "policy"),
        uses=("attribute",),
        reads=(*_READ, *_EXAMPLES, "validation", "attribution.parameters"),
        remade=True,  # its retrainings stand in a folder of their own, which knows what they depend on
        trains=True,
    ),
    Stage(
        "compare",
        "set methods side by side on the retrainings: which foresaw what they did",
        {
            "lds.parquet": "how well each method foresaw the outcomes",
            "foreseen.parquet": "every retraining: what leaving examples out was to do, and what it did",
            "lds_differences.parquet": "differences between methods in that",
            "trivial.parquet": "how well trivial predictors do in their place",
            "noise_ceiling.parquet": "how well outcomes of other seeds foresee outcomes: what a method can reach",
            "planted.parquet": "how well each method finds planted examples",
            "costs.parquet": "time and memory of the methods compared",
            "compared_scores.parquet": "values of the methods compared, example by example",
            "compare.json": "methods, baselines, and those whose scores were made elsewhere",
        },
        needs=("attribute", "validate"),
        reads=(*_READ, *_EXAMPLES, "attribution", "validation"),
        code=tuple(f"taught.curvatures.{name}" for name in _CURVED),
        trains=True,
    ),
    Stage(
        "report",
        "write the report",
        {"report.html": "everything above, as one page"},
        needs=("readings",),
        uses=("policy", "clamp", "concepts", "attribute", "clusters", "bins", "curate", "validate", "compare"),
        light=True,
        remade=True,
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def asked(study: Study, to: str | None = None, only: str | None = None) -> list[Stage]:
    """The stages that a study asks for, in order.

    Parameters
    ----------
    to : nothing after this stage, but the report. A stage that trains models runs only where it is named here, with
        what it needs.
    only : This stage alone

    Raises
    ------
    UserError
        No stage has this name, or the study does not ask for it.
    """
    named = to if only is None else only
    if named is not None:
        require_stage(named)
    if named is not None and not BY_NAME[named].asked(study):
        keys = {"policy": "sae.path=FOLDER", "clamp": "clamp=true", "clusters": "clusters=true", "bins": "bins=true"}
        fix = f"use --set {keys[named]}" if named in keys else f"see the section {named} that `taught init` writes"
        raise UserError("the study does not ask for this stage", value=named, rule=BY_NAME[named].what, fix=fix)
    if only is not None:
        return [BY_NAME[only]]
    trained = {*_needed(to)} if to is not None else set()
    last = STAGES.index(BY_NAME[to]) if to is not None else len(STAGES)
    return [
        stage
        for number, stage in enumerate(STAGES)
        if stage.asked(study)
        and (number <= last or stage.name == "report")
        and (not stage.trains or stage.name in trained)
    ]


def require_stage(name: str) -> str:
    """The name, if a stage has it; else a UserError with those that there are."""
    if name not in BY_NAME:
        fix = did_you_mean(name, BY_NAME, 0.6) or "`taught run --help` says what a stage is"
        raise UserError("there is no stage of this name", value=name, rule="one of " + ", ".join(BY_NAME), fix=fix)
    return name


def _needed(name: str) -> Iterator[str]:
    yield name
    for before in BY_NAME[name].needs:
        yield from _needed(before)


def run(
    study: Study, folder: RunFolder, to: str | None = None, only: str | None = None, progress: Progress | None = None
) -> None:
    """Run what a study asks for, in order; what is there already is not made again."""
    for stage in asked(study, to, only):
        stage(study, folder, progress)
