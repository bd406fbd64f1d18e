"""A progress bar with the losses and tokens per pass."""

from transformers import ProgressCallback

# Measures that the bar shows, with their labels. The most important come first: narrow terminals cut off the rest.
SHOWN = {
    "tokens_per_pass": "tokens/pass",
    "loss": "loss",
    "loss_base": "base",
    "loss_sampler": "sampler",
    "loss_lcm": "lcm",
    "loss_auxiliary": "auxiliary",
}


class MTPProgressCallback(ProgressCallback):
    """A [`~transformers.ProgressCallback`] whose bar shows the latest losses and tokens per pass.

    In a terminal, the bar replaces the lines that [`~transformers.Trainer`] prints for every training log. Evaluations
    and the summary are still printed. Output to a file has all lines.
    """

    def __init__(self, max_str_len: int = 1000):  # shows DecodingCallback's samples in full
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
