"""The detector's gate: counts of the renderings asked for, more photographs passed than sketches."""

from facediffuser.miniature.detector_gate import gate_markdown, rendered_gate


def test_each_style_is_counted_alone_and_in_pairs_and_most_photographs_pass():
    found = rendered_gate(41_000_000, 12)
    assert set(found) == {(style, count) for style in ("photo", "sketch", "painting") for count in (1, 2)}
    assert all(0 <= right <= total == 12 for right, total in found.values())
    assert found["photo", 1][0] >= 10
    assert found == rendered_gate(41_000_000, 12)
    assert "| photo | " in gate_markdown(found) and " of 12 |" in gate_markdown(found)
