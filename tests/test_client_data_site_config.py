"""The [source] table of site.toml, and the site's own training and test parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.config import SiteFolder
from client.data.dataset import PatientDataset
from client.data.site_config import SourceConfig, read_source
from client.data.split import split_by_patient
from shared.errors import ConfigError
from shared.task_plan import FeaturePlan, ImagePlan, TaskPlan

TASK = TaskPlan("ill", features=(FeaturePlan("age", minimum=0, maximum=100),))
GOOD = """
name = "city"
[source]
kind = "table"
path = "ward.csv"
[source.table]
patient = "MRN"
[[source.table.columns]]
name = "ill"
column = "krank"
values = [["ja", "1"], ["nein", "0"]]
"""


def load_text(folder: Path, text: str) -> str:
    """The message with which a site.toml is refused."""
    (folder / "site.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        SiteFolder(folder).config()
    return str(caught.value)


def source_of(folder: Path) -> SourceConfig:
    source = SiteFolder(folder).config().source
    assert source is not None
    return source


def test_a_site_reads_its_table_beside_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(GOOD)
    (tmp_path / "ward.csv").write_text("MRN,age,krank\na,50,ja\nb,100,nein\n")
    data = read_source(source_of(tmp_path), tmp_path, TASK).data
    assert data.inputs.tolist() == [[0], [1]]
    assert data.labels.tolist() == [1, 0]


def test_other_kinds_go_to_their_readers(tmp_path: Path) -> None:
    images = TaskPlan("ill", image=ImagePlan(1, 8, 8))
    for kind, match in (("npz", "does not exist"), ("image-folder", "not a folder")):
        text = f'name = "city"\n[source]\nkind = "{kind}"\npath = "nowhere"\n'
        (tmp_path / "site.toml").write_text(text)
        with pytest.raises(ConfigError, match=match):
            read_source(source_of(tmp_path), tmp_path, images)


def test_mistakes_are_named(tmp_path: Path) -> None:
    typo = load_text(tmp_path, GOOD.replace('patient = "MRN"', 'patint = "MRN"'))
    assert "Did you mean 'patient'?" in typo
    assert "site.toml: source: table" in typo
    assert "'parquet'; valid: 'table'" in load_text(tmp_path, GOOD.replace('"table"', '"parquet"'))
    assert "[source.table]" in load_text(
        tmp_path, 'name = "city"\n[source]\nkind = "table"\npath = "x"\n'
    )
    pair = load_text(tmp_path, GOOD.replace('["ja", "1"]', '["ja"]'))
    assert "values[0] must be a pair" in pair


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 3)), min_size=8, max_size=40),
    st.integers(0, 99),
)
def test_no_patient_is_in_both_parts(patients: list[tuple[int, int]], seed: int) -> None:
    labels = np.concatenate([[label] * count for label, count in patients])
    owner = np.concatenate([[i] * count for i, (_, count) in enumerate(patients)])
    data = PatientDataset(
        owner[:, None].astype(np.float32), labels, owner, tuple(map(str, range(len(patients))))
    )
    train, test = split_by_patient(data, 0.4, np.random.default_rng(seed))
    assert not set(train.patient_ids) & set(test.patient_ids)
    assert sorted(train.patient_ids + test.patient_ids) == sorted(data.patient_ids)
    assert len(train.labels) + len(test.labels) == len(labels)
    for part in (train, test):  # every record still belongs to its own patient
        owners = [part.patient_ids[p] for p in part.patients]
        assert owners == [str(int(x)) for x in part.inputs[:, 0]]
    ill = sum(label for label, _ in patients)
    assert len(np.unique(test.patients[test.labels == 1])) == round(ill * 0.4)
