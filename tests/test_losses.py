"""The losses and the measure, against the plainest way to compute them."""

import pytest
import torch
import torch.nn.functional as F
from layouts import masked_states
from tiny_models import VOCAB, adapter_parameters, checkpoint_layers, prompt, tiny_base, upgraded
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_mtp.adapter.sampler import SamplerHead
from hf_mtp.base.inspection import mask_form
from hf_mtp.layout.attention import attention_kinds, attention_masks
from hf_mtp.layout.blocks import IGNORE, segments, training_layout, weight_of_all_masks
from hf_mtp.objective import losses
from hf_mtp.objective.compute import multi_token_objective
from hf_mtp.objective.recipe import Recipe, get_recipe
from hf_mtp.objective.request import ObjectiveRequest
from hf_mtp.objective.simulation import mean_tokens_per_pass
from hf_mtp.passes.speculation_mode import SpeculationMode, speculation_mode

ROWS, SIZE = 23, 8


@pytest.fixture(params=[1, 5, 23, 100])
def rows_per_chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "ROWS_PER_CHUNK", request.param)


def frozen_unembedding(bias: bool) -> nn.Linear:
    unembedding = nn.Linear(SIZE, VOCAB, bias=bias).requires_grad_(False)
    if bias:
        nn.init.normal_(unembedding.bias)
    return unembedding


