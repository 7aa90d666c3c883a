"""Every family: measured block by block as by its own forward pass, its weights pruned, its units removed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from secateur.evaluators.losses import Teacher, loss_sums
from secateur.pruners.export.export import check_structured, export_structured
from secateur.pruners.models.cutting import LiveSublayer
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.live_experts import live_part
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.models.shape import model_shape
from secateur.pruners.structure.pruning import prune_structure
from secateur.pruners.structure.reorder import ImportanceOrdered, reorder
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.architecture.cost import cost
from tests.cut_models import manifest, small_tokenizer
from tests.families import FAMILIES, make, some_of_each
from tests.family_configs import REFUSED, VOCABULARY, WINDOW
from tests.family_table import WHOLE_GROUPS, row
from tests.models import random_tokens

TOKENS = random_tokens(2, 3 * WINDOW, vocab_size=VOCABULARY - 10)
TABLE = (
    (Path(__file__).parents[1] / "docs" / "reference" / "families.md")
    .read_text(encoding="utf-8")
    .splitlines()
)
CUT = [name for name, (_, _, refusal) in FAMILIES.items() if not refusal]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(request.param)
    return request.param, model, dissect(model)


def own_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def outputs_of(layout, part):
    """Output projections of a sub-layer: of all experts, and of mixers that run in parallel over the tokens."""
    kinds = ("attention", "recurrent") if part.kind == "attention" else ("mlp", "experts")
    return [x for x in layout.block.linears if x.is_output and x.sublayer in kinds]


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_losses_are_those_of_its_own_forward_pass_dense_and_pruned(family):
    _, model, anatomy = family
    runner = BlockRunner(anatomy)
    dense, inputs = own_logits(model), runner.start(TOKENS)
    teacher = Teacher(anatomy, lambda: runner.run(inputs), keep=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {linear.name: linear.weight for linear in anatomy.linears}
    prune(anatomy, dict.fromkeys(weights, 0.5), Method("wanda"), TOKENS, sequential=False)
    pruned = own_logits(model)
    found = loss_sums(anatomy, runner.run(inputs), TOKENS, teacher).means()
    p, q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-7)
    ce = F.nll_loss(q[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert found["ce"] == pytest.approx(float(ce), rel=1e-5)
    assert found["kl"] > 1e-6, "pruning shows"
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    tied = {anatomy.embedding.weight.data_ptr()}
    assert changed == {f"{name}.weight" for name in weights} - tied, "nothing else, of no other tower"
    for linear in anatomy.linears:
        share = float((linear.weight == 0).float().mean())
        assert share == pytest.approx(0.5, abs=1 / min(linear.weight.shape))
        linear.point_to(weights[linear.name])
    assert torch.equal(own_logits(model), dense)


def test_the_table_of_families_says_so(family):
    name, _, anatomy = family
    assert row(name, anatomy) in TABLE
    assert len([line for line in TABLE if line.startswith("| ") and "(`" in line]) == len(FAMILIES | REFUSED)


def test_every_matrix_of_a_block_is_pruned_or_kept_on_purpose(family):
    _, _, anatomy = family
    assert [block.unknown for block in anatomy.blocks] == [()] * len(anatomy.blocks)


def test_windows_bound_attention_as_the_model_has_it(family):
    """Early tokens reach the last one through the windows of all blocks, or through a block that sees all."""
    name, model, anatomy = family
    other = TOKENS.clone()
    other[:, 0] = (other[:, 0] + 1) % (VOCABULARY - 10)
    changed = own_logits(model) != own_logits(model, other)
    reach = sum((block.window or 1000) - 1 for block in anatomy.blocks)
    if any(mixer.kind == "recurrent" for block in anatomy.blocks for mixer in block.mixers):
        return
    seen = changed[0].any(-1)
    if reach < 900:
        assert not seen[reach + 1 :].any(), name
        assert seen[: reach // 2].all()


def test_units_are_cut_or_refused_with_the_reason(family):
    """Removed is zeroed: the logits are those of the model with output projections of zeros."""
    name, model, anatomy = family
    refusal = FAMILIES[name][2]
    if refusal:
        with pytest.raises(ValueError, match=refusal) as caught:
            find_layouts(anatomy, experts=True)
        assert "\n" not in str(caught.value)
        return
    dense = own_logits(model)
    for layout in find_layouts(anatomy, experts=True):
        for part in layout.parts:
            outputs = outputs_of(layout, part)
            held = [(x.weight, x.module.bias) for x in outputs]
            for output in outputs:
                output.point_to(torch.zeros_like(output.weight))
                bias = output.module.bias
                if bias is not None:
                    output.module.bias = torch.nn.Parameter(torch.zeros_like(bias), requires_grad=False)
            zeroed = own_logits(model)
            for output, (weight, bias) in zip(outputs, held, strict=True):
                output.point_to(weight)
                output.module.bias = bias
            assert not close(zeroed, dense), part.name
            live = live_part(part)
            live.remove()
            try:
                removed = own_logits(model)
            finally:
                live.restore()
            assert close(removed, zeroed), part.name
            assert torch.equal(own_logits(model), dense)
    both = [live_part(part) for part in find_layouts(anatomy, experts=True)[-1].parts]
    for live in both:
        live.remove()
    for live in both:
        live.restore()
    assert torch.equal(own_logits(model), dense)


def test_query_heads_are_cut_singly_wherever_several_share_a_kv_head(family):
    """Removed is zeroed: the logits are those of the model with zeros in the heads' columns of o."""
    name, model, anatomy = family
    if FAMILIES[name][2]:
        return
    dense = own_logits(model)
    for layout in find_layouts(anatomy, experts=True):
        part = layout.attention
        if part is None:
            continue
        several = part.heads_per_group > 1 and not part.rigid
        assert part.splits == (several and name not in WHOLE_GROUPS)
        if not part.splits:
            continue
        n, size, kept = part.n_units, part.heads_per_group, part.heads_per_group - 1
        heads = torch.tensor([[(x + group + 1) % size for x in range(size)] for group in range(n)])
        tensors = reorder(part, torch.arange(n).flip(0), None, (), ("none",), 0.0, heads)
        ordered = ImportanceOrdered(part, tensors)
        weight, zeroed = part.output.weight, torch.zeros_like(part.output.weight)
        columns = ordered.columns(n, kept)
        zeroed[:, columns] = weight[:, columns]
        part.output.point_to(zeroed)
        wanted = own_logits(model)
        part.output.point_to(weight)
        live = LiveSublayer(part)
        live.cut(n, ordered.pieces(n, "none", kept), kept)
        try:
            got = own_logits(model)
        finally:
            live.restore()
        assert close(got, wanted)
        assert not close(wanted, dense)
        assert torch.equal(own_logits(model), dense)


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize("name", CUT)
def test_whatever_can_be_cut_is_exported_with_a_shape_for_each_block(name, tmp_path):
    """Stock transformers load it, with the code in the directory, and generate with the cache as without."""
    model = make(name)
    anatomy = dissect(model)
    kept = some_of_each(anatomy)
    if name == "gemma3 with images":
        with pytest.raises(ValueError, match="a model of text alone"):
            check_structured(anatomy, small_tokenizer(), kept, "hf")
        kept = [Kept(block.attention_units, 20) for block in anatomy.blocks]
    check_structured(anatomy, small_tokenizer(), kept, "hf")
    shapes = model_shape(anatomy, 1, 4)
    prune_structure(anatomy, kept, importance="magnitude", repair="none", tokens=TOKENS, sequential=False)
    report = export_structured(
        anatomy, small_tokenizer(), kept, manifest(kept), tmp_path / "out", check_tokens=TOKENS
    )
    assert report.comparison.logit_error <= 1e-4
    assert report.comparison.greedy_gap <= 1e-4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert sum(p.numel() for p in again.parameters()) == report.manifest.parameters["saved"]
    assert cost(shapes, kept)["params"] == report.manifest.parameters["saved"]


