"""The Space of this metric: the demo that the `evaluate` library makes of it."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("acceptance_per_position"))
