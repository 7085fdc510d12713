"""Sites that train at once share the machine instead of each taking all of it."""

from __future__ import annotations

import torch
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from simulations.engines import SiteShare, _folder_of_partition


@given(st.integers(1, 255), st.integers(1, 128), st.integers(0, 8))
def test_shares_never_add_up_to_more_than_the_machine(sites: int, cores: int, gpus: int) -> None:
    share = SiteShare.of(sites, cores=cores, gpus=gpus)
    assert share.cores >= 1
    assert 0 <= share.gpus <= 1
    at_once = min(sites, cores // share.cores)
    assert at_once >= 1
    assert at_once * share.cores <= cores
    # In thousandths, as Ray counts them: 25 sites at 0.28 of 7 come to 7.000000000000001.
    assert sites * round(1000 * share.gpus) <= 1000 * gpus or share.gpus == 1
    assert (share.gpus > 0) == (gpus > 0)


def test_a_worker_takes_its_threads_before_it_trains() -> None:
    before = torch.get_num_threads()
    context = Context(
        run_id=1, node_id=2, node_config={"partition-id": 1}, state=RecordDict(), run_config={}
    )
    try:
        torch.set_num_threads(1)
        assert _folder_of_partition(["a", "b"], 2, context).name == "b"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
