"""Ranks of true future tokens, and the schema of `probe.json`.

The fields of the classes are the schema. docs/evaluation.md describes them; a change of their meaning raises
[`SCHEMA`]'s number.

Shapes: R guesses, D features, V vocabulary.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..documents import from_fields, load_document, write_document
from ..measures import ALL

SCHEMA = "hf_mtp.probe/1"
FILE = "probe.json"
ROWS_PER_CHUNK = 256  # whose logits exist at the same time
TOPS = (1, 10, 200)


@torch.no_grad()
def token_ranks(
    unembedding: Callable[[torch.Tensor], torch.Tensor], hidden_RD: torch.Tensor, token_R: torch.LongTensor
) -> torch.LongTensor:
    """The rank of a token among all of the vocabulary: 1 for the likeliest one.

    Of tokens with equal logits, lower ids come first, as in `argmax`. Coarse dtypes have many of these.

    Args:
        unembedding (`Callable`): Maps features `(R, D)` to logits `(R, V)`.
        hidden_RD (`torch.Tensor` of shape `(R, D)`): Features of the guesses.
        token_R (`torch.LongTensor` of shape `(R,)`): The true tokens.

    Returns:
        `torch.LongTensor` of shape `(R,)`, from 1 to V; V + 1 if the token's logit is NaN.
    """
    ranks = [token_R[:0]]
    for hidden, token in zip(hidden_RD.split(ROWS_PER_CHUNK), token_R.split(ROWS_PER_CHUNK), strict=True):
        logits_RV, token_R1 = unembedding(hidden), token[:, None]
        score_R1 = logits_RV.gather(1, token_R1)
        has_lower_id_RV = torch.arange(logits_RV.shape[1], device=token.device) < token_R1
        is_higher_RV = ~(logits_RV <= score_R1)  # so that NaN is never a hit
        is_before_RV = is_higher_RV | ((logits_RV == score_R1) & has_lower_id_RV)
        ranks.append(1 + is_before_RV.sum(dim=1))
    return torch.cat(ranks)


@dataclass
class RankSummary:
    """Ranks of one source of predictions, at one position or at all of them.

    Args:
        tokens (`int`): Number of predictions.
        median (`float`): Median rank.
        top_1, top_10, top_200 (`float`): The share of true tokens among the 1, 10 and 200 most likely.
    """

    tokens: int
    median: float
    top_1: float
    top_10: float
    top_200: float


def summarize_ranks(ranks: Sequence[int]) -> RankSummary:
    """Summarizes ranks.

    Args:
        ranks (`Sequence[int]`): At least one.
    """
    shares = {f"top_{top}": sum(rank <= top for rank in ranks) / len(ranks) for top in TOPS}
    return RankSummary(len(ranks), float(statistics.median(ranks)), **shares)


@dataclass
class ProbedText:
    """One prompt, and the ranks of the tokens of the base's greedy answer.

    Args:
        prompt (`str`): Name of the prompt in the suite.
        domain (`str`): Its domain.
        prompt_tokens (`int`): Length of the prompt.
        ids (`list[int]`): The answer's tokens, the end token included.
        ranks (`dict[str, list[list[int]]]`): By source, a list for each token from which the answer's next two tokens
            are known, in order. It has the rank at position 1, 2 ...; fewer than k near the end.
    """

    prompt: str
    domain: str
    prompt_tokens: int
    ids: list[int]
    ranks: dict[str, list[list[int]]]


@dataclass
class ProbeSettings:
    """What was measured.

    Args:
        model (`str`): Hub id of the base, or the name of its folder.
        adapter (`dict`, *optional*): `fingerprint`, `k` and `r` of the adapter, and the fingerprint of its
            `base`; `None` for a base alone.
        dtype (`str`): Dtype of the base's weights.
        device (`str`): Device of the base's embeddings.
        suite (`dict`): `name`, `fingerprint` and number of `prompts`.
        k (`int`): Positions of each block.
        max_new_tokens (`int`): Maximum number of new tokens per answer.
        machine (`dict`): Processor, threads, accelerator, Python and versions of libraries.
    """

    model: str
    adapter: dict | None
    dtype: str
    device: str
    suite: dict
    k: int
    max_new_tokens: int
    machine: dict


@dataclass
class ProbeResults:
    """Results of [`probe`]: the content of `probe.json`.

    Args:
        settings ([`ProbeSettings`]): What was measured.
        left_out (`dict[str, str]`): Kinds of placeholder and prompts that could not be measured, and why.
        seconds (`float`): Wall-clock time.
        placeholders (`list[str]`): The sources that are placeholders; others need the adapter.
        summaries (`dict[str, dict[str, RankSummary]]`): By source, and by position from `"1"` to k. The position
            `"all"` has all of them.
        texts (`list[ProbedText]`): Every rank.
        schema (`str`): Name and version of this schema.
    """

    settings: ProbeSettings
    left_out: dict[str, str]
    seconds: float
    placeholders: list[str]
    summaries: dict[str, dict[str, RankSummary]]
    texts: list[ProbedText] = field(default_factory=list)
    schema: str = SCHEMA

    def ranks(self, source: str) -> list[int]:
        """All ranks of a source.

        Args:
            source (`str`): Its name.
        """
        return [rank for text in self.texts for block in text.ranks[source] for rank in block]

    def save(self, folder: Path) -> None:
        """Writes `probe.json`, with one text on each line.

        Args:
            folder (`Path`): An existing folder.
        """
        write_document(folder / FILE, self, "texts")


def load_probe(path: Path) -> ProbeResults:
    """Reads a `probe.json`, and checks it against the schema.

    Args:
        path (`Path`): The file, or its folder.

    Raises:
        ValueError: It is not valid JSON, has another schema, or a field is missing or unknown.
        OSError: There is no such file.
    """
    return load_document(path, FILE, SCHEMA, _results_of)


def _results_of(content: dict) -> ProbeResults:
    summaries = {
        source: {position: from_fields(RankSummary, row) for position, row in rows.items()}
        for source, rows in content["summaries"].items()
    }
    texts = [from_fields(ProbedText, row) for row in content["texts"]]
    settings = from_fields(ProbeSettings, content["settings"])
    return from_fields(ProbeResults, {**content, "settings": settings, "summaries": summaries, "texts": texts})


def summaries_of(texts: Sequence[ProbedText]) -> dict[str, dict[str, RankSummary]]:
    """Summaries by source and position.

    Args:
        texts (`Sequence[ProbedText]`): At least one, all with the same sources.
    """
    summaries = {}
    for source in texts[0].ranks:
        blocks = [block for text in texts for block in text.ranks[source]]
        by_position = {
            str(number + 1): [block[number] for block in blocks if len(block) > number]
            for number in range(max(map(len, blocks)))
        }
        by_position[ALL] = [rank for block in blocks for rank in block]
        summaries[source] = {position: summarize_ranks(ranks) for position, ranks in by_position.items()}
    return summaries
