"""K-prune's reconstruction, which follows the stream of the pruned model."""

from __future__ import annotations

import pytest
import torch

from secateur.pruners.calibration.stream import stream_blocks, stream_states
from secateur.pruners.models.cutting import LiveSublayer
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import MixtureLayout
from secateur.pruners.structure.kprune import reconstructed
from secateur.pruners.structure.refit import RepairInputs, least_squares
from secateur.pruners.structure.reorder import cut_pieces
from tests.families import make
from tests.family_configs import VOCABULARY
from tests.models import random_tokens, small_anatomy
from tests.structures import CONFIGS, build, logits

TOKENS = random_tokens(16, 24)
SHORT = random_tokens(16, 24, vocab_size=VOCABULARY)
WHOLE = {"attention": (0, 1), "mlp": tuple(range(48))}
CUT = {"attention": (1,), "mlp": tuple(range(40, 8, -1))}


@pytest.fixture(scope="module")
def anatomy():
    return small_anatomy(n_layers=3)


@pytest.fixture(scope="module")
def layouts(anatomy):
    return find_layouts(anatomy)


def cut(layouts, stays, weights):
    """The live model cut, with these output projections; what puts it back."""
    live = []
    for layout, kept in zip(layouts, stays, strict=True):
        for part in layout.sublayers:
            one, units = LiveSublayer(part), kept[part.kind]
            live.append(one)
            if not units:
                one.remove()
            elif len(units) < part.n_units:
                one.cut(len(units), cut_pieces(part, units))
                if part.output.name in weights:
                    part.output.point_to(weights[part.output.name])
    return live


def errors(anatomy, layouts, stays, weights):
    """Squared distance to the dense stream behind each block."""
    dense = list(stream_states(anatomy, TOKENS))
    live = cut(layouts, stays, weights)
    found = list(stream_states(anatomy, TOKENS))
    for one in live:
        one.restore()
    return [float((x - y).square().mean()) for x, y in zip(found, dense, strict=True)][1:]


def test_the_first_cut_sublayer_is_fitted_by_least_squares_of_the_dense_outputs(anatomy, layouts):
    """Nothing below was lost, so it is the re-fit that the store has, undampened."""
    layout = layouts[0].mlp
    stays = [WHOLE | {"mlp": CUT["mlp"]}, WHOLE, WHOLE]
    found = reconstructed(anatomy, layouts, stays, TOKENS)
    seen = next(stream_blocks(anatomy, TOKENS, outputs="gram")).outputs[layout.output.name]
    order = torch.tensor([*CUT["mlp"], *(set(range(48)) - set(CUT["mlp"]))])
    given = RepairInputs(
        layout.output.weight[:, order], seen.mean[order], seen.second_moment[order][:, order], 1e-6, "down"
    )
    assert found.keys() == {layout.output.name}
    (wanted,) = least_squares(given, [len(CUT["mlp"])])
    assert torch.allclose(found[layout.output.name].double(), wanted, atol=1e-3)


def test_later_sublayers_make_up_for_what_earlier_ones_lost(anatomy, layouts):
    stays = [CUT, CUT, CUT]
    found = reconstructed(anatomy, layouts, stays, TOKENS)
    assert len(found) == 6
    alone = {}
    for index in range(3):  # each block as if all others were whole
        one = [WHOLE] * index + [CUT] + [WHOLE] * (2 - index)
        alone |= reconstructed(anatomy, layouts, one, TOKENS)
    ours, others, plain = (errors(anatomy, layouts, stays, x) for x in (found, alone, {}))
    assert ours[0] == pytest.approx(others[0])
    assert all(x < 0.97 * y for x, y in zip(ours[1:], others[1:], strict=True))
    assert all(x < y for x, y in zip(others, plain, strict=True))


