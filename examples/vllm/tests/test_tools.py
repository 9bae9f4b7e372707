"""The conditions that the tools print with their measurements."""

import compare
import demo
import handover
import pytest


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


def test_the_stages_of_a_request_are_told_apart() -> None:
    prefill = [("queued", 10.1), ("scheduled", 10.2), ("computed", 10.5), ("token", 10.6), ("scheduled", 10.6), ("computed", 11.0)]
    decode = [("queued", 10.1), ("loaded", 11.1), ("scheduled", 11.2), ("computed", 11.25)]
    decode += [("token", 11.3 + 0.02 * i) for i in range(handover.ANSWER)] + [("token", 99.0)]
    seen = handover.times(10.0, (11.05, 11.35), prefill, decode)
    stages = [seen.queued, seen.first_chunk, seen.last_chunk, seen.loaded, seen.admitted, seen.first_token, seen.step]
    assert stages == pytest.approx([0.1, 0.2, 1.0, 1.1, 1.2, 1.3, 0.02])
    assert seen.hand_over == pytest.approx(0.28) and seen.beyond == pytest.approx(15)
    with pytest.raises(ValueError, match="not loaded"):
        handover.times(10.0, (11.05, 11.35), prefill, [("queued", 10.1), ("token", 11.0)])


def test_the_table_compares_the_hand_overs() -> None:
    def seen(hand_over: float) -> list[handover.Times]:
        return [handover.Times(0.01, 0.02, 1.0, 1.1, 1.2, 1.0 + hand_over + 0.02, 0.02, 1.1, 1.2)]

    text = handover.table({("kvferry overlap", 1000): seen(0.01), ("kvferry sequential", 1000): seen(0.05)})
    assert "| kvferry overlap, 1,000 tokens (1) | 10.0 | 20.0 | 1000.0 | 1100.0 | 1200.0 | 1030.0 | **10.0** | 20.0 |" in text
    assert "1,000 tokens: ratio of the hand-overs, kvferry overlap to kvferry sequential: 0.20." in text
    assert "NIXL" not in text
