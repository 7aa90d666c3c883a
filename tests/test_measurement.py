"""Values of measurements that people read."""

from __future__ import annotations

import math

import pytest

from secateur.spaces.measurement import perplexity_of


@pytest.mark.parametrize(("ce", "wanted"), [(0.0, 1.0), (3.5, 33.11545195869231), (1e4, math.exp(700))])
def test_perplexity_is_a_number_also_where_it_does_not_fit_a_float(ce, wanted):
    assert perplexity_of(ce) == pytest.approx(wanted)
