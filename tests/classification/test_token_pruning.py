"""Token pruning: saliency against a slow loop, tokens really gone, batches against single texts, both pyramids at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))

from tiny_classifiers import LAYERS, ROWS, WIDTH, batch_for, exits_for, model_named

from ee_diffusion.classification import token_pruning as tokens
from ee_diffusion.classification.attach import attach, recorded_states
from ee_diffusion.classification.classifier import EarlyExitClassifier
from ee_diffusion.classification.costs import block_flops, pruned_flops, saliency_flops
from ee_diffusion.classification.methods import fastbert
from ee_diffusion.classification.methods.magic_pyramid import soft_pruning
from ee_diffusion.classification.model_specs import model_spec_of
from ee_diffusion.classification.token_pruning import PARTS, saliency
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth

PRUNABLE = ("Bert", "Roberta", "Albert", "DistilBert")
THRESHOLDS = (0.06, 0.1, 0.12, 0.2)


@torch.no_grad()
def run(name: str, thresholds, policy: Policy | None = None, rows=None, pooling="first", **changes):
    model = model_named(name, **changes)
    exits, token_traces = exits_for(model, head="pooled", judge="none", pooling=pooling), []
    with attach(model, exits, policy or Policy(), pruning=thresholds, token_traces=token_traces) as traces:
        logits = model(**batch_for(name, rows)).logits
    return logits, traces[0], token_traces[0]


def salient(block: torch.nn.Module, hidden: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Saliency from queries and keys made here."""
    parts = PARTS[type(block).__name__]
    query, key = parts.projections(block)
    return saliency(query(hidden), key(hidden), keys, heads=parts.heads(block))


@pytest.mark.parametrize("name", PRUNABLE)
def test_saliency_against_the_models_own_attention(name: str):
    model, batch = model_named(name, attn_implementation="eager"), batch_for(name)
    keys = batch["attention_mask"].bool()
    blocks = model_spec_of(model).blocks(model)
    with torch.no_grad(), recorded_states(model) as states:
        attentions = model(**batch, output_attentions=True).attentions
    for layer, attention in enumerate(attentions):  # (B, H, N, N)
        found = salient(blocks[layer % len(blocks)], states[layer], keys).detach()
        for row in range(ROWS):
            n = int(keys[row].sum())
            for j in range(n):
                expected = attention[row, :, :n, j].double().mean()
                assert float(found[row, j]) == pytest.approx(float(expected), abs=1e-6)
            assert float(found[row].sum()) == pytest.approx(1, abs=1e-5)
            assert bool((found[row, n:] == 0).all())


def test_saliency_of_texts_longer_than_a_piece(monkeypatch):
    model, batch = model_named("Bert"), batch_for("Bert")
    with torch.no_grad(), recorded_states(model) as states:
        model(**batch)
    block, keys = model_spec_of(model).blocks(model)[0], batch["attention_mask"].bool()
    whole = salient(block, states[1], keys)
    monkeypatch.setattr(tokens, "QUERIES", 4)  # of 9: two whole pieces and a rest
    torch.testing.assert_close(salient(block, states[1], keys), whole)


@pytest.mark.parametrize("least", [0.0, 1e-30])
@pytest.mark.parametrize("name", PRUNABLE)
def test_nothing_to_prune_is_the_stock_model(name: str, least: float):
    logits, _, tokens = run(name, (least,) * LAYERS)
    model = model_named(name)
    assert torch.equal(logits, model(**batch_for(name)).logits)
    lengths = batch_for(name)["attention_mask"].sum(1)
    assert torch.equal(tokens.fed, lengths[:, None].expand(-1, LAYERS).int())


@torch.no_grad()
def slow_states(name: str, row: int) -> list[torch.Tensor]:
    """One text alone, layer by layer, tokens taken out by hand: the states (1, m, D) before each layer and after the last."""
    model, batch = model_named(name), batch_for(name, [row])
    blocks = model_spec_of(model).blocks(model)
    with recorded_states(model) as states:
        model(**batch)
    hidden, found = states[0], [states[0]]
    for layer in range(LAYERS):
        block = blocks[layer % len(blocks)]
        s = salient(block, hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))[0]
        attended = PARTS[type(block).__name__].attend(block, hidden, None)
        kept = [0] + [j for j in range(1, hidden.shape[1]) if float(s[j]) >= THRESHOLDS[layer]]
        hidden = PARTS[type(block).__name__].feed(block, attended[:, kept])
        found.append(hidden)
    return found


