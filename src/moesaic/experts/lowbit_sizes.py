"""How large matrices of 8 or 4 bits a weight are; without torch, so that a plan can tell.

torch's operators want the inputs in whole vectors or groups and, with 4 bits, the outputs in whole tiles; what is
missing is filled up with zeros.
Shapes: O outputs, I inputs.
"""

from collections.abc import Sequence

from moesaic.errors import MoesaicError

BITS = {"int8": 8, "int4": 4}
WEIGHTS = ("stored", *BITS)
VECTOR = 16  # inputs of an 8-bit matrix come in such numbers, outputs of a 4-bit one
LEAST_OUTPUTS = 16  # linear layers with fewer stay as they are: they decide much and weigh nothing
GROUPS = (64, 32)  # inputs that share a scale and a zero with 4 bits: the first that divides their number


def bits_of(weights: str) -> int | None:
    """Bits of a weight, None as the checkpoint stores it. Raises MoesaicError for another name."""
    if weights not in WEIGHTS:
        raise MoesaicError(f"weights {weights!r}: expected {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}")
    return BITS.get(weights)


def filled_inputs(inputs: int, bits: int) -> int:
    """`inputs`, filled up."""
    return _up(inputs, VECTOR if bits == 8 else GROUPS[-1])


def filled_outputs(outputs: int, bits: int) -> int:
    """`outputs`, filled up."""
    return outputs if bits == 8 else _up(outputs, VECTOR)


def group_of(inputs: int) -> int:
    """How many of the filled inputs share a scale, with 4 bits."""
    return next(group for group in GROUPS if inputs % group == 0)


def tensor_bytes(outputs: int, inputs: int, bits: int, item: int) -> tuple[int, int]:
    """Bytes of the weights, and of their scales (and zeros) in numbers of `item` bytes."""
    outputs, inputs = filled_outputs(outputs, bits), filled_inputs(inputs, bits)
    if bits == 8:
        return outputs * inputs, outputs * item
    return outputs * inputs // 2, inputs // group_of(inputs) * outputs * 2 * item


def matrix_bytes(shape: Sequence[int], bits: int, item: int) -> int:
    """Bytes of a matrix (O, I) with its scales."""
    outputs, inputs = shape
    return sum(tensor_bytes(outputs, inputs, bits, item))


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
