"""Watching a training: what the bar shows, what is decoded on the way, the picture that stays; none changes it."""

import io

import pytest
import torch
from tiny_models import adapter_parameters, upgraded
from tiny_text import words
from tiny_training import logged, texts, trainer
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_mtp import DecodingCallback
from hf_mtp.base.plotting import spread
from hf_mtp.evaluation.compare import decode_both_ways
from hf_mtp.training.callbacks import curves
from hf_mtp.training.callbacks import decoding as decoding_callback
from hf_mtp.training.callbacks.curves import TrainingCurves, draw_training_curves
from hf_mtp.training.callbacks.progress import MTPProgressCallback

K = 3
PROMPTS = [words(5), [{"role": "user", "content": words(4, 7)}]]
DECODED = {
    f"eval_decoding/{name}" for name in ("tokens_per_pass", "tokens_per_second", "speedup", "identical", "sample")
}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


def decoding(**options) -> DecodingCallback:
    return DecodingCallback(PROMPTS, max_new_tokens=8, **options)


def trained_with(folder, *callbacks, **options):
    made = trainer(
        folder,
        eval_dataset=texts(4),
        callbacks=[*callbacks],
        model=upgraded("llama", K, lora_dropout=0.2),
        anchors_per_sequence=2,
        **{**EVALUATING, **options},
    )
    made.train()
    return made


# ---------------------------------------------------------------- decoding


def test_every_evaluation_logs_what_decoding_gives(tmp_path):
    made = trained_with(tmp_path, decoding())
    entries = [entry for entry in made.state.log_history if DECODED & entry.keys()]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all(DECODED <= entry.keys() for entry in entries)
    assert all(entry["eval_decoding/identical"] == 1 and entry["eval_decoding/speedup"] > 0 for entry in entries)
    tokenizer = made.processing_class
    (found,) = decode_both_ways(made.model.eval(), [tokenizer(PROMPTS[0])["input_ids"]], 8)
    assert entries[-1]["eval_decoding/sample"] == tokenizer.decode(found.mtp.rows[0])


def test_tokens_per_pass_is_of_all_prompts_and_of_the_arguments_given(tmp_path):
    made = trained_with(tmp_path, decoding(mtp_k=1, mtp_strategy="quadratic"))
    assert 1 <= logged(made, "eval_decoding/tokens_per_pass")[-1] <= 2
    made.args.eval_strategy = "no"
    asked = [made.processing_class(PROMPTS[0])["input_ids"]]
    asked.append(made.processing_class.apply_chat_template(PROMPTS[1], add_generation_prompt=True)["input_ids"])
    options = {"mtp_k": 1, "mtp_strategy": "quadratic"}
    found = [each.mtp for each in decode_both_ways(made.model.eval(), asked, 8, **options)]
    expected = sum(each.tokens for each in found) / sum(each.forward_passes for each in found)
    assert logged(made, "eval_decoding/tokens_per_pass")[-1] == expected


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_goes_on_exactly_as_without(gradient_checkpointing, tmp_path):
    options = {"gradient_checkpointing": gradient_checkpointing}
    without = trained_with(tmp_path / "without", **options)
    watched = trained_with(tmp_path / "with", decoding(), **options)
    assert logged(watched) == logged(without)
    assert logged(watched, "eval_loss") == logged(without, "eval_loss")
    weights = adapter_parameters(without.model)
    assert all(torch.equal(weights[name], weight) for name, weight in adapter_parameters(watched.model).items())
    assert logged(watched, "eval_decoding/identical") == [1, 1]