def slow_logits(name: str, row: int) -> torch.Tensor:
    model, hidden = model_named(name), slow_states(name, row)[-1]
    spec = model_spec_of(model)
    return spec.classify(model, spec.pool(model, hidden, None))[0]


@pytest.mark.parametrize("name", PRUNABLE)
def test_rows_of_one_batch_keep_different_tokens_and_the_answers_of_single_texts(name: str):
    logits, _, tokens = run(name, THRESHOLDS)
    assert len(tokens.fed[:, -1].unique()) > 1
    assert bool((tokens.fed[:, 1:] <= tokens.fed[:, :-1]).all())
    assert bool((tokens.fed >= 1).all())
    for row in range(ROWS):
        torch.testing.assert_close(logits[row], slow_logits(name, row), rtol=1e-4, atol=1e-4)
        alone, _, its_tokens = run(name, THRESHOLDS, rows=[row])
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-4, atol=1e-4)
        assert its_tokens.fed.tolist() == tokens.fed[[row]].tolist()


def test_removed_tokens_are_not_computed():
    """Counted inside the blocks: attention at the length before, the feed-forward part at the length after."""
    model = model_named("Bert")
    seen: dict[str, list[int]] = {"attention": [], "intermediate": []}
    for layer in model.bert.encoder.layer:
        for name, module in (("attention", layer.attention), ("intermediate", layer.intermediate)):
            module.register_forward_pre_hook(
                lambda m, args, name=name: seen[name].append(args[0].shape[0] * args[0].shape[1])
            )
    exits, tokens = exits_for(model, head="pooled", judge="none"), []
    with torch.no_grad(), attach(model, exits, Policy(), pruning=THRESHOLDS, token_traces=tokens):
        model(**batch_for("Bert"))
    assert seen["attention"] == tokens[0].computed[:, 0].tolist()
    assert seen["intermediate"] == tokens[0].computed[:, 1].tolist()
    assert seen["intermediate"] == [ROWS * int(tokens[0].fed[:, layer].max()) for layer in range(LAYERS)]
    assert seen["intermediate"][-1] < seen["intermediate"][0]


