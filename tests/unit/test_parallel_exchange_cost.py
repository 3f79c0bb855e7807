"""The choice of `auto`, and what a request must look like."""

import pytest

from msa_train.config import KvExchange
from msa_train.parallel.comm.link_rates import ExchangeRates, Line, fit_line
from msa_train.parallel.comm.rank_faults import ExchangeError
from msa_train.parallel.kv_exchange.cost_model import (
    KvBlockBytes,
    all_gather_cost,
    choose_full_exchange,
    selected_cost,
)
from msa_train.parallel.kv_exchange.plan import ExchangeShape
from msa_train.parallel.kv_exchange.requests import check_requests, find_bad_values

EVEN = Line(1e-3, 1e-9)
RATES = ExchangeRates(EVEN, EVEN, EVEN, Line(1e-4, 1e-10), Line(2e-3, 4e-9))
SIZE = KvBlockBytes(forward=1000, backward=1500, added=3000)


def test_a_line_through_two_measurements() -> None:
    assert fit_line([0, 1e6], [1e-3, 3e-3]) == Line(1e-3, pytest.approx(2e-9))
    assert fit_line([0, 1e6], [3e-3, 1e-3]) == Line(3e-3, 0.0)
    assert Line(1e-3, 2e-9).seconds(0) == 0.0
    assert ExchangeRates.from_flat(RATES.flat()) == RATES


def test_costs_by_hand() -> None:
    flat = ExchangeShape(4, 2, 100)
    want = (1e-3 + 50 * 1000e-9) + (1e-3 + 50 * 1500e-9)
    assert selected_cost(flat, [50], 0, SIZE, RATES) == pytest.approx(want)
    again = want + 1e-3 + 50 * 1000e-9
    assert selected_cost(flat, [50], 0, SIZE, RATES, fetches=2) == pytest.approx(again)
    # out, once more, and gradients back in fp32: 3 shards of 200 pairs each
    gathered = 2 * (1e-3 + 600 * 1000e-9) + 1e-3 + 600 * 3000e-9
    assert all_gather_cost(flat, SIZE, RATES) == pytest.approx(gathered)
    assert all_gather_cost(flat, KvBlockBytes(1000, 0, 0), RATES) == pytest.approx(1e-3 + 600 * 1000e-9)
    nodes = ExchangeShape(4, 2, 100, ranks_per_node=2)
    hops = (2e-3 + 20 * 4000e-9) + (2e-3 + 20 * 6000e-9) + (1e-4 + 50 * 100e-9) + (1e-4 + 50 * 150e-9)
    assert selected_cost(nodes, [20, 50], 0, SIZE, RATES) == pytest.approx(hops)
    hot = want + (1e-3 + 3 * 1000e-9) + (1e-3 + 12 * 1000e-9) + (1e-3 + 12 * 1500e-9) + (1e-3 + 3 * 1500e-9)
    assert selected_cost(flat, [50], 12, SIZE, RATES) == pytest.approx(hot)


def test_the_cheaper_scheme_changes_with_the_rate() -> None:
    """All pairs wanted: gathering moves them once more, but a slow all-to-all makes up for that."""
    shape = ExchangeShape(4, 2, 100)
    slow = ExchangeRates(Line(1e-3, 3e-9), EVEN, EVEN, EVEN, EVEN)
    assert selected_cost(shape, [600], 0, SIZE, RATES) < all_gather_cost(shape, SIZE, RATES)
    assert selected_cost(shape, [600], 0, SIZE, slow) > all_gather_cost(shape, SIZE, slow)
    assert selected_cost(shape, [300], 0, SIZE, slow) < all_gather_cost(shape, SIZE, slow)


def test_full_attention_gathers_where_that_is_faster() -> None:
    slow = ExchangeRates(Line(1e-3, 3e-9), EVEN, EVEN, EVEN, EVEN)
    assert choose_full_exchange(3072, 3072, 1000, RATES) is KvExchange.selected
    assert choose_full_exchange(3072, 3072, 1000, slow) is KvExchange.all_gather
    assert choose_full_exchange(1024, 3072, 1000, slow) is KvExchange.selected
    assert choose_full_exchange(3072, 3072, 1000, None) is KvExchange.selected


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({1: 4}, "cp rank 2 asks with layer 4, the others with 3"),
        ({4: 8}, "cp rank 2 asks with blocks per rank 8, the others with 5"),
        ({5: 2}, "cp rank 2 asks with ranks per node 2, the others with 3"),
        ({0: 1}, "cp rank 2 sent something that is no request of this version"),
        ({6: 9}, "cp rank 2 announces 9 pairs and marks 7"),
    ],
)
def test_requests_that_do_not_fit(changed: dict[int, int], text: str) -> None:
    fitting = [0x4D5341_0001, 3, 3, 2, 5, 3, 7, 0]
    check_requests([list(fitting) for _ in range(3)], [7] * 3, [0] * 3, 3)
    odd = [changed.get(i, value) for i, value in enumerate(fitting)]
    with pytest.raises(ExchangeError) as caught:
        check_requests([fitting, fitting, odd], [7] * 3, [0] * 3, 3)
    assert str(caught.value) == f"layer 3, exchanging block requests (request): {text}"


def test_values_that_are_not_finite_are_told_and_not_refused() -> None:
    fitting = [0x4D5341_0001, 3, 3, 2, 5, 3, 7, 0]
    odd = [*fitting[:7], 3]
    check_requests([fitting, fitting, odd], [7] * 3, [0] * 3, 3)
    assert find_bad_values([fitting, fitting], 3) == []
    (text,) = find_bad_values([fitting, fitting, odd], 3)
    point = "layer 3, exchanging block requests (request)"
    assert text == f"{point}: cp rank 2 has NaN or infinity in its index keys and keys or values"


def test_no_rank_asks_itself() -> None:
    fitting = [0x4D5341_0001, 3, 2, 2, 5, 2, 7, 0]
    with pytest.raises(ExchangeError, match="cp rank 1 announces 7 pairs and marks 7, some of them its own"):
        check_requests([fitting, fitting], [7, 7], [0, 1], 3)


def test_gradients_that_are_added_on_their_way_cost_what_they_weigh() -> None:
    """In fp32, where keys are in bf16: an all-gather that wins by less than that does not win."""
    line = Line(0.0, 1e-9)
    rates = ExchangeRates(all_to_all=line, all_gather=line, reduce_scatter=line, outer=line, inner=line)
    # 2 * 160 against 2 * 100 + 100, and against 2 * 100 + 200
    assert choose_full_exchange(160, 100, 4, rates) is KvExchange.all_gather
    assert choose_full_exchange(160, 100, 4, rates, grad_bytes=8) is KvExchange.selected
