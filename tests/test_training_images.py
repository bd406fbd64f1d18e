"""Training on more than text: masks learn behind what the base saw."""

import pytest
import torch
from datasets import Dataset
from test_prompts import IMAGE, image_model
from tiny_models import adapter_parameters, upgraded
from tiny_text import tiny_tokenizer
from tiny_training import logged, trainer
from transformers import BatchFeature, ProcessorMixin

from hf_mtp.layout.blocks import BlockLayout, segments, training_layout
from hf_mtp.objective.recipe import Recipe
from hf_mtp.objective.request import ObjectiveRequest
from hf_mtp.passes.training_pass import training_pass

K = 3
READABLE = ["llava", "gemma3", "qwen2_5_vl", "smolvlm"]


def image_batch(name: str):
    """An upgraded model and two texts with an image each, the second padded at its end."""
    base, inputs = image_model(name)
    batch = {key: torch.cat([value, value]) for key, value in inputs.items()}
    batch["pixel_values"][len(inputs["pixel_values"]) :] *= -1
    batch["attention_mask"][1, -2:] = 0
    last = (batch["input_ids"][0] == IMAGE).nonzero().max()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, : last + 1] = -100
    return upgraded(base, K, dtype=torch.float64), batch


def per_token(name: str, value: torch.Tensor, length: int) -> bool:
    return name != "pixel_values" and value.dim() == 2 and value.shape[1] == length


def states_of_a_text(model, row: int, batch: dict, anchor: int) -> torch.Tensor:
    """`(K, D)`: states of the masks behind the text up to `anchor`, which the base reads whole, image and all."""
    length, masks = batch["input_ids"].shape[1], model.base_model.vocab_size + torch.arange(K)[None]
    inputs = {}
    for name, value in batch.items():
        own = value.chunk(2)[row]
        if per_token(name, value, length):
            own = torch.cat([own[:, : anchor + 1], masks * 0 + (name == "attention_mask")], dim=1)
        inputs[name] = own
    inputs["input_ids"][:, anchor + 1 :] = masks
    del inputs["labels"]
    return model(**inputs, output_hidden_states=True).hidden_states[-1][0, -K:]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", READABLE)
def test_masks_stand_behind_the_image(name, checkpointing):
    model, batch = image_batch(name)
    tuner, ids, labels = model.base_model, batch["input_ids"], batch["labels"]
    if checkpointing:
        tuner.gradient_checkpointing_enable()
        tuner.train()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    layout = training_layout(labels, positions, segments(batch["attention_mask"], positions), K)
    others = {key: value for key, value in batch.items() if key not in ("input_ids", "labels")}
    found = training_pass(tuner, ids, layout, False, 1024, others).masks(layout)[-1]
    model.eval()
    for row in range(2):
        for block, anchor in enumerate(layout.anchor_BM[row, ::K].tolist()):
            if batch["attention_mask"][row, anchor] == 0:
                continue
            wanted, inside = states_of_a_text(model, row, batch, anchor), ids.shape[1] - 1 - anchor
            state_KD = found[row, block * K : (block + 1) * K]
            torch.testing.assert_close(
                state_KD[:inside], wanted[:inside], rtol=1e-8, atol=1e-8
            )  # others have no target


@pytest.mark.parametrize("name", READABLE)
def test_the_image_counts(name):
    model, batch = image_batch(name)
    request = ObjectiveRequest(Recipe(base=1.0, auxiliary=1.0))
    losses = []
    for sign in (1, -1):
        batch["pixel_values"] *= sign
        objective = model.train()(**batch, mtp_objective=request)
        objective.loss.backward()
        losses.append(objective.loss.item())
    assert abs(losses[0] - losses[1]) > 1e-3
    assert all(torch.isfinite(parameter.grad).all() for parameter in adapter_parameters(model).values())


