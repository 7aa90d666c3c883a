"""GBLM-Pruner: weight times input norm and gradient, as a formula."""

from __future__ import annotations

from secateur.spaces.formulas.grammar import parse
from secateur.spaces.formulas.known import KNOWN

GBLM = parse(KNOWN["gblm"].text)
"""``|w| (||x|| + 25 g)``, compared per output (Das et al. 2023, arXiv 2311.04902, eq. 5).

25 is the released script's weighting in our units: its gradients are times 100, and their squares are summed over 128
windows of 2048 tokens, where g is the root mean square over the windows.
"""
