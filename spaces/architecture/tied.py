"""The space `architecture` with all blocks alike, so that stock classes load what comes out of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from secateur.spaces.architecture.candidate import GONE, Architecture
from secateur.spaces.architecture.cost import Of
from secateur.spaces.architecture.forms import Form, FormTargets
from secateur.spaces.architecture.levels import LevelRules
from secateur.spaces.architecture.scores import Scores
from secateur.spaces.architecture.structured import StructuredSpace
from secateur.spaces.methods import DEPTH
from secateur.spaces.mutation_crossover import ATTEMPTS
from secateur.spaces.parameters import IntParameter
from secateur.spaces.shape import ModelShape

NEIGHBOURS = 4  # forms that are near enough for one mutation


class TiedSpace(StructuredSpace):
    """One number of KV groups and one of FFN channels for all blocks, but for those that are dropped whole.

    A target is met by certain forms alone; within one the choice is which blocks to drop. Costs: those of
    `cost.cost`.

    Args:
        shape: the dense model, with blocks that are all alike.
        rules: which numbers may be kept; `units` out of groups, channels, blocks.
        targets: shares of the blocks' `of` that are removed, ascending.
        of: what a target counts.
        repairs: how kept weights may make up for removed ones.

    Raises:
        ValueError: if the blocks differ, the rules don't fit them, a target can't be met, or a latency is not known.
    """

    def __init__(
        self,
        shape: ModelShape,
        rules: LevelRules,
        targets: Sequence[float],
        of: Of = "params",
        repairs: Sequence[str] = ("none",),
    ) -> None:
        self._forms = FormTargets(shape, rules, targets, of)
        super().__init__(shape, repairs, self._forms)
        self._droppable = self._forms.droppable
        self._uniform = [self._made(*uniform) for uniform in self._forms.uniform]

    def target_of(self, candidate: Architecture) -> int | None:
        return self._forms.target_of(candidate.blocks)

    @property
    def dense(self) -> Architecture:
        return self._made(self._forms.dense, ())

    def uniform(self, target: int) -> Architecture:
        """As few blocks dropped as can be, spread over the depth, see `FormTargets.uniform`."""
        return self._uniform[target]

    def from_scores(self, kind: str, scores: Scores, target: int) -> Architecture | None:
        """As many blocks dropped as can be, those that score least; None where units are scored."""
        if kind not in DEPTH:
            return None
        by_block = scores.blocks[kind]
        order = sorted(self._droppable, key=lambda block: by_block[block])
        found = self._forms.find(target, order, shallow=True)
        return self._made(*found) if found and found[1] else None

    # --- variation ---

    def sample(self, rng: np.random.Generator, target: int) -> Architecture:
        """A random form of the target, random blocks dropped."""
        repair, forms = int(rng.integers(len(self._repairs))), self._forms.forms[target]
        for _ in range(ATTEMPTS):
            found = self._fitted(forms[rng.integers(len(forms))], (), repair, rng)
            if self.target_of(found) == target:
                return found
        return self._uniform[target]

    def mutate(self, candidate: Architecture, rng: np.random.Generator) -> Architecture:
        """Half of them drop another block in place of one; the others take one of the nearest forms."""
        target, (form, dropped, repair) = self._target(candidate), self._parts(candidate)
        another = self._other_repair(repair, rng)
        if another is not None:
            return self._made(form, dropped, another)
        near = [other for other in self._nearest(form, target) if other != form][:NEIGHBOURS]
        kept = [index for index in self._droppable if index not in dropped]
        for _ in range(ATTEMPTS):
            if dropped and kept and (not near or rng.random() < 0.5):
                back = dropped[rng.integers(len(dropped))]
                swapped = [*(index for index in dropped if index != back), kept[rng.integers(len(kept))]]
                found = self._made(form, swapped, repair)
            elif near:
                found = self._fitted(near[rng.integers(len(near))], dropped, repair, rng)
            else:
                break
            if self.target_of(found) == target:
                return found
        return self._made(form, dropped, (repair + 1) % len(self._repairs))

    def crossover(self, first: Architecture, second: Architecture, rng: np.random.Generator) -> Architecture:
        """The form of one of them that meets the target; what both drop is dropped first, then what either does."""
        target = self._target(first)
        (form, dropped, repair), (other, also, another) = self._parts(first), self._parts(second)
        if other in self._forms.forms[target] and rng.random() < 0.5:
            form = other
        repair = repair if rng.random() < 0.5 else another
        both, either = set(dropped) & set(also), sorted(set(dropped) ^ set(also))
        order = [*sorted(both), *(either[i] for i in rng.permutation(len(either)))]
        found = self._fitted(form, order, repair, rng)
        return found if self.target_of(found) == target else first

    def repair(self, candidate: Architecture, target: int, rng: np.random.Generator) -> Architecture:
        if self.target_of(candidate) == target:
            return candidate
        form, dropped, repair = self._parts(candidate)
        for near in self._nearest(form, target):
            found = self._fitted(near, rng.permutation(dropped).tolist(), repair, rng)
            if self.target_of(found) == target:
                return found
        return self._uniform[target]

    def _nearest(self, form: Form, target: int) -> list[Form]:
        """The forms of the target, the nearest first."""
        return sorted(self._forms.forms[target], key=lambda other: self._forms.apart(other, form))

    def _fitted(
        self, form: Form, dropped: Sequence[int], repair: int, rng: np.random.Generator
    ) -> Architecture:
        """The form with as many of these blocks dropped as it asks for, in order, then random other ones."""
        others = [index for index in rng.permutation(self._droppable).tolist() if index not in dropped]
        n_dropped = self._forms.dense.n_blocks - form.n_blocks
        return self._made(form, [*dropped, *others][:n_dropped], repair)

    # --- what a candidate means ---

    def _check_blocks(self, candidate: Architecture) -> None:
        form, dropped, repair = self._parts(candidate)
        alike = self._forms.alike
        fits = form.kept.kv_groups in alike.kv_groups and form.kept.ffn in alike.ffn
        if (
            not fits
            or not set(dropped) <= set(self._droppable)
            or self._made(form, dropped, repair) != candidate
        ):
            raise ValueError(
                f"Expected {self._forms.dense.n_blocks} blocks that all keep one of {alike.kv_groups} KV groups and "
                f"one of {alike.ffn} channels, or are dropped, got {candidate.text[:80]!r}."
            )

    def locality_key(self, candidate: Architecture) -> Any:
        """The repair changes every block."""
        return candidate.repair, candidate.blocks

    # --- parameters ---

    def parameters(self) -> tuple[IntParameter, ...]:
        """Positions of the kept numbers, whether each block is dropped (1), and the repair."""
        last = {
            "kv_groups": len(self._forms.alike.kv_groups) - 1,
            "ffn": len(self._forms.alike.ffn) - 1,
            **{f"block{index}": 1 for index in self._droppable},
            "repair": len(self._repairs) - 1,
        }
        return tuple(IntParameter(name, 0, high) for name, high in last.items() if high)

    def to_parameters(self, candidate: Architecture) -> dict[str, int]:
        form, dropped, repair = self._parts(candidate)
        values = {
            "kv_groups": self._forms.alike.kv_groups.index(form.kept.kv_groups),
            "ffn": self._forms.alike.ffn.index(form.kept.ffn),
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
            kv_groups=alike.kv_groups[values.get("kv_groups", 0)], ffn=alike.ffn[values.get("ffn", 0)]
        )
        form = Form(dense.n_blocks - len(dropped), kept)
        return self.repair(self._made(form, dropped, values.get("repair", 0)), target, rng)

    # --- helpers ---

    def _made(self, form: Form, dropped: Collection[int], repair: int = 0) -> Architecture:
        return Architecture(self._forms.blocks(form, dropped), self._named(repair))

    def _parts(self, candidate: Architecture) -> tuple[Form, list[int], int]:
        """The form, the dropped blocks and the index of the repair; block 0 is never dropped."""
        dropped = [index for index, kept in enumerate(candidate.blocks) if kept == GONE]
        form = Form(len(candidate.blocks) - len(dropped), candidate.blocks[0])
        return form, dropped, self._repair_of(candidate)
