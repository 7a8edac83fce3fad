"""A run's TOML file: what is wrong is named, with the file, the key and the nearest valid key."""

import pytest

from pinclip.cli import overrides
from pinclip.errors import ConfigError
from pinclip.train.config import RunConfig

GOOD = """
out = "runs/x"
[data]
path = "data/x"
[model]
embed_dim = 16
image = {image_size = 16, patch_size = 4, width = 16, depth = 1, heads = 2}
text = {vocab_size = 300, max_length = 8, width = 16, depth = 1, heads = 2}
fusion = {width = 16, depth = 1, heads = 2}
[train]
steps = 3
"""


def load(tmp_path, text, **kwargs):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return RunConfig.load(path, **kwargs)


def test_good_file(tmp_path):
    config = load(tmp_path, GOOD)
    assert config.train.steps == 3
    assert config.model.image.width == 16
    with pytest.raises(Exception, match="frozen"):
        config.train.steps = 4


@pytest.mark.parametrize(
    "change,message",
    [
        (
            ("steps = 3", "steps = 3\nbatchsize = 4"),
            r"unknown key 'train.batchsize'; did you mean 'train.batch_size'\?",
        ),
        (("[train]", "[trian]\nsteps = 1\n[train]"), r"unknown key 'trian'; did you mean 'train'\?"),
        (
            ("depth = 1, heads = 2}\nfusion", "dpeth = 1, depth = 1, heads = 2}\nfusion"),
            r"'model.text.dpeth'.*'model.text.depth'",
        ),
        (("steps = 3", 'steps = "three"'), r"train.steps = 'three'"),
        (("steps = 3", "steps = 3.5"), r"train.steps = 3.5"),
        (("steps = 3", "steps = 0"), r"train.steps = 0"),
        (("steps = 3", ""), r"key 'train.steps' is missing"),
        (
            ("steps = 3", "steps = 3\nbatch_size = 30\nmicro_batches = 4"),
            r"batch_size = 30 must be a multiple",
        ),
        (("embed_dim = 16", "embed_dim = 16\nsiglip = 'x'"), r"either siglip or the tables"),
        (("[data]", "[data"), r"not a TOML file"),
        (
            ("width = 16, depth = 1, heads = 2}\nfusion", "width = 15, depth = 1, heads = 2}\nfusion"),
            r"width 15",
        ),
    ],
)
def test_bad_file_names_the_file_and_the_key(tmp_path, change, message):
    assert change[0] in GOOD
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, GOOD.replace(*change))
    assert "run.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.toml: no such file"):
        RunConfig.load(tmp_path / "absent.toml")


def test_overrides_are_toml_values(tmp_path):
    config = load(
        tmp_path, GOOD, overrides=overrides(["train.steps=7", "out=elsewhere/run", "model.dims=[8, 16]"])
    )
    assert (config.train.steps, config.out, config.model.dims) == (7, "elsewhere/run", (8, 16))
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        overrides(["train.steps"])
    with pytest.raises(ConfigError, match=r"unknown key 'train.step'"):
        load(tmp_path, GOOD, overrides=overrides(["train.step=7"]))


def test_shipped_configurations_are_valid():
    from pathlib import Path

    configs = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
    assert configs
    for path in configs:
        RunConfig.load(path)
