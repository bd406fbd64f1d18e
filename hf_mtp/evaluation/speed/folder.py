"""The output folder of an evaluation: it keeps every finished call, so that an interrupted run can be resumed.

While a run goes on, `calls.jsonl` has its settings and one finished turn a line. `results.json` takes its place.
"""

import dataclasses
import json
from pathlib import Path

from ..documents import from_fields
from ..run import make_folder, refuse_other_run
from .results import FILE, Call, Results, Settings, call_of, load_results

CALLS = "calls.jsonl"


class RunFolder:
    """Finished turns of one run. A turn is some prompts, decoded with every method.

    Args:
        folder (`Path`, *optional*): Where to keep them; in memory only if `None`.
        settings ([`Settings`]): What the run measures.

    Attributes:
        turns (`dict[tuple[str, ...], list[Call]]`): Finished turns, by the names of their prompts.
        seconds (`float`): Wall-clock time that they took.
        finished ([`Results`], *optional*): The results, if the folder has all of this run's.

    Raises:
        ValueError: The folder has a run with other settings, or its `calls.jsonl` is broken.
        OSError: It is a file, or cannot be made.
    """

    def __init__(self, folder: Path | None, settings: Settings):
        self.folder, self.settings = folder, settings
        self.finished: Results | None = None
        self.turns: dict[tuple[str, ...], list[Call]] = {}
        self.seconds = 0.0
        if folder is None:
            return
        make_folder(folder)
        if (folder / CALLS).is_file():
            self._read_turns()
        elif (folder / FILE).is_file():
            results = load_results(folder)
            refuse_other_run(folder, settings, results.settings)
            self.finished = results
        else:
            self._append(dataclasses.asdict(settings))

    def add(self, calls: list[Call], seconds: float) -> None:
        """Keeps a finished turn.

        Args:
            calls (`list[Call]`): Its calls, one for each method.
            seconds (`float`): Wall-clock time of the turn.
        """
        self._keep(calls, seconds)
        if self.folder is not None:
            self._append({"seconds": seconds, "calls": [dataclasses.asdict(call) for call in calls]})

    def finish(self) -> None:
        """Deletes `calls.jsonl`, once `results.json` has all of it."""
        if self.folder is not None:
            (self.folder / CALLS).unlink(missing_ok=True)

    def _keep(self, calls: list[Call], seconds: float) -> None:
        """Keeps a turn, unless another run on the same folder was faster."""
        names = tuple(answer.prompt for answer in calls[0].answers)
        if names not in self.turns:
            self.turns[names] = calls
            self.seconds += seconds

    def _append(self, content: dict) -> None:
        with (self.folder / CALLS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")

    def _read_turns(self) -> None:
        path = self.folder / CALLS
        lines = path.read_text(encoding="utf-8").split("\n")
        whole = lines[:-1]  # a line without its end was being written when the process died
        if not whole:
            path.write_text(json.dumps(dataclasses.asdict(self.settings)) + "\n", encoding="utf-8")
            return
        try:
            settings, *turns = map(json.loads, whole)
            settings = from_fields(Settings, settings)
            for turn in turns:
                self._keep([call_of(row) for row in turn["calls"]], turn["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not have the finished calls of a run: {error}. Choose another output folder, or delete "
                "this file."
            ) from error
        refuse_other_run(self.folder, self.settings, settings)
        if lines[-1]:
            path.write_text("\n".join(whole) + "\n", encoding="utf-8")
