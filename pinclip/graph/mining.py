"""How neighbors are mined: the settings of `pinclip graph mine`. No torch here, so that a parser is quick."""

from __future__ import annotations

from dataclasses import dataclass

from pinclip.errors import ConfigError

METHODS = ("walk", "cooccurrence")


@dataclass(frozen=True)
class Mining:
    """How neighbors are mined.

    method "walk": c_ij = how often `walks` random walks of `length` hops from i, each hop jumping back first
    with probability `restart`, end a hop at j; a board of s_b pins is chosen in proportion to
    s_b^-board_damping. method "cooccurrence": c_ij = Σ_b A_ib A_jb s_b^-board_damping over the shared boards.
    With d_j boards of pin j, the `top_k` pins of largest weight

        w_ij = c_ij d_j^-damping,    j != i,

    are the neighbors of i. board_cap: a larger board takes part with that many of its pins, those of smallest
    hash of (seed, board, pin). stop_visits: walks of a pin end once top_k pins have been visited so often
    (0: never). seed: in [0, 2^63).

    Raises ConfigError, naming the value, for one out of range.

    Source: visit counts as importance, Ying et al., "PinSage", KDD 2018; walks with restart, choice of boards
    and early stopping, Eksombatchai et al., "Pixie", WWW 2018. The two powers are ours.
    """

    method: str = "walk"
    walks: int = 100
    length: int = 10
    restart: float = 0.5
    top_k: int = 50
    damping: float = 0.5
    board_damping: float = 0.5
    board_cap: int | None = None
    stop_visits: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "walks": (1, 2**31 - 1),
            "length": (1, 2**31 - 1),
            "restart": (0.0, 1.0),
            "top_k": (1, 2**31 - 1),
            "damping": (-8.0, 8.0),
            "board_damping": (-8.0, 8.0),
            "board_cap": (2, 2**63 - 1),
            "stop_visits": (0, 2**31 - 1),
            "seed": (0, 2**63 - 1),
        }
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}, want one of {', '.join(METHODS)}")
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} is {value}, want a value in [{low}, {high}]")
