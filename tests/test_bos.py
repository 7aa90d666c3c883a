"""BOS token at the beginning of windows: where a tokenizer adds one, in every loss, and in records."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.evaluators.data.text import Text, load_text
from secateur.evaluators.data.tokens import windows
from secateur.evaluators.losses import Teacher, loss_sums
from secateur.pruners.calibration.choose import choose
from secateur.pruners.calibration.pool import Pool, build_pools, pool_identity
from secateur.pruners.calibration.stream import mean_loss
from secateur.pruners.calibration.tokens import begin, bos_token
from secateur.pruners.models.loading import find_checkpoint
from secateur.pruners.models.losses import ce_loss, kl_loss
from secateur.pruners.models.runner import BlockRunner
from secateur.search import app
from secateur.search.app.recipe_file import known_recipe
from secateur.search.errors import UsageError
from secateur.search.settings.settings import identity, settings_from
from secateur.spaces.recipe.keys import CHUNK
from tests.cut_models import small_tokenizer
from tests.models import random_tokens, rms_gradients, small_anatomy
from tests.test_app import SMALL

BOS = 5
TOKENS = begin(random_tokens(3, 16, 5), BOS)


def adding(tokenizer, bos="<|end|>"):
    """The tokenizer, with a BOS token before each text, as those of Llama and Gemma have it."""
    number = tokenizer.convert_tokens_to_ids(bos)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
    tokenizer.bos_token = bos
    return tokenizer


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """Directory of the embedded model, whose tokenizer adds a BOS token."""
    directory = tmp_path_factory.mktemp("beginning")
    tiny = find_checkpoint("tiny").location
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(directory)
    adding(tokenizer, tokenizer.eos_token).save_pretrained(directory)
    return directory


def test_a_window_begins_as_the_tokenizer_does_by_itself_or_as_it_is_asked():
    plain, added = AutoTokenizer.from_pretrained(find_checkpoint("tiny").location), None
    found = {asked: bos_token(plain, asked) for asked in ("auto", True, False)}
    assert found == {"auto": None, True: plain.bos_token_id, False: None}
    added = adding(AutoTokenizer.from_pretrained(find_checkpoint("tiny").location), plain.eos_token)
    found = {asked: bos_token(added, asked) for asked in ("auto", True, False)}
    assert found == {"auto": added.bos_token_id, True: added.bos_token_id, False: None}
    added.bos_token = None
    assert bos_token(added) is None
    with pytest.raises(ValueError, match=r"with a BOS token for `bos: true`, got one without"):
        bos_token(added, True)


def test_the_bos_token_takes_a_place_of_each_window():
    text = Text("search", "made up", "the 123 the " * 50)
    for order in ("sequential", "random"):
        rows = windows(small_tokenizer(), text, 8, 48, order)
        begun = windows(small_tokenizer(), text, 8, 48, order, bos=BOS)
        assert begun.tolist() == [[BOS, *row[:-1]] for row in rows.tolist()]


def references(anatomy, tokens):
    """Log-probabilities at the positions that count, and their next tokens."""
    with torch.no_grad():
        logits = anatomy.model(tokens, use_cache=False).logits.double()
    return logits.log_softmax(-1)[:, 1:], tokens[:, 2:]


def test_no_loss_counts_what_the_bos_token_predicts():
    dense, pruned = (replace(small_anatomy(seed), bos=BOS) for seed in (0, 1))
    p, _ = references(dense, TOKENS)
    q, following = references(pruned, TOKENS)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    ce = float(F.nll_loss(q[:, :-1].flatten(0, 1), following.flatten()))
    runner, of_dense = BlockRunner(pruned), BlockRunner(dense)
    hidden = runner.run(runner.start(TOKENS))
    teacher = Teacher(dense, lambda: of_dense.run(of_dense.start(TOKENS)), keep=False)
    sums = loss_sums(pruned, hidden, TOKENS, teacher)
    assert {name: n for name, (_, n) in sums.sums.items()} == {"kl": 3 * 15, "ce": 3 * 14}
    assert sums.means() == {"kl": pytest.approx(kl, rel=1e-4), "ce": pytest.approx(ce, rel=1e-5)}
    assert float(kl_loss(pruned, TOKENS, dense)) == pytest.approx(kl, rel=1e-4)
    assert float(ce_loss(pruned, TOKENS)) == pytest.approx(ce, rel=1e-5)
    assert mean_loss(pruned, hidden, TOKENS) == pytest.approx(ce, rel=1e-5)
    unbegun = loss_sums(replace(pruned, bos=None), hidden, TOKENS, teacher).means()
    assert unbegun["ce"] != pytest.approx(ce, rel=1e-3)


def test_gradients_are_those_of_the_scored_positions():
    anatomy, window = replace(small_anatomy(), bos=BOS), TOKENS[:1]
    found = rms_gradients(anatomy, window)
    model = small_anatomy().model.requires_grad_(True)
    logits = model(window, use_cache=False).logits[0]
    F.cross_entropy(logits[1:-1], window[0, 2:]).backward()
    for name, gradient in found.items():
        assert torch.allclose(gradient, model.get_submodule(name).weight.grad.abs(), atol=1e-6)


def test_pools_are_read_and_chosen_with_the_token():
    anatomy, tokens = replace(small_anatomy(), bos=BOS), random_tokens(1, 6 * CHUNK)[0]
    pool = build_pools(anatomy, {"a": tokens}, look=True)["a"]
    chunk = begin(tokens[None, CHUNK : 2 * CHUNK], BOS)
    found = anatomy.model(chunk, output_hidden_states=True)
    assert torch.allclose(pool.nll[1], F.cross_entropy(found.logits[0, 1:-1], chunk[0, 2:]), atol=1e-5)
    assert torch.allclose(pool.states[1], found.hidden_states[-1][0, 1:].mean(0), atol=1e-5)
    calibration = {"samples": 4, "length": CHUNK, "choose": "random", "sources": {"a": 1}}
    plain = choose({"a": Pool(tokens)}, calibration, 0)
    assert torch.equal(choose({"a": Pool(tokens)}, calibration, 0, BOS), begin(plain, BOS))
    same = pool_identity("m", {"a": "h"}, 64, look=True)
    assert pool_identity("m", {"a": "h"}, 64, look=True, bos=None) == same
    assert pool_identity("m", {"a": "h"}, 64, look=True, bos=BOS) != same


def test_measurements_depend_on_the_token_and_not_on_the_setting(beginning, tmp_path):
    """A run without the token is the run that it was before there was the setting."""
    wanted = {"auto": True, "true": True, "false": False}
    losses = {}
    for name, begins in wanted.items():
        evaluator = SMALL["evaluator"] | {"bos": {"true": True, "false": False}.get(name, name)}
        of = settings_from(SMALL | {"model": str(beginning), "evaluator": evaluator})
        assert "bos" not in identity(of)["evaluator"]
        session = app.open_session(of)
        token = session.loaded.tokenizer.bos_token_id
        assert session.facts().get("bos") == (str(token) if begins else None)
        for tokens in (
            *session.windows.values(),
            session.training_windows(),
            session.pruner.calibration.tokens,
        ):
            assert (tokens[:, 0] == token).all() == begins
        assert session.pruner.calibration_record().get("bos") == (token if begins else None)
        session.build_levels(tmp_path / name)
        fidelity = session.plan.fidelities[0]
        [dense] = session.evaluator(tmp_path / name).evaluate(
            [session.space.baselines()["dense"].text], fidelity
        )
        losses[name] = dense.values["ce"]
    assert losses["auto"] == losses["true"] != losses["false"]


@pytest.mark.usefixtures("forked_reload")
def test_commands_say_with_which_token_they_measured(beginning, tmp_path, secateur):
    few = ("--tokens", "512", "--window", "64")
    model = AutoModelForCausalLM.from_pretrained(beginning)
    tokenizer = AutoTokenizer.from_pretrained(beginning)
    tokens = windows(tokenizer, Text("test", "docs", load_text("docs", "test")), 64, 512)
    found = {}
    for asked, first in (("auto", 1), ("false", 0)):
        rows = begin(tokens, tokenizer.bos_token_id if first else None)
        with torch.no_grad():
            logits = model(rows).logits.float()[:, first:-1]
        wanted = float(F.cross_entropy(logits.flatten(0, 1), rows[:, first + 1 :].flatten()))
        _, out, _ = secateur("evaluate", beginning, "--bos", asked, "--json", *few)
        found[asked] = json.loads(out)
        assert found[asked]["ce"] == pytest.approx(wanted, rel=1e-4)
    assert {asked: of["bos"] for asked, of in found.items()} == {
        "auto": tokenizer.bos_token_id,
        "false": "none",
    }
    recipe = known_recipe("wanda", 0.5)
    plain = dict(recipe.recipe) | {
        "calibration": {**recipe.recipe["calibration"], "samples": 2, "length": 32}
    }
    (tmp_path / "recipe.yaml").write_text(
        json.dumps(recipe.model_dump(mode="json") | {"recipe": plain, "pool_tokens": 2048})
    )
    pruned = tmp_path / "model"
    status, out, err = secateur(
        "prune", beginning, "--recipe", tmp_path / "recipe.yaml", "--to", pruned, "--json", *few
    )
    assert status == 0, err
    dense = json.loads(out)["measured"]["test:512, dense"]["ce"]
    manifest = json.loads((tmp_path / "model" / "secateur.json").read_text())
    assert manifest["calibration"]["bos"] == tokenizer.bos_token_id
    assert dense == pytest.approx(found["auto"]["ce"], rel=1e-4)
    with pytest.raises(UsageError, match="Expected `--bos` auto, true or false, got 'yes'"):
        app_option("yes")


def app_option(text):
    from secateur.search.cli.option_groups import bos_asked

    return bos_asked(text)