@pytest.mark.parametrize("name", CUT)
def test_a_removed_block_gives_what_it_gets(name):
    """Also where it norms the stream itself; it costs as much as is left out of an export."""
    model = make(name)
    anatomy = dissect(model)
    runner, last = BlockRunner(anatomy), len(anatomy.blocks) - 1
    inputs = runner.start(TOKENS)
    hidden = inputs.hidden
    for block in anatomy.blocks[:last]:
        hidden = runner.block(block.index, hidden, inputs)
    wanted = anatomy.logits(anatomy.tail(hidden))
    shape = model_shape(anatomy, 1, 4)
    whole = sum(parameter.numel() for parameter in anatomy.blocks[last].module.parameters())
    kept = [*(block.whole for block in anatomy.blocks[:last]), Kept(0, 0)]
    prune_structure(anatomy, kept, importance="magnitude", repair="none", tokens=TOKENS, sequential=False)
    assert close(own_logits(model), wanted)
    assert cost(shape, kept)["params"] == shape.n_params - whole


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize("name", ["opt, norms behind", "minimax"])
@pytest.mark.parametrize("form", ["hf", "hf-stock"])
def test_blocks_that_norm_the_stream_are_left_out_of_exports(name, form, tmp_path):
    anatomy = dissect(make(name))
    kept = [block.whole for block in anatomy.blocks]
    kept[-1] = Kept(0, 0)
    with pytest.raises(ValueError, match="which norms the stream itself"):
        check_structured(anatomy, small_tokenizer(), kept, "hf-padded")
    check_structured(anatomy, small_tokenizer(), kept, form)
    prune_structure(anatomy, kept, importance="magnitude", repair="none", tokens=TOKENS, sequential=False)
    record = manifest(kept, form)
    report = export_structured(
        anatomy, small_tokenizer(), kept, record, tmp_path / "out", check_tokens=TOKENS
    )
    assert report.comparison.logit_error <= 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_t_be_run_block_by_block_is_refused_in_one_line(name):
    assert row(name, None) in TABLE
    with pytest.raises(ValueError, match=REFUSED[name][2]) as caught:
        dissect(make(name))
    assert "\n" not in str(caught.value)
