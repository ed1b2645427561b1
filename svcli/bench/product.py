"""A graph of one matrix product, written by hand: what ONNX Runtime could do at best, where no onnx is installed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6
_IR_VERSION, _OPSET = 10, 21


def product(side: int, *, in_8_bits: bool) -> bytes:
    """ModelProto of X [side, side] times a constant: MatMul in fp32, or MatMulInteger, whose X is of bytes."""
    if in_8_bits:
        kinds, weights = (_UINT8, _INT8, _INT32), np.ones((side, side), np.int8)
    else:
        kinds, weights = (_FLOAT, _FLOAT, _FLOAT), np.ones((side, side), np.float32)
    node = _bytes(1, b"x") + _bytes(1, b"w") + _bytes(2, b"y")
    node += _bytes(4, b"MatMulInteger" if in_8_bits else b"MatMul")
    constant = _number(1, side) * 2 + _number(2, kinds[1]) + _bytes(8, b"w") + _bytes(9, weights.tobytes())
    graph = _bytes(1, node) + _bytes(2, b"product") + _bytes(5, constant)
    graph += _bytes(11, _value(b"x", kinds[0], side)) + _bytes(12, _value(b"y", kinds[2], side))
    return _number(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _number(2, _OPSET))


def product_runner(side: int, num_threads: int, *, in_8_bits: bool) -> Callable[[], object]:
    """What multiplies once, in ONNX Runtime on the CPU."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    session = InferenceSession(product(side, in_8_bits=in_8_bits), options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones((side, side), np.uint8 if in_8_bits else np.float32)}
    return lambda: session.run(None, feeds)


def _value(name: bytes, kind: int, side: int) -> bytes:
    dimension = _bytes(1, _number(1, side))
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, dimension * 2)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