def test_attention_implementations_prune_alike():
    sdpa, eager = (run("Bert", THRESHOLDS, attn_implementation=kind) for kind in ("sdpa", "eager"))
    assert torch.equal(sdpa[2].fed, eager[2].fed)
    torch.testing.assert_close(sdpa[0], eager[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_both_pyramids_at_once(pooling: str):
    for speed in (0.6, 0.7, 0.8, 0.9, 0.95):
        policy = fastbert(speed)
        logits, trace, tokens = run("Bert", THRESHOLDS, policy, pooling=pooling)
        depths = trace.depths[0]
        if len(depths.unique()) > 1:
            break
    assert len(depths.unique()) > 1
    for row in range(ROWS):
        depth = int(depths[row])
        assert bool((tokens.attended[row, :depth] > 0).all())
        assert bool((tokens.attended[row, depth:] == 0).all())
        alone, its_trace, _ = run("Bert", THRESHOLDS, policy, rows=[row], pooling=pooling)
        assert int(its_trace.depths[0, 0]) == depth
        torch.testing.assert_close(alone[0], logits[row], rtol=1e-4, atol=1e-4)


def test_exits_of_the_mean_see_what_is_left_of_a_text():
    """Against one text, its tokens taken out by hand: the answer at depth 2 is made of the survivors' mean."""
    model = model_named("Bert")
    exits = exits_for(model, (2,), head="pooled", judge="none", pooling="mean")
    with torch.no_grad(), attach(model, exits, Policy(schedule=FixedDepth(2)), pruning=THRESHOLDS):
        logits = model(**batch_for("Bert")).logits
    for row in range(ROWS):
        hidden = slow_states("Bert", row)[2]  # (1, m, D)
        one = exits.heads[0]
        expected = one.classify(one.pool(hidden.mean(1)).tanh())
        torch.testing.assert_close(logits[row], expected[0], rtol=1e-4, atol=1e-4)


def test_token_traces_are_made_only_where_wanted(monkeypatch):
    made, trace = [], tokens.ActiveTokens.trace
    monkeypatch.setattr(tokens.ActiveTokens, "trace", lambda lane: made.append(lane) or trace(lane))
    run("Bert", THRESHOLDS)
    assert len(made) == 1
    model = model_named("Bert")
    exits = exits_for(model, head="pooled", judge="none")
    with torch.no_grad(), attach(model, exits, Policy(), pruning=THRESHOLDS):
        model(**batch_for("Bert"))
    assert len(made) == 1, "nobody wants them"


def test_everything_may_be_pruned_but_the_first_token():
    logits, _, tokens = run("Bert", (1.0,) * LAYERS)
    assert bool((tokens.fed == 1).all())
    assert bool(torch.isfinite(logits).all())


def test_flops_of_a_single_text():
    logits_flops = 2 * WIDTH**2 + 2 * WIDTH * 3
    with FlopCounterMode(display=False) as counter:
        _, _, tokens = run("Bert", THRESHOLDS, rows=[0], attn_implementation="eager")
    expected = logits_flops
    for layer in range(LAYERS):
        n, m = int(tokens.attended[0, layer]), int(tokens.fed[0, layer])
        expected += block_flops(n, hidden_size=WIDTH, inner_size=24, kept=m) + saliency_flops(n, hidden_size=WIDTH)
    assert counter.get_total_flops() == expected
    assert pruned_flops(model_named("Bert"), tokens).tolist() == [expected - logits_flops]


def test_a_layer_of_threshold_0_computes_no_saliency(monkeypatch):
    """Tokens go at layer 1 alone; the others compute no saliency, run on what is left, and cost no saliency."""
    computed, real = [], tokens.saliency
    monkeypatch.setattr(
        tokens, "saliency", lambda query, *rest, **more: computed.append(len(query)) or real(query, *rest, **more)
    )
    with FlopCounterMode(display=False) as counter:
        logits, _, trace = run("Bert", (0.0, 0.1, 0.0, 0.0), rows=[0], attn_implementation="eager")
    assert computed == [1]
    whole, left = int(trace.attended[0, 0]), int(trace.fed[0, 1])
    assert left < whole
    assert trace.attended.tolist() == [[whole, whole, left, left]]
    assert trace.fed.tolist() == [[whole, left, left, left]]
    assert trace.looked.tolist() == [[0, whole, 0, 0]]
    assert pruned_flops(model_named("Bert"), trace).tolist() == [
        counter.get_total_flops() - 2 * WIDTH**2 - 2 * WIDTH * 3
    ]
    batched, _, _ = run("Bert", (0.0, 0.1, 0.0, 0.0))
    torch.testing.assert_close(batched[:1], logits, rtol=1e-4, atol=1e-4)


def test_a_shorter_text_loses_a_token_and_the_longest_none(monkeypatch):
    """The batch stays as wide as it was, and yet the mask of the model does not fit any more."""
    lengths = batch_for("Bert")["attention_mask"].sum(1)
    shortest, row = int(lengths.min()), int(lengths.argmin())
    real = tokens.saliency

    def patched(query, key, keys, *, heads):
        paid = real(query, key, keys, heads=heads) + 1
        count = torch.full((len(paid),), paid.shape[1]) if keys is None else keys.sum(1)
        paid[count == shortest, 1] = 0
        return paid if keys is None else paid * keys

    monkeypatch.setattr(tokens, "saliency", patched)
    logits, _, trace = run("Bert", (0.5, 0.0, 0.0, 0.0))
    alone, _, its_trace = run("Bert", (0.5, 0.0, 0.0, 0.0), rows=[row])
    assert int(trace.fed.max()) == int(lengths.max())
    assert trace.fed[row].tolist() == its_trace.fed[0].tolist() == [shortest - 1] * LAYERS
    torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-4)


def test_soft_pruning_at_zero_temperature_is_hard_pruning_of_what_follows():
    """A cold sigmoid is a step: the gates are the hard mask of the first layer; thresholds get a gradient when it is warm."""
    model, batch = model_named("Bert"), batch_for("Bert")
    thresholds = torch.tensor(THRESHOLDS, requires_grad=True)
    with soft_pruning(model, thresholds, batch["attention_mask"], temperature=1e-6) as cold:
        model(**batch)
    hard = run("Bert", THRESHOLDS)[2]
    assert cold[0].detach().round().sum(1).int().tolist() == hard.fed[:, 0].tolist()
    with soft_pruning(model, thresholds, batch["attention_mask"], temperature=0.05) as warm:
        model(**batch)
    torch.stack([gate.sum() for gate in warm]).sum().backward()
    assert bool((thresholds.grad < 0).all()), "a higher threshold keeps less"
    assert "forward" not in model.bert.encoder.layer[0].__dict__


@torch.no_grad()
def test_faded_tokens_are_what_the_next_layer_sees():
    model, batch = model_named("Bert"), batch_for("Bert", [0])
    blocks = model_spec_of(model).blocks(model)
    with recorded_states(model) as states:
        model(**batch)
    hidden, keys = states[0], batch["attention_mask"].bool()
    for layer, block in enumerate(blocks):
        output = block(hidden)
        gate = ((salient(block, hidden, keys) - THRESHOLDS[layer]) / 0.05).sigmoid()
        gate[:, 0] = 1
        hidden = torch.stack([output[:, j] * gate[:, j, None] for j in range(hidden.shape[1])], dim=1)
    with soft_pruning(model, torch.tensor(THRESHOLDS), batch["attention_mask"], temperature=0.05):
        found = model(**batch).logits
    spec = model_spec_of(model)
    torch.testing.assert_close(found, spec.classify(model, spec.pool(model, hidden, None)), rtol=1e-4, atol=1e-5)


def test_a_token_at_its_threshold_stays():
    model, batch = model_named("Bert"), batch_for("Bert", [0])
    with torch.no_grad(), recorded_states(model) as states:
        model(**batch)
    s = salient(model_spec_of(model).blocks(model)[0], states[0], batch["attention_mask"].bool())[0].detach()
    order = s[1:].sort().values
    trace = run("Bert", (float(order[3]), 0.0, 0.0, 0.0), rows=[0])[2]
    assert int(trace.fed[0, 0]) == 1 + len(order) - 3


def test_thresholds_are_saved_with_the_classifier(tmp_path: Path):
    model = model_named("Bert")
    classifier = EarlyExitClassifier.from_classifier(model, exits_for(model, head="pooled", judge="none"))
    classifier.pruning = THRESHOLDS
    with torch.no_grad():
        live = classifier(**batch_for("Bert")).logits
    torch.testing.assert_close(live, run("Bert", THRESHOLDS)[0])
    classifier.save_pretrained(tmp_path)
    loaded = EarlyExitClassifier.from_pretrained(tmp_path)
    assert loaded.pruning == THRESHOLDS
    loaded.pruning = None
    assert loaded.pruning is None


@pytest.mark.parametrize(
    "name, thresholds, words",
    [
        ("Bert", (0.1,), "1 pruning thresholds, expected one for each of 4"),
        ("Bert", (0.1, 0.2, 0.3, 1.5), "threshold 1.5"),
        ("ModernBert", (0.1,) * 4, "cannot be removed"),
        ("Bert", THRESHOLDS, "first token is masked"),
    ],
)
def test_refused(name, thresholds, words, monkeypatch):
    empty = {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3).long()}
    monkeypatch.setattr(sys.modules[__name__], "batch_for", lambda *_: empty)
    with pytest.raises(ValueError, match=words):
        run(name, thresholds)


