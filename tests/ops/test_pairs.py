"""What `Pairs` and the arguments of the pair losses must be; what they mean is tested with each loss."""

import pytest
import torch

from pinclip.ops.contrastive import contrastive_loss
from pinclip.ops.pairs import Pairs


def _csr(indptr, indices):
    return {"indptr": torch.tensor(indptr), "indices": torch.tensor(indices, dtype=torch.int64)}


X = torch.ones(3, 4)
BAD_PAIRS = {
    "indptr is given without indices": {"indptr": torch.tensor([0, 1])},
    "row_ids is given without col_ids": {"row_ids": torch.tensor([0, 1, 2])},
    "offset=2 together with indptr": {"offset": 2, **_csr([0, 1, 1, 1], [0])},
    "weights without indptr": {"weights": torch.ones(3)},
    "indices of row 1 has column 1 after 2": _csr([0, 1, 3, 3], [0, 2, 1]),
    "indices of row 0 has column 2 after 2": _csr([0, 2, 2, 2], [2, 2]),
    "indices has column 7, there are N=3": _csr([0, 1, 1, 1], [7]),
    "indices has the negative column -1": _csr([0, 1, 1, 1], [-1]),
    "indptr runs from 0 to 2 for 1 indices": _csr([0, 1, 1, 2], [1]),
    "indptr has length 3, expected 4": _csr([0, 1, 1], [1]),
    "weights has 2 values for 1 indices": {**_csr([0, 1, 1, 1], [1]), "weights": torch.ones(2)},
    "weights has the negative value -1": {**_csr([0, 1, 1, 1], [1]), "weights": -torch.ones(1)},
    "known_indices has column 3": {
        "known_indptr": torch.tensor([0, 1, 1, 1]),
        "known_indices": torch.tensor([3]),
    },
    "row_ids has length 2, expected 3": {"row_ids": torch.arange(2), "col_ids": torch.arange(3)},
    "col_ids has dtype torch.int32": {"row_ids": torch.arange(3), "col_ids": torch.arange(3).int()},
    "log_q_cols has length 4, expected 3": {"log_q_cols": torch.zeros(4)},
    "log_q_rows has shape": {"log_q_rows": torch.zeros(3, 1)},
    "row_weights has dtype torch.int64": {"row_weights": torch.ones(3).long()},
    "row_weights has the negative value -2": {"row_weights": torch.tensor([1.0, -2.0, 1.0])},
    "col_weights is on meta": {"col_weights": torch.ones(3, device="meta")},
}
BAD_ARGUMENTS = {
    "x has D=4 but y has D=5": {"y": torch.ones(3, 5)},
    r"x has shape \(0, 4\)": {"x": torch.ones(0, 4)},
    r"y has shape \(3,\)": {"y": torch.ones(3)},
    "y has dtype torch.float64, x has torch.float32": {"y": X.double()},
    "x has dtype torch.int64": {"x": X.long()},
    "y is on meta": {"y": X.to("meta")},
    "scale=-1.0 is not positive": {"scale": -1.0},
    "scale=0.0 is not positive": {"scale": torch.tensor(0.0)},
    r"scale has shape \(1,\)": {"scale": torch.ones(1)},
    "normalizer=0.0 is not positive": {"normalizer": 0.0},
    r"dims=\(2, 5\)": {"dims": (2, 5)},
    r"dims=\(\)": {"dims": ()},
    "direction='both'": {"direction": "both"},
    "empty_rows='drop'": {"empty_rows": "drop"},
}


@pytest.mark.parametrize("message", BAD_PAIRS)
def test_bad_pairs(message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(X, X, 1.0, Pairs(**BAD_PAIRS[message]))


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**{"x": X, "y": X, "scale": 1.0, **BAD_ARGUMENTS[message]})
