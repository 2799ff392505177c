"""docs/distributions.md: its blocks run, and give what its comments say."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "distributions.md"


def test_python_blocks_run():
    if not PAGE.exists():
        pytest.skip("no docs beside these tests")
    text = PAGE.read_text(encoding="utf-8")
    names: dict = {}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)):
        exec(compile(block, f"docs/distributions.md, block {number}", "exec"), names)
        if number == 0:
            assert names["x"].shape == (16, 4)
            torch.testing.assert_close(names["q"].log_prob(names["x"]), names["log_prob"])
    assert names["q"].batch_shape == (10,)
    assert names["q"].sample((100,)).shape == (100, 10, 4)
    again = names["transform"].with_cache(0)
    z, log_det = again.inv(names["w"]), again.log_abs_det_jacobian(again.inv(names["w"]), None)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(names["log_q"], normal - log_det, rtol=0, atol=1e-4)
    x = torch.randn(5, 4)
    torch.testing.assert_close(names["density"].log_prob(x), names["flow"].log_prob(x))
    samples = names["bounded"].as_distribution().sample((1000,))
    assert ((samples > 0) & (samples < 1)).all()