@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy(bias, rows_per_chunk):
    unembedding, target = frozen_unembedding(bias), torch.randint(VOCAB, (ROWS,))
    hidden = torch.randn(ROWS, SIZE, requires_grad=True)
    reference = hidden.detach().clone().requires_grad_()
    weight = torch.rand(ROWS)
    loss, top, target_top = losses.cross_entropy(unembedding, hidden, target)
    expected = F.cross_entropy(unembedding(reference), target, reduction="none")
    torch.testing.assert_close(loss, expected)
    assert torch.equal(top, unembedding(hidden).argmax(dim=-1)) and torch.equal(target_top, target)
    (loss * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(hidden.grad, reference.grad)


def test_cross_entropy_against_distributions(rows_per_chunk):
    unembedding, teacher = frozen_unembedding(bias=True), torch.randn(ROWS, SIZE)
    hidden = torch.randn(ROWS, SIZE, requires_grad=True)
    reference = hidden.detach().clone().requires_grad_()
    loss, _, target_top = losses.cross_entropy(unembedding, hidden, teacher)
    assert torch.equal(target_top, losses.likeliest_tokens(unembedding, teacher))
    wanted = unembedding(teacher).softmax(dim=-1)
    expected = -(wanted * unembedding(reference).log_softmax(dim=-1)).sum(dim=-1)
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(hidden.grad, reference.grad)


def test_cross_entropy_never_has_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr(losses, "ROWS_PER_CHUNK", 5)
    unembedding, seen = frozen_unembedding(bias=False), []
    unembedding.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    hidden = torch.randn(ROWS, SIZE, requires_grad=True)
    losses.cross_entropy(unembedding, hidden, torch.zeros(ROWS, dtype=torch.long))[0].sum().backward()
    losses.likeliest_tokens(unembedding, hidden)
    assert seen == [5, 5, 5, 5, 3] * 2


def test_cross_entropy_in_half_precision(rows_per_chunk):
    unembedding = frozen_unembedding(bias=False).bfloat16()
    hidden = torch.randn(ROWS, SIZE, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(VOCAB, (ROWS,))
    loss, *_ = losses.cross_entropy(unembedding, hidden, target)
    torch.testing.assert_close(loss, F.cross_entropy(unembedding(hidden).float(), target, reduction="none"))
    loss.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_cross_entropy_without_gradient(rows_per_chunk):
    unembedding, hidden, target = frozen_unembedding(False), torch.randn(ROWS, SIZE), torch.randint(VOCAB, (ROWS,))
    with torch.no_grad():
        loss, *_ = losses.cross_entropy(unembedding, hidden, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(unembedding(hidden), target, reduction="none"))


def test_likeliest_tokens(rows_per_chunk):
    unembedding, hidden = frozen_unembedding(bias=True), torch.randn(ROWS, SIZE)
    assert torch.equal(losses.likeliest_tokens(unembedding, hidden), unembedding(hidden).argmax(dim=-1))


def test_latent_consistency():
    masks, regular = torch.randn(ROWS, SIZE, requires_grad=True), torch.randn(ROWS, SIZE, requires_grad=True)
    loss = losses.latent_consistency(masks, regular)
    for row in range(ROWS):
        expected = sum((masks[row, i] - regular[row, i]) ** 2 for i in range(SIZE)) / SIZE
        torch.testing.assert_close(loss[row], expected)
    loss.sum().backward()
    assert regular.grad is None
    torch.testing.assert_close(masks.grad, 2 * (masks - regular).detach() / SIZE)


def test_feature_consistency():
    masks, regular = (
        torch.randn(4, ROWS, SIZE),
        torch.randn(4, ROWS, SIZE) * torch.tensor([1, 10, 100, 1e3])[:, None, None],
    )
    masks.requires_grad_(), regular.requires_grad_()
    loss = losses.feature_consistency(masks, regular)
    for row in range(ROWS):
        by_layer = [
            F.mse_loss(masks[layer, row], regular[layer, row]) / regular[layer, row].square().mean()
            for layer in range(4)
        ]
        torch.testing.assert_close(loss[row], sum(by_layer) / 4)
    loss.sum().backward()
    assert regular.grad is None
    assert masks.grad.abs().sum() > 0


def test_total_variation(rows_per_chunk):
    unembedding, teacher = frozen_unembedding(bias=True), torch.randn(ROWS, SIZE)
    hidden = torch.randn(ROWS, SIZE, requires_grad=True)
    loss, *_ = losses.cross_entropy(unembedding, hidden, teacher, "tv")
    wanted, drawn = unembedding(teacher).softmax(dim=-1), unembedding(hidden).softmax(dim=-1)
    acceptance = torch.minimum(wanted, drawn).sum(dim=-1)  # of a draft from `drawn`
    torch.testing.assert_close(loss, 1 - acceptance)
    expected = torch.autograd.grad((1 - acceptance).sum(), hidden)[0]
    loss.sum().backward()
    torch.testing.assert_close(hidden.grad, expected)
    token = torch.randint(VOCAB, (ROWS,))
    of_tokens, *_ = losses.cross_entropy(unembedding, hidden, token, "tv")
    torch.testing.assert_close(of_tokens, 1 - drawn[torch.arange(ROWS), token])


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_sampler_head(residual, recurrent):
    head = SamplerHead(6, SIZE, residual, recurrent)
    nn.init.normal_(head.blocks[-1].weight)
    previous, hidden = torch.randn(ROWS, 4, 6), torch.randn(ROWS, 4, SIZE)
    untrained = head(previous, hidden)
    if recurrent:
        nn.init.normal_(head.recurrence.weight)
    first, _, norm, second, _, last_norm = head.blocks
    outputs, state = [], None
    for step in range(4):
        mixed = first(torch.cat([previous[:, step], hidden[:, step]], dim=-1))
        if recurrent and step:
            mixed = mixed + state @ head.recurrence.weight.mT
        state = norm(F.silu(mixed))
        outer = last_norm(F.silu(second(state)))
        outputs.append(outer + hidden[:, step] if residual else outer)
    found = head(previous, hidden)
    torch.testing.assert_close(found, torch.stack(outputs, dim=1))
    assert torch.equal(found, untrained) != recurrent
    refine = head.refiner(hidden)
    torch.testing.assert_close(torch.stack([refine(step, previous[:, step]) for step in range(4)], dim=1), found)


# ---------------------------------------------------------------- the whole objective


def slow_objective(model, input_ids, labels, layout, recipe) -> tuple[torch.Tensor, dict[str, float]]:
    """Loops over masks, one at a time: (loss, measures)."""
    tuner, k = model.base_model, model.base_model.active_mtp_config.k
    regular, masks = masked_states(tuner, input_ids, layout, all_layers=True)
    unembedding, embedding = tuner.model.get_output_embeddings(), tuner.model.get_input_embeddings()
    terms, weights, right = {}, [], {}
    for row, columns in enumerate(layout.target_columns(labels).tolist()):
        for mask, target_column in enumerate(columns):
            if target_column == IGNORE:
                continue
            column, step = target_column - 1, mask % k + 1
            choice = unembedding(regular[-1][row, column]).argmax()
            target = {
                "model": choice,
                "soft": unembedding(regular[-1][row, column]).softmax(dim=-1),
                "data": input_ids[row, target_column],
            }[recipe.targets]
            state = masks[-1][row, mask]
            previous = embedding(input_ids[row, column])
            logits = unembedding(tuner.sampler_head()(previous[None, None], state[None, None])[0, 0])
            distance = F.mse_loss(masks[1][row, mask], regular[1][row, column])
            of_mask = {
                "base": F.cross_entropy(unembedding(state), target),
                "sampler": F.cross_entropy(logits, target),
                "lcm": F.mse_loss(state, regular[-1][row, column]),
                "auxiliary": distance / regular[1][row, column].square().mean(),
            }
            for name, value in of_mask.items():
                terms.setdefault(name, []).append(value)
            weights.append(recipe.position_decay ** (step - 1))
            right.setdefault((row, mask // k), {})[step] = bool(logits.argmax() == choice)
    weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    means = {name: (torch.stack(values) * weights).sum() for name, values in terms.items()}
    loss = sum(getattr(recipe, name) * mean for name, mean in means.items())
    measures = {f"loss_{name}": mean.item() for name, mean in means.items()}
    for step in range(1, k + 1):
        of_step = [block[step] for block in right.values() if step in block]
        measures[f"accuracy_{step}"] = sum(of_step) / max(1, len(of_step))
    accepted = [[block.get(step, False) for step in range(1, k + 1)] for block in right.values()]
    measures["tokens_per_pass"] = mean_tokens_per_pass(torch.tensor(accepted)).item()
    return loss, measures


@pytest.mark.parametrize("targets", ["model", "soft", "data"])
@pytest.mark.parametrize("position_decay", [1.0, 0.7])
@pytest.mark.parametrize("masks_per_part", [6, 1024])
def test_objective(targets, position_decay, masks_per_part):
    model = upgraded("llama", k=3, dtype=torch.float64).double()
    recipe = Recipe(base=0.5, sampler=2.0, lcm=0.3, auxiliary=0.7, targets=targets, position_decay=position_decay)
    input_ids = prompt(12, rows=2) % 7 + 5  # few different ones, so that some drafts are right
    labels = input_ids.clone()
    labels[0, :4] = IGNORE
    positions = torch.arange(12).expand(2, -1)
    layout = training_layout(labels, positions, segments(None, positions), k=3)
    weight = weight_of_all_masks(labels, segments(None, positions), 3, position_decay)
    request = ObjectiveRequest(recipe, masks_per_part=masks_per_part)
    objective = multi_token_objective(model.base_model, input_ids, labels, layout, request, weight)
    expected, measures = slow_objective(model, input_ids, labels, layout, recipe)
    torch.testing.assert_close(objective.loss, expected, rtol=1e-6, atol=0)
    assert {name: value.item() for name, value in objective.metrics.items()} == pytest.approx(measures, rel=1e-5)
    assert objective.rows == (layout.target_columns(labels) != IGNORE).sum()
    gradients = [
        torch.autograd.grad(loss, list(adapter_parameters(model).values())) for loss in (objective.loss, expected)
    ]
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


def test_objective_without_a_target_is_zero_and_has_gradients():
    model = upgraded("llama", k=3)
    objective = model(input_ids=prompt(), labels=torch.full_like(prompt(), IGNORE), mtp_objective=ObjectiveRequest())
    assert (objective.loss.item(), objective.metrics, objective.rows) == (0.0, {}, 0)
    objective.loss.backward()
    assert all((parameter.grad == 0).all() for parameter in adapter_parameters(model).values())


LEARNED_POSITIONS = {
    "gpt2": lambda positions: tiny_base("gpt2", n_positions=positions),
    "opt": lambda positions: tiny_base("opt", max_position_embeddings=positions),
    "openai-gpt": lambda positions: AutoModelForCausalLM.from_config(  # reads each block as a sequence
        AutoConfig.for_model("openai-gpt", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=positions)
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", LEARNED_POSITIONS)
def test_a_text_that_fills_the_table_of_positions(name, checkpointing):
    """Masks past its end have no target, and no position either."""
    longer = upgraded(LEARNED_POSITIONS[name](48), k=3)
    full = upgraded(LEARNED_POSITIONS[name](20), k=3)
    weights = {key: weight[: full.state_dict()[key].shape[0]] for key, weight in longer.state_dict().items()}
    full.load_state_dict(
        {key: weight if weight.dim() else longer.state_dict()[key] for key, weight in weights.items()}
    )
    losses = []
    for model in (longer, full):
        if checkpointing and name != "openai-gpt":
            checkpoint_layers(model)
            model.train()
        torch.manual_seed(0)  # the same dropout
        losses.append(model(input_ids=prompt(20, rows=2), mtp_objective=ObjectiveRequest()).loss)
    torch.testing.assert_close(*losses)


ROPE = {"rope_theta": 1e4, "factor": 4.0}
LONGROPE = {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
CHANGING_ROPE = {
    "longrope": lambda: tiny_base(
        "phi3",
        torch.float64,
        original_max_position_embeddings=64,
        rope_parameters={**LONGROPE, "original_max_position_embeddings": 64},
    ),
    "dynamic": lambda: tiny_base(
        "llama", torch.float64, max_position_embeddings=64, rope_parameters={**ROPE, "rope_type": "dynamic"}
    ),
}


@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("name", CHANGING_ROPE)
def test_rotary_embeddings_that_change_with_the_length(name, length):
    """They depend on the last position of a pass, which must be that of the text for every chunk of masks."""
    model = upgraded(CHANGING_ROPE[name](), k=3, dtype=torch.float64)
    assert speculation_mode(model.base_model.model) is SpeculationMode.TREE
    ids, plain = prompt(length), model.get_base_model().model
    positions = torch.arange(length)[None]
    layout = training_layout(ids, positions, torch.zeros_like(ids), k=3)
    supervised = layout.target_columns(ids) != IGNORE
    found = []
    for masks in (6, 1024):
        (regular,), (state,) = masked_states(model.base_model, ids, layout, masks=masks)
        torch.testing.assert_close(regular, plain(input_ids=ids).last_hidden_state)
        found.append(state[supervised])
    torch.testing.assert_close(*found)
    index = layout.index_BM
    with model.base_model.masks_in_columns(length, index):  # all columns at once, no position beyond the text's
        mask = attention_masks(layout, attention_kinds(model.config), mask_form(plain, torch.float64))
        columns = torch.cat([ids, index + VOCAB], dim=1)
        at_once = plain(
            input_ids=columns, attention_mask=mask, position_ids=layout.position_BN.clamp(max=length - 1)
        ).last_hidden_state[:, length:]
    torch.testing.assert_close(found[0], at_once[supervised])


def test_padding_changes_nothing():
    model = upgraded("llama", k=3)
    input_ids = prompt(10)
    padded = torch.cat([input_ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    labels = torch.cat([input_ids, torch.full((1, 4), IGNORE)], dim=1)
    attention_mask = torch.tensor([[1] * 10 + [0] * 4])
    recipe = Recipe(auxiliary=1.0)
    alone = model(input_ids=input_ids, mtp_objective=ObjectiveRequest(recipe))
    with_padding = model(
        input_ids=padded, labels=labels, attention_mask=attention_mask, mtp_objective=ObjectiveRequest(recipe)
    )
    torch.testing.assert_close(with_padding.loss, alone.loss)
    assert with_padding.metrics == {name: pytest.approx(value) for name, value in alone.metrics.items()}


def test_recipes():
    paper = get_recipe("paper")
    assert (paper.base, paper.sampler, paper.lcm, paper.auxiliary, paper.targets) == (1.0, 1.0, 1.0, 0.0, "data")
    assert paper.with_overrides(lcm=0.0, sampler=None).lcm == 0.0
    assert paper.with_overrides(lcm=0.0, sampler=None).sampler == 1.0


def test_without_a_sampler_the_base_s_loss_trains_the_drafts():
    assert Recipe(base=0.0, sampler=0.7).without_sampler().base == 0.7
    assert Recipe(base=0.2, sampler=0.7).without_sampler().base == 0.2
    ids = prompt()
    model = upgraded("llama", sampler=False)
    losses = {
        recipe: model(input_ids=ids, mtp_objective=ObjectiveRequest(recipe)).loss.item()
        for recipe in (Recipe(base=0.0, lcm=0.0), Recipe(base=1.0, lcm=0.0), Recipe(base=0.5, lcm=0.0))
    }
    default, whole, half = losses.values()
    assert default == whole == pytest.approx(2 * half)
