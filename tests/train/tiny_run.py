"""The tiny run that the tests of training train."""

TINY = {
    "seed": 0,
    "out": "unset",
    "data": {"path": "unset", "workers": 0},
    "model": {
        "embed_dim": 16,
        "image": {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "funnel": [1]},
        "text": {"vocab_size": 300, "max_length": 12, "width": 16, "depth": 1, "heads": 2},
        "fusion": {"width": 16, "depth": 1, "heads": 2},
    },
    "objective": {"image_fused_weight": 0.5, "text_fused_weight": 0.5, "own_fused_weight": 0.25},
    "optim": {"warmup_steps": 2, "lr": 0.003},
    "train": {"steps": 5, "batch_size": 16, "log_every": 1, "precision": "fp32"},
}


def tiny_table(store_path, out, changes) -> dict:
    table = {k: {**v} if isinstance(v, dict) else v for k, v in TINY.items()}
    table["out"], table["data"]["path"] = str(out), str(store_path)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        inner = table
        for parent in parents:
            inner[parent] = dict(inner[parent])
            inner = inner[parent]
        inner[last] = value
    return table


def to_toml(table) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
