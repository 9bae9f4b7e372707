"""The conditions that the tools print with their measurements."""

import compare
import demo


def test_the_demo_says_where_the_prompt_was_prefilled() -> None:
    tokens, bytes_ = "vllm:kvferry_tokens_loaded_total", "vllm:kvferry_bytes_loaded_total"
    before = {f'{tokens}{{engine="0"}}': 100.0, f'{bytes_}{{engine="0",lane="tcp"}}': 10.0}
    loaded = {f'{tokens}{{engine="0"}}': 106.0, f'{bytes_}{{engine="0",lane="local"}}': 5.0}
    assert demo.source(before, before | loaded, 7) == (
        "6 of 7 prompt tokens came from the prefill engine, over local; the decode engine computed the rest"
    )
    assert demo.source(before, before | loaded, 6) == "6 of 6 prompt tokens came from the prefill engine, over local"
    assert demo.source(before, before, 7) == (
        "the decode engine prefilled all 7 prompt tokens itself: nothing came from a prefill engine"
    )


def test_the_comparison_shows_medians_ranges_and_missing_answers() -> None:
    assert compare.cell(compare.TOTAL, [0.2, 0.1, 0.4]) == "0.200 s (0.100 s to 0.400 s)"
    assert compare.cell(compare.NEXT, [30.4, 0.5, 31.0]) == "30.40 s (0.500 s to 31.00 s)"
    assert compare.cell(compare.FIRST, [5.4]) == "5.40 s"
    assert compare.cell(compare.IDLE_DECODE, [0.01, 0.99, 0.014]) == "1.4% (1.0% to 99.0%)"
    assert compare.cell(compare.STOPPED, ["none within 60 s"] * 2) == "none within 60 s"
    assert compare.cell(compare.KILLED, [0.1, "HTTP 500", 0.3]) == "0.200 s (0.100 s to 0.300 s); HTTP 500 (1 of 3)"
