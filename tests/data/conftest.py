"""A raw data set as a user would have it."""

import pytest
from data_samples import COLORS, picture


@pytest.fixture
def raw(tmp_path):
    """A CSV of six pins with image files, a TSV of edges; `raw / "pins.csv"`, `raw / "edges.tsv"`."""
    folder = tmp_path / "raw"
    (folder / "pictures").mkdir(parents=True)
    lines = ["id,image,text"]
    for number, color in enumerate(COLORS):
        (folder / "pictures" / f"{color}.png").write_bytes(picture(color))
        lines.append(f"{number},pictures/{color}.png,a {color} pin")
    (folder / "pins.csv").write_text("\n".join(lines) + "\n")
    edges = [("warm", 0), ("warm", 3), ("warm", 5), ("cold", 1), ("cold", 2), ("cold", 4), ("cold", 5)]
    (folder / "edges.tsv").write_text("".join(f"{board}\t{pin}\n" for board, pin in edges))
    return folder
