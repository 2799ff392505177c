"""Pictures of points: the density on its grid, and every panel in its place."""

import math

import matplotlib.image
import numpy as np
import torch

import snf_ext
from snf_ext.training import pictures, scatter


class Shift(torch.nn.Module):
    """A normal around (1, -0.5), of deviations 0.5 and 2."""

    def __init__(self):
        super().__init__()
        layers = [snf_ext.ComponentwiseAffine((2,))]
        self.flow = snf_ext.Flow(layers, (2,))
        with torch.no_grad():
            self.flow.bijections[0].log_scale.copy_(torch.tensor([2.0, 0.5]).log())
            self.flow.bijections[0].shift.copy_(torch.tensor([-2.0, 0.25]))


def test_density_is_that_of_the_points():
    flow = Shift().flow
    picture = scatter.density(flow, 3.0, 6)  # midpoints -2.5, -1.5, .. 2.5
    assert picture.shape == (6, 6)
    for row, column in ((0, 0), (0, 3), (5, 2)):
        x, y = column - 2.5, row - 2.5
        exponent = (x - 1) ** 2 / 0.25 + (y + 0.5) ** 2 / 4
        want = math.exp(-exponent / 2) / (2 * math.pi)  # deviations 0.5 and 2
        assert abs(picture[row, column].item() - want) < 1e-6 * max(want, 1e-6) + 1e-9


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def test_panels_are_on_one_square():
    flow = Shift().flow
    data = torch.tensor([[0.0, 1.0], [-2.0, 4.0]])
    bad = torch.tensor([[float("nan"), 0.0], [1.0, 2.0], [float("inf"), 0.0]])
    figure = scatter.points("some", {"data": data, "learned inverse": bad}, flow)
    found = panels(figure)
    assert list(found) == ["data", "learned inverse (2 not finite)", "density"]
    assert np.array_equal(found["data"].collections[0].get_offsets(), data.numpy())
    for axes in found.values():
        assert axes.get_xlim() == axes.get_ylim() == (-5.0, 5.0)  # a quarter beyond the data
    shown = found["density"].images[0]
    assert shown.get_extent() == [-5.0, 5.0, -5.0, 5.0]
    assert shown.origin == "lower"
    assert np.allclose(shown.get_array(), scatter.density(flow, 5.0).numpy(), atol=1e-7)
    assert flow.training


def test_samples_and_reconstructions_of_points(tmp_path, monkeypatch):
    torch.manual_seed(0)
    flow = snf_ext.models.fc((2,), pixel_levels=None)
    asked, points = [], scatter.points

    def look(title, shown, flow=None):
        asked.append((title, shown, flow))
        return points(title, shown, flow)

    monkeypatch.setattr(scatter, "points", look)
    data = torch.randn(50, 2)
    pictures.save_samples(tmp_path / "a.png", flow, None, 20, 3, data=data)
    pictures.save_samples(tmp_path / "b.png", flow, None, 5, 3, sides=("refined",), refine=2)
    pictures.save_reconstructions(tmp_path / "c.png", flow, data, None)
    (_, first, of), (_, second, _), (_, third, none) = asked
    assert [list(shown) for _, shown, _ in asked] == [
        ["data", "learned inverse", "exact inverse"],
        ["refined inverse"],
        ["data", "learned inverse", "exact inverse"],
    ]
    assert of is flow
    assert none is None
    assert torch.equal(first["data"], data[:20])
    assert first["learned inverse"].shape == (20, 2)
    assert second["refined inverse"].shape == (5, 2)
    # From one noise, and by R = W^-1 up to the noise of the start.
    torch.testing.assert_close(first["learned inverse"], first["exact inverse"], rtol=0, atol=0.2)
    torch.testing.assert_close(third["exact inverse"], data, rtol=1e-4, atol=1e-4)
    for name, width in (("a", 1600), ("b", 800), ("c", 1200)):
        assert matplotlib.image.imread(tmp_path / f"{name}.png").shape[1] == width
