"""Problems with few labels: what they promise, and the reader of citation graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kantor.datasets import four_discs, heat_snapshots, read_citation_graph, two_moons


def test_two_moons() -> None:
    x, y = two_moons(200, noise=0.0, seed=1)
    assert x.shape == (200, 2)
    assert y.bincount().tolist() == [100, 100]
    centre = torch.where(y[:, None] == 0, torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.5]))
    torch.testing.assert_close((x - centre).norm(dim=1), torch.ones(200), rtol=0, atol=1e-6)
    noisy, again = two_moons(200, 0.05, seed=1)[0], two_moons(200, 0.05, seed=1)[0]
    assert torch.equal(noisy, again)
    assert 0.02 < float((noisy - x).std()) < 0.08


def test_four_discs() -> None:
    x, disc = four_discs()
    corners = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    assert disc.bincount().tolist() == [100] * 4
    nearest = torch.cdist(x, corners).argmin(1)
    assert float((x - corners[nearest]).norm(dim=1).max()) <= 0.75
    for d in range(4):  # a disc is one corner, and discs of one class lie opposite
        assert nearest[disc == d].unique().numel() == 1
    assert torch.equal((corners[nearest].sum(1) == 2).long(), disc % 2)


def test_heat_snapshots() -> None:
    data = heat_snapshots(nodes=40, times=60, hidden=0.9, seed=3)
    assert torch.equal(data.weights, data.weights.T)
    assert data.values.shape == data.observed.shape == (60, 40)
    torch.testing.assert_close(data.values.mean(0), torch.zeros(40), rtol=0, atol=1e-5)
    assert 0.05 < float(data.observed.double().mean()) < 0.15


def write(path: Path, **changes: Any) -> None:
    """Three documents, of which the first cites the second twice and itself."""
    entries: dict[str, Any] = {
        "adj_data": np.ones(3, np.float32),
        "adj_indices": np.array([0, 1, 1]),
        "adj_indptr": np.array([0, 3, 3, 3]),
        "adj_shape": np.array([3, 3]),
        "attr_data": np.array([2.0, 1.0, 0.0, 5.0], np.float32),
        "attr_indices": np.array([3, 0, 1, 2]),
        "attr_indptr": np.array([0, 2, 4, 4]),
        "attr_shape": np.array([3, 4]),
        "labels": np.array([1, 0, 1], np.int8),
        "class_names": np.array(["logic", "maps"]),
    }
    np.savez(path, **{name: value for name, value in (entries | changes).items() if value is not None})


def test_citation_graph(tmp_path: Path) -> None:
    write(tmp_path / "some.npz")
    data = read_citation_graph(tmp_path / "some.npz")
    assert data.edge_index.tolist() == [[0, 1], [1, 0]]
    assert data.x.to_dense().tolist() == [[0.5, 0, 0, 0.5], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert data.labels.tolist() == [1, 0, 1]
    assert data.class_names == ["logic", "maps"]


def test_names_of_classes_that_would_have_to_be_unpickled_are_left_aside(tmp_path: Path) -> None:
    write(tmp_path / "some.npz", class_names=np.array(["logic", None], dtype=object))
    assert read_citation_graph(tmp_path / "some.npz").class_names == []


def test_errors_of_the_reader(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_citation_graph(tmp_path / "none.npz")
    write(tmp_path / "some.npz", labels=None)
    with pytest.raises(ValueError, match="read_citation_graph: .* expected an entry 'labels'"):
        read_citation_graph(tmp_path / "some.npz")
