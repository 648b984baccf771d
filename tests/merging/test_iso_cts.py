from __future__ import annotations

import pytest
import torch
from adapters import FULL_RANK, SHAPES, assert_same, deltas, random_adapter, unlike_adapters
from references import whitened
from torch import Tensor

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import dense
from sap_lightning.merging.iso_c import IsoC
from sap_lightning.merging.iso_cts import IsoCTS


def reference(adapters, own: dict[str, int], ranks: dict[str, int], counts: list[float]) -> dict[str, Tensor]:
    """The paper's algorithm 2 on dense float64 updates, with this many own directions of each client in a layer."""
    merged = {}
    for name in SHAPES:
        parts = [count * delta for count, delta in zip(counts, deltas(adapters, name), strict=True)]
        u, s, v = torch.linalg.svd(sum(parts), full_matrices=False)
        common = ranks[name] - own[name] * len(parts)
        U, sigma, V = [u[:, :common]], [s[:common]], [v[:common].T]
        for part in parts:
            rest = part - u[:, :common] @ u[:, :common].T @ part
            p, t, q = torch.linalg.svd(rest, full_matrices=False)
            n = min(own[name], int((t > 1e-5).sum()))
            U, sigma, V = [*U, p[:, :n]], [*sigma, t[:n]], [*V, q[:n].T]
        merged[name] = torch.cat(sigma).mean() * whitened(torch.cat(U, 1)) @ whitened(torch.cat(V, 1)).T
    return merged


@pytest.mark.parametrize(("share", "own"), [(0.8, 1), (0.5, 2), (0.0, 4), (1.0, 0)])
def test_the_weakest_directions_are_given_to_the_clients(share: float, own: int) -> None:
    adapters = [random_adapter(seed, scale=0.5 + seed) for seed in range(3)]
    expected = reference(adapters, dict.fromkeys(SHAPES, own), dict.fromkeys(SHAPES, 12), [1, 1, 1])
    assert_same(IsoCTS(share).merge(adapters), expected, 1e-5)


def test_updates_of_full_rank_are_merged_as_the_authors_do() -> None:
    adapters = [random_adapter(seed, FULL_RANK) for seed in range(3)]
    # int(0.8·24) = 19 leaves 5, and the multiple of 3 that is nearest is 6.
    expected = reference(adapters, dict.fromkeys(SHAPES, 2), dict.fromkeys(SHAPES, FULL_RANK), [1, 1, 1])
    assert_same(IsoCTS().merge(adapters), expected, 1e-5)


def test_clients_of_other_ranks_add_as_much_as_they_have() -> None:
    adapters, weights = unlike_adapters(), [0.5, 0.3, 0.2]
    merged = IsoCTS(share=0.3).merge(adapters, weights)
    # Of rank 6 and 12; the client without fc1 has nothing of its own there.
    expected = reference(adapters, {"fc1": 2, "q": 3}, {"fc1": 6, "q": 12}, [1.5, 0.9, 0.6])
    assert_same(merged, expected, 1e-5)
    assert {name: update.rank for name, update in merged.items()} == {"fc1": 4, "q": 11}


def test_own_directions_are_no_more_than_there_are() -> None:
    adapters = [random_adapter(seed, rank) for seed, rank in enumerate((2, 2, 1))]
    # A third of 5 is nearest to 2, but three clients cannot have 2 of 5 each.
    expected = reference(adapters, dict.fromkeys(SHAPES, 1), dict.fromkeys(SHAPES, 5), [1, 1, 1])
    assert_same(IsoCTS(share=0).merge(adapters), expected, 1e-5)


def test_one_client_or_a_space_that_is_all_common_gives_iso_c() -> None:
    assert_same(IsoCTS().merge([random_adapter(0)]), IsoC().merge([random_adapter(0)]), 1e-5)
    assert_same(IsoCTS(share=1).merge(unlike_adapters()), IsoC().merge(unlike_adapters()), 1e-5)


def test_copies_of_a_client_give_its_directions_once() -> None:
    adapter = random_adapter(0)
    for name, update in IsoCTS(share=0.5).merge([adapter, adapter]).items():
        sigma = torch.linalg.svdvals(deltas([adapter], name)[0])[:4]
        # Two copies sum to twice the common σ; both add the same third direction.
        mean = torch.stack([2 * sigma[0], 2 * sigma[1], sigma[2], sigma[2]]).mean()
        values = torch.linalg.svdvals(dense(update).double())
        torch.testing.assert_close(values[:3], mean.expand(3), rtol=1e-5, atol=0)
        assert values[3] < 1e-5


def test_scale_multiplies_the_merge() -> None:
    whole = IsoCTS().merge(unlike_adapters())
    merged = IsoCTS(scale=0.4).merge(unlike_adapters())
    assert_same(merged, {name: 0.4 * dense(update) for name, update in whole.items()})


def test_clients_that_cancel_out_leave_nothing() -> None:
    merged = IsoCTS().merge([random_adapter(0), random_adapter(0, scale=-0.5)])
    assert not any(dense(update).any() for update in merged.values())


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"merge\.method\.share must lie in \[0, 1\], got 80; 80 % is 0\.8"):
        IsoCTS(share=80)
