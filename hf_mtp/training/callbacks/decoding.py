"""[`DecodingCallback`]: decodes a few prompts at each evaluation. Knows nothing of losses."""

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from ...base.distributed import is_sharded
from ...base.inspection import evaluation_mode
from ...data.prompts import TextOrTurns, encode_prompt
from ...data.randomness import fork_rng
from ...evaluation.compare import PairedAnswers, decode_both_ways, summarize

PREFIX = "eval_decoding"


class DecodingCallback(TrainerCallback):
    """
    Decodes a few prompts at each evaluation, with `generate(mtp=True)` and with plain decoding, and logs a comparison.

    `eval_tokens_per_pass` is computed on the text of the evaluation dataset. These measures come from decoding the
    model's own responses, with the code that will serve it:

    - `eval_decoding/tokens_per_pass`: new tokens per forward pass, over all prompts;
    - `eval_decoding/tokens_per_second`, and `eval_decoding/speedup` over plain decoding, by the wall clock;
    - `eval_decoding/identical`: the share of prompts with the same output as plain decoding, which should be 1;
    - `eval_decoding/sample`: the first prompt's response.

    The trainer logs them (to TensorBoard, trackio, wandb ...) and adds them to the metrics of the evaluation, so that
    `metric_for_best_model="decoding/tokens_per_pass"` works. Training results do not change. Decodes greedily, in the
    first process only, or in all processes if the weights are sharded.

    Args:
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts: texts, or conversations for the tokenizer's chat template. Choose a few that are not in the
            training data.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Maximum length of a response.
        generate_kwargs:
            Other arguments of `generate`, such as `mtp_strategy` and `mtp_k`. Sampling is not allowed.

    Raises:
        ValueError: No prompts, an empty prompt, or sampling.

    Example:

    ```python
    >>> from hf_mtp import DecodingCallback, MTPConfig, MTPTrainer

    >>> trainer = MTPTrainer(
    ...     model=model,
    ...     args=MTPConfig(output_dir="out", eval_strategy="steps", eval_steps=500),
    ...     train_dataset=dataset,
    ...     eval_dataset=held_out,
    ...     callbacks=[DecodingCallback(["What is the capital of France?"], max_new_tokens=64)],
    ... )
    ```
    """

    def __init__(self, prompts: list[TextOrTurns], max_new_tokens: int = 128, **generate_kwargs):
        if isinstance(prompts, str) or not prompts or not all(prompts):
            raise ValueError(f"`prompts` must be a list of one or more prompts, none of them empty, got {prompts!r}.")
        if generate_kwargs.get("do_sample"):
            raise ValueError(
                "DecodingCallback decodes greedily, to compare the output with plain decoding. Omit `do_sample`."
            )
        generate_kwargs.pop("do_sample", None)
        self.prompts, self.max_new_tokens, self.generate_kwargs = prompts, max_new_tokens, generate_kwargs
        self.trainer: Trainer | None = None  # set by MTPTrainer
        self._decoded_at: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        self._decoded_at = None

    def on_train_end(self, args, state, control, **kwargs):
        self._decoded_at = None

    def on_evaluate(self, args, state, control, metrics, model, processing_class, **kwargs):
        if self.trainer is None:
            raise ValueError("DecodingCallback needs an MTPTrainer: pass it to `MTPTrainer(callbacks=[...])`.")
        if self._decoded_at == state.global_step:  # only once for several evaluation datasets
            return
        self._decoded_at = state.global_step if self.trainer.is_in_train else None
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        found = [None]
        if state.is_world_process_zero or is_sharded(model):
            with evaluation_mode(model), fork_rng(model, seed=0):
                found = [self._decode(model, tokenizer)]
        (found,) = broadcast_object_list(found)  # all processes must choose the same best checkpoint
        metrics.update({name: value for name, value in found.items() if isinstance(value, float)})
        self.trainer.log(found)

    def _decode(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float | str]:
        prompts = [encode_prompt(prompt, tokenizer) for prompt in self.prompts]
        pairs = decode_both_ways(model, prompts, self.max_new_tokens, **self.generate_kwargs)
        return {f"{PREFIX}/{name}": value for name, value in _measures(pairs, tokenizer).items()}


def _measures(pairs: list[PairedAnswers], tokenizer: PreTrainedTokenizerBase) -> dict[str, float | str]:
    total = summarize(pairs)
    return {
        "tokens_per_pass": total["tokens_per_pass"],
        "tokens_per_second": total["new_tokens"] / total["seconds_mtp"],
        "speedup": total["speedup"],
        "identical": total["identical"] / total["prompts"],
        "sample": tokenizer.decode(pairs[0].mtp.rows[0]),
    }
