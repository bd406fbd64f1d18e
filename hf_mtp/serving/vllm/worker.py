"""The worker that vLLM loads as `worker_cls`: the platform's own, whose model runner appends masks."""

from vllm.platforms import current_platform

from .arguments import STRATEGY
from .guard import check_config, check_signatures
from .runner import MaskRunner

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class Worker(PlatformWorker):
    """Checks the engine's settings, and makes the model runner append masks. Arguments as in vLLM's worker.

    Raises:
        ValueError: A setting of the engine is not supported, or the adapter does not fit.
        RuntimeError: This release of vLLM is not supported.
    """

    def __init__(self, vllm_config, *args, **kwargs):
        check_config(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """Makes the model runner."""
        super().init_device()
        runner = self.model_runner
        check_signatures(type(runner), self.vllm_config.additional_config)
        # vLLM has no setting for the class of the runner, and its own choice depends on the platform.
        runner.__class__ = type("MaskRunner", (MaskRunner, type(runner)), {})
        runner.prepare_masks()

    def compile_or_warm_up_model(self):
        """Warms up, and measures what passes cost. The result is that of vLLM's own."""
        times = super().compile_or_warm_up_model()
        if self.vllm_config.additional_config.get(STRATEGY) != "linear":
            self.model_runner.measure_costs()
        return times
