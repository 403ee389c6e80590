"""Descriptors of stages: their order, their files, the table in the documentation."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from taught.errors import UserError
from taught.run.stage import file_table
from taught.stages import BY_NAME, STAGES, asked
from taught.study.schema import Study
from taught.study.template import template

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def names(study: Study, **options: str) -> list[str]:
    return [stage.name for stage in asked(study, **options)]


def with_sae(**changes: object) -> Study:
    study = Study().replace("sae.path", "./sae")
    for key, value in changes.items():
        study = study.replace(key.replace("__", "."), value)
    return study


def test_a_stage_stands_behind_those_that_it_reads():
    order = [stage.name for stage in STAGES]
    for stage in STAGES:
        before = order[: order.index(stage.name)]
        assert {*stage.needs, *stage.uses} <= {*before}


def test_each_file_is_written_by_one_stage_and_said_in_one_line():
    files = [name for stage in STAGES for name in stage.writes]
    assert len(set(files)) == len(files)
    assert all(what and "\n" not in what for stage in STAGES for what in stage.writes.values())


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_function_of_a_stage_is_there(stage):
    assert callable(getattr(importlib.import_module(stage.module), stage.name))


def test_what_a_stage_reads_are_keys_of_the_study():
    study = with_sae(clamp=True, clusters=True, bins=True)
    keys = {*study.flat(), *(key.partition(".")[0] for key in study.flat())}
    assert all(read in keys for stage in STAGES for read in stage.reads)


def test_a_study_asks_for_what_it_names():
    assert names(Study()) == ["readings", "attribute", "curate", "report"]
    assert names(with_sae()) == ["readings", "policy", "attribute", "curate", "report"]
    labels = {"examples__positive_label": "a", "examples__negative_label": "b"}
    given = {"clamp": True, "clusters": True, "bins": True, "concepts": [{"name": "c", "source": "difference"}]}
    full = with_sae(curation__k=3, **given, **labels)
    trained = ("validate", "compare")
    assert names(full) == [stage.name for stage in STAGES if stage.name not in trained]
    assert "clamp" not in names(Study().replace("clamp", True))  # there is no policy to check


def test_a_stage_that_trains_runs_only_where_it_is_named():
    assert names(Study(), to="validate") == ["readings", "attribute", "curate", "validate", "report"]
    assert names(Study(), to="compare") == ["readings", "attribute", "curate", "validate", "compare", "report"]
    assert names(with_sae(), to="policy") == ["readings", "policy", "report"]
    assert names(with_sae(), only="policy") == ["policy"]


@pytest.mark.parametrize(
    ("name", "said"), [("polcy", "did you mean policy?"), ("policy", "sae.path=FOLDER"), ("concepts", "taught init")]
)
def test_a_stage_that_cannot_run_is_said(name, said):
    for option in ("to", "only"):
        with pytest.raises(UserError) as caught:
            asked(Study(), **{option: name})
        assert said in caught.value.fix


def test_the_tables_of_the_documentation_are_made_of_the_code():  # by docs/tables.py
    text = DOCS.read_text(encoding="utf-8")
    assert file_table(STAGES) in text
    assert template() in text
    assert len(BY_NAME) == len(STAGES)
