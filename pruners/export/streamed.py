"""Streamed export: a mapped model pruned block by block, each written once, and continued after a kill."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Tensor

from secateur.pruners.blockwise import BlockwisePruning
from secateur.pruners.calibration.collected import collected_by_walks, packed_statistics
from secateur.pruners.calibration.stream import Walk
from secateur.pruners.export.cut import stored
from secateur.pruners.export.export import (
    ExportReport,
    count_asked,
    stored_as,
    write_record,
    zeros_of_parameters,
)
from secateur.pruners.export.export_check import TOLERANCES, ExportError, check_logits
from secateur.pruners.export.manifest import Manifest, file_record
from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.checkpoints.quiet import quiet
from secateur.pruners.models.experts import joined_experts
from secateur.pruners.models.mapped import MappedModel
from secateur.pruners.stores.block_files import digest_of, load_tensors, save_tensors
from secateur.spaces.whole_file import whole_file

PROGRESS, INDEX = "progress.json", "model.safetensors.index.json"
_CALIBRATION, _DENSE, _PRUNED, _CHECK = "calibration", "dense ", "pruned ", "check"


@dataclass
class Progress:
    """Progress of an unfinished export, as it is kept beside the destination.

    Args:
        digest: of all that the export depends on.
        n_blocks: blocks that are done.
        shards: size and SHA-256 of each finished shard, see `file_record`.
        names: the shard of each tensor.
        zeros: counted in each projection.
        weights: of each projection.
        counted: zeros of each stored parameter.
        lossy: whether the dtype of the files changed any value.
    """

    digest: str
    n_blocks: int = 0
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    zeros: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    lossy: bool = False


class StreamedExport:
    """Streamed pruning and export into a directory that `new_directory` yields.

    Written are one shard for each block, one for all else, and beside them, after each block, the hidden states before
    the next one and the progress. A process that finds them goes on with the next block.

    Args:
        loaded: the dense model.
        anatomy: of it.
        pruning: of its blocks.
        windows: of each text to measure on, by name.
        batch_tokens: of these that are computed at a time.
        check_tokens: ids to compare logits on.
        made: directory of the model.
        scratch: of the progress and the states.
        identity: all that the result depends on, as plain values.
        say: told in one line what is being done.
    """

    def __init__(
        self,
        loaded: MappedModel,
        anatomy: Anatomy,
        pruning: BlockwisePruning,
        windows: Mapping[str, Int64[Tensor, "windows length"]],
        batch_tokens: int,
        check_tokens: Int64[Tensor, "rows length"],
        made: Path,
        scratch: Path,
        identity: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._loaded, self._anatomy, self._pruning = loaded, anatomy, pruning
        self._check_tokens = check_tokens
        self._made, self._scratch, self._say = made, scratch, say
        self._dtype = loaded.stored_dtype
        self._walks = {_CHECK: Walk(anatomy, check_tokens)}
        for name, tokens in windows.items():
            dense = Walk(anatomy, tokens, batch_tokens)
            self._walks |= {_DENSE + name: dense, _PRUNED + name: copy.copy(dense)}
        if pruning.detail != "nothing":
            self._walks[_CALIBRATION] = Walk(anatomy, pruning.tokens)
        self._progress = Progress(digest_of(identity))

    def dense(self, name: str) -> list[Float[Tensor, "batch length width"]]:
        """Outputs of the last block of the dense model on a text, a batch each; after `run`."""
        return self._walks[_DENSE + name].hidden

    def pruned(self, name: str) -> list[Float[Tensor, "batch length width"]]:
        """Likewise of the pruned model."""
        return self._walks[_PRUNED + name].hidden

    @torch.no_grad()
    def run(self) -> None:
        """Prune and write all blocks that are not done."""
        blocks = self._anatomy.blocks
        if not self._continue():
            self._begin()
        for block in blocks[self._progress.n_blocks :]:
            self._say(f"pruning block {block.index + 1}/{len(blocks)}")
            with self._anatomy.hold(block):
                self._prune(block)
                self._write_block(block)
            self._progress.n_blocks += 1
            self._keep_states()
            self._keep_progress()

    def _prune(self, block: Block) -> None:
        """Walk all tokens through a block, and prune it between."""
        statistics: dict[str, Tensor] = {}
        calibration = self._walks.get(_CALIBRATION)
        if calibration is not None:
            collected = collected_by_walks(gram=self._pruning.detail == "gram")
            part, outputs = calibration.collect(block, **collected)
            statistics = packed_statistics(part)
            if not self._pruning.sequential:
                calibration.hidden = outputs
            del part, outputs
        self._through(block, _DENSE)
        self._pruning.prune(block, statistics)
        if calibration is not None and self._pruning.sequential:
            calibration.hidden = calibration.through(block)
        self._through(block, _PRUNED, _CHECK)

    def _through(self, block: Block, *kinds: str) -> None:
        """Walk the tokens of these kinds through a block as it is."""
        for walk in (walk for name, walk in self._walks.items() if name.startswith(kinds)):
            walk.hidden = walk.through(block)

    # --- files ---

    def _shard(self, index: int) -> str:
        """Name of the shard of all that is outside of the blocks, 0, or of a block, from 1 on."""
        return f"model-{index + 1:05d}-of-{len(self._anatomy.blocks) + 1:05d}.safetensors"

    def _write_block(self, block: Block) -> None:
        wanted = self._pruning.sparsity
        asked = {x.name: wanted[x.name] for x in block.linears if x.name in wanted}
        with stored_as(block.module, self._dtype) as lossy:
            zeros, weights = count_asked(self._loaded.model, asked)
            tensors = self._stored(block.module.state_dict(prefix=f"{block.name}."))
            with joined_experts(block.module):
                tensors |= self._stored(block.module.state_dict(prefix=f"{block.name}."))
                self._progress.counted |= zeros_of_parameters(block.module, zeros, block.name)
                self._write_shard(block.index + 1, tensors, lossy=lossy)
        self._progress.zeros |= zeros
        self._progress.weights |= weights

    def _stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a state dict that the checkpoint has, by their names there."""
        names = self._loaded.stored_names
        return {names[name]: tensor for name, tensor in state.items() if name in names}

    def _begin(self) -> None:
        """Write the shard of all that is outside of the blocks."""
        inside = tuple(f"{block.name}." for block in self._anatomy.blocks)
        names = [name for name in self._loaded.names if not name.startswith(inside)]
        state, tensors, lossy = self._loaded.model.state_dict(), dict[str, Tensor](), False
        for name in names:
            mapped, value = self._loaded.names[name], state[name]
            if mapped.dtype == self._dtype and torch.promote_types(value.dtype, mapped.dtype) == value.dtype:
                tensors |= self._stored(
                    {name: mapped}
                )  # converting it to the precision and back changes nothing
            else:
                written, changed = stored({name: value}, self._dtype)
                tensors |= self._stored(written)
                lossy |= changed
        self._write_shard(0, tensors, lossy=lossy)
        self._keep_progress()

    def _write_shard(self, index: int, tensors: Mapping[str, Tensor], *, lossy: bool) -> None:
        path = self._made / self._shard(index)
        with whole_file(path) as new:
            save_file(dict(tensors), new, metadata={"format": "pt"})
        self._progress.shards[path.name] = file_record(path)
        self._progress.names |= dict.fromkeys(tensors, path.name)
        self._progress.lossy |= lossy

    def _states(self, n_blocks: int) -> Path:
        return self._scratch / f"states-{n_blocks:05d}.safetensors"

    def _keep_states(self) -> None:
        """Write the hidden states, and use the mapped ones from now on."""
        states = {f"{name}.{i}": x for name, walk in self._walks.items() for i, x in enumerate(walk.hidden)}
        path = self._states(self._progress.n_blocks)
        save_tensors(path, states, self._progress.digest)
        del states
        self._use(load_tensors(path, self._progress.digest))

    def _use(self, states: Mapping[str, Tensor] | None) -> None:
        assert states is not None, "written, or checked"
        for name, walk in self._walks.items():
            walk.hidden = [states[f"{name}.{i}"] for i in range(len(walk.hidden))]

    def _keep_progress(self) -> None:
        with whole_file(self._scratch / PROGRESS) as new:
            new.write_text(json.dumps(asdict(self._progress)), encoding="utf-8")
        for path in self._scratch.glob("states-*"):
            if path != self._states(self._progress.n_blocks):
                path.unlink()

    def _continue(self) -> bool:
        """Go on from what a killed process left, if that is whole and of this export; else remove it."""
        try:
            there = Progress(**json.loads((self._scratch / PROGRESS).read_text(encoding="utf-8")))
            whole = there.digest == self._progress.digest and all(
                file_record(self._made / name) == written for name, written in there.shards.items()
            )
            states = load_tensors(self._states(there.n_blocks), there.digest) if there.n_blocks else {}
        except (OSError, ValueError, TypeError):
            whole, states = False, None
        if not whole or states is None:
            shutil.rmtree(self._made)
            self._made.mkdir()
            return False
        self._progress = there
        if states:
            self._use(states)
        self._say(f"going on after block {there.n_blocks}/{len(self._anatomy.blocks)} of an earlier start")
        return True

    # --- the end ---

    @torch.no_grad()
    def finish(self, to: Path, manifest: Manifest) -> ExportReport:
        """Write all but the weights, and check the directory: its weights in a fresh process, in their own dtype.

        The check is that of `export_model`, but for the dtype: a process that loads weights as they are stored maps
        them, and takes no memory for them.

        Raises:
            ExportError: if what was loaded differs from what was computed block by block.
        """
        progress, made, loaded = self._progress, self._made, self._loaded
        missing = set(loaded.stored_names.values()) - progress.names.keys()
        if missing:
            raise ExportError(f"Expected every stored weight to be written, got none for {min(missing)}.")
        total = sum(x.numel() for x in loaded.model.parameters()) * self._dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(progress.names.items()))}
        (made / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        model: Any = loaded.model
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = self._dtype, [type(model).__name__]
        with quiet():
            config.save_pretrained(made)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(made)
            loaded.tokenizer.save_pretrained(made)
        rounded = progress.lossy or loaded.precision != self._dtype
        last = torch.cat(self._walks[_CHECK].hidden)
        comparison = check_logits(
            made,
            self._scratch,
            self._anatomy.logits(self._anatomy.tail(last)).float(),
            loaded.tokenizer,
            zeros=progress.counted,
            tokens=self._check_tokens,
            dtype=self._dtype,
            tolerance=max(TOLERANCES[loaded.precision], TOLERANCES[self._dtype] if rounded else 0.0),
        )
        manifest = replace(manifest, asked=dict(self._pruning.sparsity))
        counts = {"zeros": progress.zeros, "weights": progress.weights}
        return ExportReport(to, write_record(made, manifest, self._dtype, comparison, **counts), comparison)