def test_a_model_that_trains_is_decoded_without_dropout_and_trains_on(tmp_path):
    made = trained_with(tmp_path, decoding())
    modes = [module.training for module in made.model.train().modules()]
    seen = []
    made.model.get_base_model().register_forward_pre_hook(lambda module, _: seen.append(module.training))
    state = torch.random.get_rng_state()
    made.callback_handler.on_evaluate(made.args, made.state, made.control, {})
    assert seen and not any(seen)
    assert [module.training for module in made.model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_best_checkpoint_may_be_chosen_by_it(tmp_path):
    made = trained_with(
        tmp_path,
        decoding(),
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="decoding/tokens_per_pass",
    )
    assert made.state.best_metric == max(logged(made, "eval_decoding/tokens_per_pass"))


def test_several_evaluation_datasets_are_decoded_for_once(tmp_path):
    made = trainer(tmp_path, eval_dataset={"a": texts(4), "b": texts(4)}, callbacks=[decoding()], **EVALUATING)
    made.train()
    assert len(logged(made, "eval_decoding/identical")) == 2
    assert made.evaluate(texts(4))["eval_decoding/identical"] == 1


def test_other_processes_wait_and_log_the_same(tmp_path, monkeypatch):
    made = trainer(tmp_path, eval_dataset=texts(4), callbacks=[decoding()])
    monkeypatch.setattr(type(made), "is_world_process_zero", lambda self: False)
    monkeypatch.setattr(made.state, "is_world_process_zero", False)
    sent = {"eval_decoding/tokens_per_pass": 1.5, "eval_decoding/sample": "w9"}
    monkeypatch.setattr(decoding_callback, "broadcast_object_list", lambda found: [sent] if found == [None] else 1 / 0)
    metrics = {}
    made.callback_handler.on_evaluate(made.args, made.state, made.control, metrics)
    assert metrics == {"eval_decoding/tokens_per_pass": 1.5}
    assert logged(made, "eval_decoding/sample") == ["w9"]


@pytest.mark.parametrize("prompts", [[], [""], "w9"])
def test_prompts_must_be_some(prompts):
    with pytest.raises(ValueError, match="`prompts` must be a list of one or more prompts"):
        DecodingCallback(prompts)


def test_sampling_is_refused():
    with pytest.raises(ValueError, match="decodes greedily"):
        DecodingCallback(PROMPTS, do_sample=True)


def test_a_callback_added_too_late_says_so(tmp_path):
    made = trainer(tmp_path, eval_dataset=texts(4))
    made.add_callback(decoding())
    with pytest.raises(ValueError, match=r"pass it to `MTPTrainer\(callbacks=\[...\]\)`"):
        made.evaluate()


# ---------------------------------------------------------------- the bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, terminal: io.StringIO, folder) -> str:
    from tqdm import tqdm

    def bar(*args, **kwargs):
        return tqdm(*args, file=terminal, mininterval=0, **{**kwargs, "dynamic_ncols": False, "ncols": 200})

    monkeypatch.setattr("transformers.trainer_callback.tqdm", bar)
    monkeypatch.setattr("sys.stdout", terminal)  # where tqdm.write goes
    trainer(folder, disable_tqdm=False, eval_dataset=texts(4), **EVALUATING).train()
    return terminal.getvalue()


def test_the_bar_has_the_losses_and_tokens_per_pass(tmp_path, monkeypatch):
    text = shown(monkeypatch, Terminal(), tmp_path)
    assert "tokens/pass 1" in text
    for name in ("loss", "base", "sampler", "lcm", "auxiliary"):
        assert f", {name} " in text
    assert "{'loss'" not in text
    assert "{'eval_loss'" in text and "{'train_runtime'" in text


def test_output_to_a_file_has_all_lines(tmp_path, monkeypatch):
    text = shown(monkeypatch, io.StringIO(), tmp_path)
    assert text.count("{'loss'") == 4 and "tokens/pass 1" in text


def kinds(made) -> list[type]:
    return [type(callback) for callback in made.callback_handler.callbacks]


def test_other_bars_are_left_alone(tmp_path):
    class Own(ProgressCallback):
        pass

    assert MTPProgressCallback not in (printing := kinds(trainer(tmp_path, disable_tqdm=True)))
    assert PrinterCallback in printing
    both = kinds(trainer(tmp_path, disable_tqdm=False, callbacks=[Own()]))
    assert Own in both and MTPProgressCallback in both and ProgressCallback not in both
    removed = trainer(tmp_path, disable_tqdm=False)
    removed.remove_callback(ProgressCallback)
    assert MTPProgressCallback not in kinds(removed)


def test_a_notebook_keeps_its_table(tmp_path, monkeypatch):
    class Table(TrainerCallback):
        pass

    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", Table)
    assert {Table, MTPProgressCallback} & {*kinds(trainer(tmp_path, disable_tqdm=False))} == {Table}


# ---------------------------------------------------------------- the picture


def size_of(png) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG") and data.rstrip(b"\x00").endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_each_save_and_the_end_leave_a_picture(tmp_path):
    drawn = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            drawn.append((tmp_path / curves.FILE).exists())

    trained_with(tmp_path, decoding(), Look(), training_curves=True, save_strategy="steps", save_steps=2)
    assert drawn == [False, False, True, True]
    assert size_of(tmp_path / curves.FILE)[0] == 1000
    assert not [*tmp_path.glob(".*png*")]  # nothing half-written


def test_the_picture_has_all_measures(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("hf_mtp.training.callbacks.curves.save_png", lambda figure, path: figures.append(figure))
    made = trained_with(tmp_path, decoding(), training_curves=True)
    losses, steps, accuracies = figures[-1].axes
    texts_of = lambda axes: [text.get_text() for text in axes.texts]  # noqa: E731
    assert {"base", "sampler", "latent", "auxiliary"} <= {*texts_of(losses)}
    assert f"{logged(made, 'tokens_per_pass')[-1]:.2f}" in texts_of(steps)
    assert {f"mask {position}" for position in range(1, K + 1)} <= {*texts_of(accuracies)}
    decoded, line, evaluations = steps.lines[0], *steps.lines[2:]  # a dashed one between them
    assert [*decoded.get_ydata()] == logged(made, "eval_decoding/tokens_per_pass")
    assert [*line.get_ydata()] == logged(made, "tokens_per_pass")
    assert [*evaluations.get_ydata()] == logged(made, "eval_tokens_per_pass")
    assert [*evaluations.get_xdata()] == [2, 4]


def test_a_failure_to_draw_is_a_warning(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_mtp.training.callbacks.curves.save_png", lambda *args: 1 / 0)
    monkeypatch.setattr(curves.logger, "warning", lambda text, *values: warnings.append(text % values))
    trained_with(tmp_path, training_curves=True)
    assert warnings == ["Could not plot training_curves.png: ZeroDivisionError: division by zero"]


def test_only_the_first_process_draws(tmp_path):
    made = trainer(tmp_path)
    made.train()
    made.state.is_world_process_zero = False
    TrainingCurves().on_train_end(made.args, made.state, made.control)
    assert not (tmp_path / curves.FILE).exists()


def test_no_logs_no_picture(tmp_path):
    draw_training_curves([{"step": 1, "train_runtime": 1.0}], tmp_path / curves.FILE)
    assert not (tmp_path / curves.FILE).exists()


def test_labels_are_apart_and_inside():
    heights = spread([0.9, 0.91, 1.0, 0.0, 0.01], gap=0.07)
    ordered = sorted(heights)
    assert all(high - low >= 0.07 - 1e-9 for low, high in zip(ordered, ordered[1:], strict=False))
    assert ordered[0] >= 0 and ordered[-1] <= 1
    assert [heights.index(height) for height in ordered] == [3, 4, 0, 1, 2]
    assert spread([0.2, 0.8], gap=0.07) == [0.2, 0.8]
