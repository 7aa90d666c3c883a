"""The space `architecture` with equal blocks, so that stock classes load the pruned model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from secateur.spaces.architecture.candidate import Architecture
from secateur.spaces.architecture.cost import CostName
from secateur.spaces.architecture.forms import Form, FormTargets
from secateur.spaces.architecture.levels import LevelRules
from secateur.spaces.architecture.scores import Scores
from secateur.spaces.architecture.structured import StructuredSpace
from secateur.spaces.methods import DEPTH
from secateur.spaces.mutation_crossover import ATTEMPTS
from secateur.spaces.shape import ModelShape
from secateur.spaces.space import IntParameter

NEIGHBOURS = 4  # nearest forms within one mutation


class TiedSpace(StructuredSpace):
    """Equal numbers of KV groups and FFN channels in all kept blocks of a kind; other blocks are dropped.

    With the unit `hidden` the width of the residual stream is searched, too: one number for the whole model, as in
    Minitron (arXiv 2407.14679).

    Each target is met by a few forms; a form leaves the choice of the dropped blocks. Costs: see `cost.cost`.

    Args:
        shape: of the dense model, with equal blocks.
        rules: for the levels; `units` out of groups, heads, channels, hidden, blocks.
        targets: shares of the blocks' `of` to remove, ascending.
        of: quantity of the target.
        repairs: compensations for removed weights.

    Raises:
        ValueError: if the blocks differ, the rules don't fit them, a target can't be met, or a latency is not known.
    """

    def __init__(
        self,
        shape: ModelShape,
        rules: LevelRules,
        targets: Sequence[float],
        of: CostName = "params",
        repairs: Sequence[str] = ("none",),
    ) -> None:
        self._forms = FormTargets(shape, rules, targets, of)
        super().__init__(shape, repairs, self._forms)
        self._droppable = self._forms.droppable
        self._uniform = [self._architecture(*self._forms.uniform(i)) for i in range(len(targets))]

    def target_of(self, candidate: Architecture) -> int | None:
        return self._forms.target_of(candidate.blocks, candidate.hidden)

    @property
    def dense(self) -> Architecture:
        return self._architecture(self._forms.dense, ())

    def uniform(self, target: int) -> Architecture:
        """The fewest dropped blocks, spread over the depth, see `FormTargets.uniform`."""
        return self._uniform[target]

    def from_scores(self, kind: str, scores: Scores, target: int) -> Architecture | None:
        """The most dropped blocks, those with the lowest scores; None for scores of units."""
        if kind not in DEPTH:
            return None
        by_block = scores.blocks[kind]
        order = sorted(self._droppable, key=lambda block: by_block[block])
        found = self._forms.find(target, order, shallow=True)
        return self._architecture(*found) if found and found[1] else None

    # --- variation ---

    def sample(self, rng: np.random.Generator, target: int) -> Architecture:
        """A random form of the target with random dropped blocks."""
        repair, forms = int(rng.integers(len(self.repairs))), self._forms.forms[target]
        for _ in range(ATTEMPTS):
            found = self._with_dropped(forms[rng.integers(len(forms))], (), repair, rng)
            if self.target_of(found) == target:
                return found
        return self._uniform[target]

    def mutate(self, candidate: Architecture, rng: np.random.Generator) -> Architecture:
        """Half of the mutations exchange a dropped block, the others take one of the nearest forms."""
        target, (form, dropped, repair) = self._met_target(candidate), self._parts(candidate)
        another = self._other_repair(repair, rng)
        if another is not None:
            return self._architecture(form, dropped, another)
        near = [other for other in self._nearest(form, target) if other != form][:NEIGHBOURS]
        kept = [index for index in self._droppable if index not in dropped]
        for _ in range(ATTEMPTS):
            if dropped and kept and (not near or rng.random() < 0.5):
                back = dropped[rng.integers(len(dropped))]
                swapped = [*(index for index in dropped if index != back), kept[rng.integers(len(kept))]]
                found = self._architecture(form, swapped, repair)
            elif near:
                found = self._with_dropped(near[rng.integers(len(near))], dropped, repair, rng)
            else:
                break
            if self.target_of(found) == target:
                return found
        return self._architecture(form, dropped, (repair + 1) % len(self.repairs))

    def crossover(self, first: Architecture, second: Architecture, rng: np.random.Generator) -> Architecture:
        """The form of one parent; blocks dropped by both are dropped first, then those dropped by either."""
        target = self._met_target(first)
        (form, dropped, repair), (other, also, another) = self._parts(first), self._parts(second)
        if other in self._forms.forms[target] and rng.random() < 0.5:
            form = other
        repair = repair if rng.random() < 0.5 else another
        both, either = set(dropped) & set(also), sorted(set(dropped) ^ set(also))
        order = [*sorted(both), *(either[i] for i in rng.permutation(len(either)))]
        found = self._with_dropped(form, order, repair, rng)
        return found if self.target_of(found) == target else first

    def repair(self, candidate: Architecture, target: int, rng: np.random.Generator) -> Architecture:
        if self.target_of(candidate) == target:
            return candidate
        form, dropped, repair = self._parts(candidate)
        for near in self._nearest(form, target):
            found = self._with_dropped(near, rng.permutation(dropped).tolist(), repair, rng)
            if self.target_of(found) == target:
                return found
        return self._uniform[target]

    def _nearest(self, form: Form, target: int) -> list[Form]:
        """Forms of the target, the nearest first."""
        return sorted(self._forms.forms[target], key=lambda other: self._forms.distance(other, form))

    def _with_dropped(
        self, form: Form, dropped: Sequence[int], repair: int, rng: np.random.Generator
    ) -> Architecture:
        """The form with as many dropped blocks as it requires: these in order, then random others."""
        others = [index for index in rng.permutation(self._droppable).tolist() if index not in dropped]
        n_dropped = self._forms.dense.n_blocks - form.n_blocks
        return self._architecture(form, [*dropped, *others][:n_dropped], repair)

    # --- meaning of a candidate ---

    def _check_blocks(self, candidate: Architecture) -> None:
        form, dropped, repair = self._parts(candidate)
        alike = self._forms.alike
        if (
            form.kept not in self._forms.shapes
            or form.hidden not in self._forms.hidden
            or not self._forms.is_held(form.kept, form.hidden)
            or not set(dropped) <= set(self._droppable)
            or self._architecture(form, dropped, repair) != candidate
        ):
            raise ValueError(
                f"Expected {self._forms.dense.n_blocks} blocks, each dropped or with the same one of "
                f"{alike.kv_groups} KV groups and of {alike.ffn} channels"
                f"{_of_queries(alike.queries)}, got {candidate.text[:80]!r}."
            )

    def locality_key(self, candidate: Architecture) -> Any:
        """The repair first, since it changes every block."""
        return candidate.repair, candidate.hidden, candidate.blocks

    # --- parameters ---

    def parameters(self) -> tuple[IntParameter, ...]:
        """Positions of the levels, a 0/1 parameter for each droppable block, and the repair."""
        last = {
            "kv_groups": len(self._forms.alike.kv_groups) - 1,
            "ffn": len(self._forms.alike.ffn) - 1,
            "queries": len(self._forms.alike.queries) - 1,
            "hidden": len(self._forms.hidden) - 1,
            **{f"block{index}": 1 for index in self._droppable},
            "repair": len(self.repairs) - 1,
        }
        return tuple(IntParameter(name, 0, high) for name, high in last.items() if high)

    def to_parameters(self, candidate: Architecture) -> dict[str, int]:
        form, dropped, repair = self._parts(candidate)
        values = {
            "kv_groups": self._forms.alike.kv_groups.index(form.kept.kv_groups),
            "ffn": self._forms.alike.ffn.index(form.kept.ffn),
            "queries": self._forms.alike.queries.index(form.kept.queries),
            "hidden": self._forms.hidden.index(form.hidden),
            **{f"block{index}": int(index in dropped) for index in self._droppable},
            "repair": repair,
        }
        return {parameter.name: values[parameter.name] for parameter in self.parameters()}

    def from_parameters(
        self, values: Mapping[str, int], target: int, rng: np.random.Generator
    ) -> Architecture:
        alike, dense = self._forms.alike, self._forms.dense
        dropped = [index for index in self._droppable if values[f"block{index}"]]
        kept = dense.kept._replace(
            kv_groups=alike.kv_groups[values.get("kv_groups", 0)],
            ffn=alike.ffn[values.get("ffn", 0)],
            queries=alike.queries[values.get("queries", 0)],
        )
        form = Form(dense.n_blocks - len(dropped), kept, self._forms.hidden[values.get("hidden", 0)])
        return self.repair(self._architecture(form, dropped, values.get("repair", 0)), target, rng)

    # --- helpers ---

    def _architecture(self, form: Form, dropped: Collection[int], repair: int = 0) -> Architecture:
        return Architecture(self._forms.blocks(form, dropped), self._repair_name(repair), form.hidden)

    def _parts(self, candidate: Architecture) -> tuple[Form, list[int], int]:
        """Form, dropped blocks and index of the repair."""
        form, dropped = self._forms.form_of(candidate.blocks, candidate.hidden)
        return form, dropped, self._repair_of(candidate)


def _of_queries(queries: Sequence[int]) -> str:
    return f", with {', '.join(map(str, queries))} query heads a group (0: all)" if len(queries) > 1 else ""
