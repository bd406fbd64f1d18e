"""The training's progress bar, with the losses and the tokens per step in it."""

from transformers import ProgressCallback

# What of the logs the bar shows, most wanted first, by what name: narrow terminals cut off the rest.
SHOWN = {
    "tokens_per_step": "tokens/step",
    "loss": "loss",
    "loss_base": "base",
    "loss_sampler": "sampler",
    "loss_lcm": "lcm",
    "loss_auxiliary": "auxiliary",
}


class MTPProgressCallback(ProgressCallback):
    """A [`~transformers.ProgressCallback`] whose bar has the latest losses and tokens per step in it.

    In a terminal, the bar replaces the lines that [`~transformers.Trainer`] prints for every log of the training;
    evaluations and the summary are printed. Output that goes to a file has all lines.
    """

    def __init__(self, max_str_len: int = 1000):  # samples of DecodingCallback are meant to be read
        super().__init__(max_str_len)

    def on_log(self, args, state, control, logs=None, **kwargs):
        bar = self.training_bar
        if bar is None:
            return
        if "loss" in logs:
            shown = {short: f"{logs[name]:.3g}" for name, short in SHOWN.items() if name in logs}
            bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in shown.items()))
            if bar.fp.isatty():
                return
        super().on_log(args, state, control, logs=logs, **kwargs)