def test_a_block_that_fills_up_a_row_may_hang_within_an_image():
    """Gemma's images look ahead, which no mask can, but such a block has nothing to learn."""
    model, batch = image_batch("gemma3")
    ids, places = batch["input_ids"], (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    anchors = torch.stack([places[-1:] + 1, places[:1]])
    layout = BlockLayout.of_blocks(anchors, positions, torch.zeros_like(ids), K)
    others = {key: value for key, value in batch.items() if key not in ("input_ids", "labels")}
    found = training_pass(model.base_model, ids, layout, False, 1024, others).masks(layout)[-1]
    torch.testing.assert_close(found[0], states_of_a_text(model, 0, batch, int(anchors[0])))


def test_an_image_that_is_read_otherwise_is_refused():
    model, batch = image_batch("mllama")
    with pytest.raises(
        NotImplementedError, match="computes different hidden states for text when it also gets .*pixel_values"
    ):
        model(**batch, mtp_objective=ObjectiveRequest())


def test_token_types_that_the_masks_cannot_have_are_refused():
    """GPT-2 adds an embedding for each, which its decoder cannot know of a mask."""
    model = upgraded("gpt2", K)
    ids = torch.arange(5, 20)[None]
    types = ids % 3
    with pytest.raises(
        NotImplementedError, match="computes different hidden states for text when it also gets .*token_type_ids"
    ):
        model(input_ids=ids, token_type_ids=types, mtp_objective=ObjectiveRequest())


def test_inputs_that_change_nothing_change_nothing():
    model, ids = upgraded("llama", K), torch.arange(5, 20)[None]
    plain = model(input_ids=ids, mtp_objective=ObjectiveRequest())
    more = model(input_ids=ids, pixel_values=torch.ones(1, 3), mtp_objective=ObjectiveRequest())
    torch.testing.assert_close(more.loss, plain.loss)
    assert more.rows == plain.rows == (K * (15 - K - 1) + sum(range(1, K)))


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_token_types_of_a_tokenizer_that_gives_them_to_every_model(architecture):
    model, ids = upgraded(architecture, K), torch.arange(5, 20)[None]
    plain = model(input_ids=ids, mtp_objective=ObjectiveRequest())
    more = model(input_ids=ids, token_type_ids=torch.zeros_like(ids), mtp_objective=ObjectiveRequest())
    assert torch.equal(more.loss, plain.loss)


def test_a_recurrent_model_with_images_is_refused():
    model = upgraded("bloom", K)
    ids = torch.arange(5, 20)[None]
    with pytest.raises(NotImplementedError, match="The batch has .*pixel_values.* besides text, but Bloom"):
        model(input_ids=ids, pixel_values=torch.ones(1, 3, 8, 8), mtp_objective=ObjectiveRequest())


# ---------------------------------------------------------------- in the trainer


class Processor(ProcessorMixin):
    """Reads numbers as images of one colour, and texts in which each image has its four places already."""

    attributes = ["tokenizer"]
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer):
        super().__init__(tokenizer)

    def __call__(self, images=None, text=None, **options):
        inputs = self.tokenizer(text, return_tensors="pt", padding=True)
        if images is not None:
            pixels = torch.tensor([colour for colours in images for colour in colours])
            inputs["pixel_values"] = pixels[:, None, None, None].expand(-1, 3, 8, 8)
        return BatchFeature(dict(inputs))


def processor() -> Processor:
    tokenizer = tiny_tokenizer(IMAGE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    return Processor(tokenizer)


def described(colour: float, rows: int = 8) -> Dataset:
    texts = [" ".join(f"w{6 + (row + step) % 30}" for step in range(8)) for row in range(rows)]
    return Dataset.from_dict(
        {"prompt": ["w7" + " <image>" * 4] * rows, "completion": texts, "images": [[colour]] * rows}
    )


def losses_of(folder, dataset, **options) -> list[float]:
    model = upgraded(image_model("llava")[0].float(), K)
    trained = trainer(folder, dataset, model, processing_class=processor(), max_steps=2, **options)
    trained.train()
    return logged(trained)


def test_vision_datasets(tmp_path):
    seen = {colour: losses_of(tmp_path, described(colour)) for colour in (1.0, -1.0)}
    assert seen[1.0][0] != pytest.approx(seen[-1.0][0], rel=1e-3)
    assert losses_of(tmp_path, described(1.0), gradient_checkpointing=True) == pytest.approx(seen[1.0])
    streamed = losses_of(tmp_path, described(1.0).to_iterable_dataset(), eval_dataset=described(1.0, 2))
    assert len(streamed) == 2 and all(loss > 0 for loss in streamed)


def test_no_mask_predicts_the_place_of_an_image(tmp_path):
    model, options = upgraded(image_model("llava")[0].float(), K), {"completion_only_loss": False}
    made = trainer(
        tmp_path, described(1.0), model, processing_class=processor(), per_device_train_batch_size=1, **options
    )
    made.train()
    # Blocks hang on the last place of the image and on six of the eight words behind it, and on nothing before.
    assert logged(made, "mask_tokens")[0] == 7 * K - sum(range(1, K))


def test_max_length_that_cuts_an_image_is_named(tmp_path):
    model, rows = upgraded(image_model("llava")[0].float(), K), described(1.0)
    rows = rows.map(lambda row: {"prompt": "w8 w9 " + row["prompt"]})
    made = trainer(tmp_path, rows, model, processing_class=processor(), completion_only_loss=False, max_length=5)
    with pytest.raises(ValueError, match="`max_length=5` cuts off image tokens: .*do not match"):
        made.train()
