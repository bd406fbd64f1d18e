"""The tokens are those of plain vLLM and of hf_mtp's own decoding, with the same passes and drafts."""

import pytest

# Options that vLLM applies to logits or text, all greedy.
OPTIONS = {
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "bad words": {"bad_words": ["w20", "w31"]},
    "grammar": {"regex": "(w1[0-9]|w2[0-9])(w3[0-9]|w4[0-9]){2,6}", "ignore_eos": False},
    "stop string": {"stop": ["w44", "w70"]},
    "stop token": {"stop_token_ids": [30, 60]},
    "allowed tokens": {"allowed_token_ids": list(range(20, 60))},
    "log probabilities": {"logprobs": 2},
    "short": {"max_tokens": 3},
}


def tokens(group: list[dict]) -> list[list[int]]:
    return [answer["tokens"] for answer in group]


def passes(group: list[dict]) -> list[list[int]]:
    """New tokens of each pass. The last pass may have drawn more than were wanted."""
    steps = []
    for answer in group:
        *before, _ = (new for new, _ in answer["passes"])
        steps.append([*before, len(answer["tokens"]) - sum(before)])
    return steps


def drafts(group: list[dict]) -> list[list[list[int]]]:
    """All drafts but those after the last pass, which nobody asks for."""
    return [[found for _, found in answer["passes"][:-1] if found] for answer in group]


def assert_as_in_linear_decoding(case, group):
    assert tokens(group) == [row["tokens"] for row in case.rows]
    assert passes(group) == [row["steps"] for row in case.rows]
    for found, row in zip(drafts(group), case.rows, strict=True):
        known = [each for each in row["drafts"] if each]
        # hf_mtp's own decoding drafts no more than the tokens that remain.
        assert [each[: len(own)] for each, own in zip(found, known, strict=False)] == known[: len(found)]
        assert 10 < len(found) <= len(known) + 1


@pytest.mark.parametrize("architecture", ["llama", "llama-partial", "qwen3", "mistral", "gemma3_text"])
def test_tokens_passes_and_drafts_are_those_of_linear_decoding(case, run, architecture):
    case = case(architecture)
    (together,) = run(case.task({}))["groups"]
    assert_as_in_linear_decoding(case, together)
    assert any(max(steps) > 2 for steps in passes(together))  # drafts were accepted


def test_tokens_are_those_of_plain_vllm_under_all_options(case, run):
    case = case()
    groups = [{"options": option} for option in OPTIONS.values()]
    ours, plain = run(case.task(*groups)), run(case.plain(*groups))
    for name, own, theirs in zip(OPTIONS, ours["groups"], plain["groups"], strict=True):
        for key in ("tokens", "text", "reason"):
            assert [answer[key] for answer in own] == [answer[key] for answer in theirs], name
        assert [answer["logprobs"] for answer in own] == [pytest.approx(a["logprobs"], abs=1e-4) for a in theirs], name
    assert sum(new > 1 for group in ours["groups"] for steps in passes(group) for new in steps) > 20
    assert len({str(tokens(group)) for group in ours["groups"]}) == len(OPTIONS)  # each has an effect


def test_one_by_one_and_from_the_prefix_cache(case, run):
    case = case()
    alone = [{"prompts": [ids]} for ids in case.prompts]
    groups = run(case.task(*alone, {}, arguments={"enable_prefix_caching": True}))["groups"]
    assert_as_in_linear_decoding(case, [answer for group in groups[:-1] for answer in group])
    assert tokens(groups[-1]) == [row["tokens"] for row in case.rows]
    assert sum(answer["cached"] for answer in groups[-1]) == 32 + 64  # whole blocks of the longest prompts


def test_prompts_in_parts(case, run):
    case = case()
    arguments = {"max_num_batched_tokens": 48, "max_num_seqs": 6}  # 24 of them are for masks
    (group,) = run(case.task({}, arguments=arguments))["groups"]
    assert_as_in_linear_decoding(case, group)


def test_preempted_requests(case, run):
    case = case()
    arguments = {"num_gpu_blocks_override": 8, "max_num_seqs": 5}
    result = run(case.task({}, arguments=arguments))
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert tokens(result["groups"][0]) == [row["tokens"] for row in case.rows]


def test_fewer_masks_than_the_adapter_has(case, run):
    case = case()
    (group,) = run(case.task({}, k=2))["groups"]
    assert tokens(group) == [row["tokens"] for row in case.rows]
    assert {len(found) for each in drafts(group) for found in each} == {2}


def test_until_the_context_is_full(case, run):
    case = case()
    group = {"options": {"max_tokens": 200}}
    arguments = {"max_model_len": 96}
    (own,) = run(case.task(group, arguments=arguments))["groups"]
    (plain,) = run(case.plain(group, arguments=arguments))["groups"]
    assert tokens(own) == tokens(plain)
    assert [len(answer["tokens"]) for answer in own] == [96 - len(ids) for ids in case.prompts]


@pytest.mark.parametrize("architecture", ["llama", "llama-partial"])
def test_two_processes(case, run, architecture):
    case = case(architecture)
    result = run(case.task({}, arguments={"tensor_parallel_size": 2, "kv_cache_memory_bytes": 16 << 20}))
    assert tokens(result["groups"][0]) == [row["tokens"] for row in case.rows]
    accepted, known = result["metrics"]["vllm:spec_decode_num_accepted_tokens"], case.accepted
    assert known <= accepted <= known + case.k * len(case.rows)  # vLLM also counts drafts past the last token


def test_an_open_gate_is_seen(case, run):
    """The negative control: with one LoRA slot, vLLM on a CPU applies the LoRA to text as well."""
    case = case()
    (group,) = run(case.task({}, arguments={"max_loras": 1}, patches=["no_guard"]))["groups"]
    assert tokens(group) != [row["tokens"] for row in case.rows]
