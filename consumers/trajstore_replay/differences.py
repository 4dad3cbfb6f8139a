"""What `compare` finds between two sides: of tokens, logprobs and routing, in numbers. `comparing` computes it."""

import msgspec

__all__ = ["Difference", "LogprobDifference", "RoutingDifference", "TokenDifference"]


class TokenDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Of all tokens.

    Attributes:
        first_length, second_length: tokens of each side.
        shared: leading tokens that stem from the same events, and so cannot differ.
        equal: leading tokens that are equal.
        first_divergence: position of the first token that differs; None if one side is the beginning of the other.
        first_token, second_token: the ids there.
    """

    first_length: int
    second_length: int
    shared: int
    equal: int
    first_divergence: int | None = None
    first_token: int | None = None
    second_token: int | None = None

    @property
    def is_none(self) -> bool:
        """The same tokens."""
        return self.equal == self.first_length == self.second_length


class LogprobDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Of equal tokens below the first divergence that both sides sampled, each for itself.

    Attributes:
        compared: positions where both logprobs are finite.
        max_abs, mean_abs: of |second - first|, in nats; None where nothing was compared.
        max_at: position of the largest.
        tolerance: as asked for.
        above: positions where |second - first| exceeds it.
        first_above: the first of them, None for none.
        nonfinite: positions that are left out because a logprob is NaN or infinite.
        nonfinite_differing: of them, those at which the two are not the same NaN or infinity.
        sampled_once: equal tokens that one side sampled and the other was given.
    """

    compared: int
    tolerance: float
    max_abs: float | None = None
    mean_abs: float | None = None
    max_at: int | None = None
    above: int = 0
    first_above: int | None = None
    nonfinite: int = 0
    nonfinite_differing: int = 0
    sampled_once: int = 0

    @property
    def is_none(self) -> bool:
        """None is above the tolerance, not finite on one side alone, or on one side alone."""
        return not (self.above or self.nonfinite_differing or self.sampled_once)


class RoutingDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Of rows below the first divergence that both sides have.

    Attributes:
        layers: global ids of the layers that both route.
        layers_first, layers_second: global ids of the layers that one side alone routes.
        rows: compared.
        shared: of them, rows that are the same recording on both sides.
        only_first, only_second: rows that one side alone has.
        cells: rows x layers.
        sets: cells whose expert sets differ.
        orders: cells with the same experts in another order; None where a side stores them sorted.
        rows_differing: rows with such a set in any layer.
        sets_by_layer: cells whose sets differ, per layer.
        first_row, first_layer: the first cell whose set differs, by row and then layer; None for none.
        first_experts, second_experts: K ids each, there.
    """

    layers: tuple[int, ...]
    layers_first: tuple[int, ...]
    layers_second: tuple[int, ...]
    rows: int
    shared: int
    only_first: int
    only_second: int
    cells: int
    sets: int
    orders: int | None
    rows_differing: int
    sets_by_layer: tuple[int, ...]
    first_row: int | None = None
    first_layer: int | None = None
    first_experts: tuple[int, ...] = ()
    second_experts: tuple[int, ...] = ()

    @property
    def is_none(self) -> bool:
        """The same sets of experts, and no row or layer that one side alone has."""
        return not (self.sets or self.only_first or self.only_second or self.layers_first or self.layers_second)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What `compare` finds.

    Attributes:
        first, second: names of the sides.
        routing: None where a side has no routing, or another number of experts.
        routing_note: why there is none to compare; "" where it was compared, or neither side has a routing spec.
    """

    first: str
    second: str
    tokens: TokenDifference
    logprobs: LogprobDifference
    routing: RoutingDifference | None
    routing_note: str = ""

    @property
    def is_none(self) -> bool:
        """Nothing differs, and neither side lacks what the other has; order of experts apart."""
        routed = not self.routing_note and (self.routing is None or self.routing.is_none)
        return self.tokens.is_none and self.logprobs.is_none and routed