def test_no_other_weights_are_nearer_to_the_dense_stream(anatomy, layouts):
    stays = [CUT, CUT | {"attention": ()}, WHOLE]
    found = reconstructed(anatomy, layouts, stays, TOKENS)
    last = "model.layers.1.mlp.down_proj"
    assert "model.layers.1.self_attn.o_proj" not in found
    best = errors(anatomy, layouts, stays, found)[1]
    for seed in range(3):
        noise = torch.randn(found[last].shape, generator=torch.Generator().manual_seed(seed))
        assert errors(anatomy, layouts, stays, found | {last: found[last] + 1e-3 * noise})[1] > best


def test_the_dense_model_stays_and_whole_sublayers_are_left_alone(anatomy, layouts):
    before, dense = {n: p.clone() for n, p in anatomy.model.named_parameters()}, logits(anatomy.model)
    assert reconstructed(anatomy, layouts, [WHOLE] * 3, TOKENS) == {}
    reconstructed(anatomy, layouts, [CUT] * 3, TOKENS)
    assert all(torch.equal(p, before[n]) for n, p in anatomy.model.named_parameters())
    assert torch.equal(logits(anatomy.model), dense)


@pytest.mark.parametrize("name", ["llama-biased", "gpt2", "opt", "phi3", "gpt_neox"])
def test_other_families(name):
    anatomy = dissect(build(CONFIGS[name]))
    layouts, groups = find_layouts(anatomy), anatomy.blocks[0].n_kv_heads
    stays = [{"attention": tuple(range(groups - 1)), "mlp": tuple(range(30))}] * 2
    found = reconstructed(anatomy, layouts, stays, TOKENS)
    assert len(found) == 4
    ours, plain = (errors(anatomy, layouts, stays, weights) for weights in (found, {}))
    assert all(x < y for x, y in zip(ours, plain, strict=True))


@pytest.mark.parametrize("name", ["gemma2", "opt-post-norm"])
def test_families_that_norm_what_they_add_are_refused(name):
    anatomy = dissect(build(CONFIGS[name]))
    with pytest.raises(ValueError, match=r"adds the outputs of its projections .* Use the repair refit"):
        reconstructed(anatomy, find_layouts(anatomy), [WHOLE] * 2, TOKENS)


@pytest.mark.parametrize("name", ["deepseek_v2", "granitemoehybrid", "nemotron_h", "mixtral"])
def test_shared_experts_and_attentions_of_mixtures_are_fitted_beside_the_routed_ones(name):
    """Of what is cut each block's stream comes nearer to the dense one; what has no units, and routed experts, stay."""
    anatomy = dissect(make(name))
    layouts = find_layouts(anatomy, experts=True)
    stays = [
        {
            part.kind: tuple(range(part.n_units if part.rigid else max(1, part.n_units * 2 // 3)))
            for part in layout.sublayers
        }
        for layout in layouts
    ]
    dense = list(stream_states(anatomy, SHORT))
    found = reconstructed(anatomy, layouts, stays, SHORT)
    fitted = [part.output.name for layout in layouts for part in layout.sublayers if not part.rigid]
    assert sorted(found) == sorted(fitted)
    shared = [layout for layout in layouts if isinstance(layout.mlp, MixtureLayout) and layout.mlp.shared]
    assert bool(shared) == (name != "mixtral")

    def error(weights):
        live = cut(layouts, stays, weights)
        states = list(stream_states(anatomy, SHORT))
        for one in live:
            one.restore()
        return float((states[-1] - dense[-1]).square().mean())

    assert error(found) < 0.9 * error({})
    assert all(torch.equal(x, y) for x, y in zip(stream_states(anatomy, SHORT), dense, strict=True))


def test_too_few_tokens_are_named(anatomy, layouts):
    with pytest.raises(
        ValueError, match=r"as many calibration tokens as inputs .* got 16 for 32 at .*down_proj"
    ):
        reconstructed(anatomy, layouts, [WHOLE | {"mlp": CUT["mlp"]}, WHOLE, WHOLE], random_tokens(1, 16))
