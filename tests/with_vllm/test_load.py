"""Under load, masks are computed only as far as they pay."""


def test_masks_are_dropped_while_many_requests_run(case, run):
    case = case()
    prompts = [*case.prompts, *[ids[:20] for ids in case.prompts[2:]]]
    lengths = [12, 12, 12, 40, *[12] * 4]
    group = {"prompts": prompts, "options": [{"max_tokens": length} for length in lengths]}
    result = run(case.task(group, strategy="auto", patches=["ten_columns_free"]))
    (plain,) = run(case.plain(group))["groups"]
    assert [answer["tokens"] for answer in result["groups"][0]] == [answer["tokens"] for answer in plain]
    loaded = [masks for requests, masks in result["passes"] if requests == 8]
    alone = [masks for requests, masks in result["passes"] if requests == 1]
    assert len(loaded) >= 10 and sum(loaded) == 0
    assert len(alone) >= 10 and sum(alone) >= len(alone)
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0