@pytest.mark.parametrize("count, temperature, words", [(2, 1.0, "2 pruning"), (4, 0.0, "temperature=0.0")])
def test_soft_pruning_refuses(count: int, temperature: float, words: str):
    attached = soft_pruning(model_named("Bert"), torch.zeros(count), torch.ones(1, 2), temperature=temperature)
    with pytest.raises(ValueError, match=words), attached:
        pass


def test_queries_and_keys_are_projected_once():
    """Saliency is read from the layer's own projections, in hard and in soft removal."""
    model, counts = model_named("Bert"), []
    for block in model.bert.encoder.layer:
        for linear in PARTS[type(block).__name__].projections(block):
            linear.register_forward_hook(lambda *_: counts.append(1))
    hooks = [len(linear._forward_hooks) for linear in PARTS["BertLayer"].projections(model.bert.encoder.layer[0])]
    with torch.no_grad(), attach(model, exits_for(model, head="pooled", judge="none"), Policy(), pruning=THRESHOLDS):
        model(**batch_for("Bert"))
    assert len(counts) == 2 * LAYERS
    counts.clear()
    with soft_pruning(model, torch.tensor(THRESHOLDS), batch_for("Bert")["attention_mask"], temperature=0.1):
        model(**batch_for("Bert"))
    assert len(counts) == 2 * LAYERS
    assert hooks == [
        len(linear._forward_hooks) for linear in PARTS["BertLayer"].projections(model.bert.encoder.layer[0])
    ]
