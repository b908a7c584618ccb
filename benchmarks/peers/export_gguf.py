"""Write a GGUF file again with weights of one type, rounded to bfloat16 first, so that all engines have the same."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q8_0": 7}


def export(source: Path, target: Path, kind: str) -> None:
    """Copy the metadata as it is and the matrices as ``kind``; norms stay float32."""
    reader, writer = GGUFReader(source), GGUFWriter(target, "llama")
    writer.add_file_type(FILE_TYPES[kind])
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kinds = field.types
        element = kinds[-1] if kinds[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kinds[0], element)
    for tensor in reader.tensors:
        rounded = quantize(dequantize(tensor.data, tensor.tensor_type).astype(np.float32), Type.BF16)
        values = dequantize(rounded, Type.BF16)
        if values.ndim == 1 or kind == "f32":
            writer.add_tensor(tensor.name, values)
        elif kind == "bf16":
            writer.add_tensor(tensor.name, rounded, raw_dtype=Type.BF16)
        elif kind == "f16":
            writer.add_tensor(tensor.name, values.astype(np.float16))
        else:
            of = Type[kind.upper()]
            writer.add_tensor(tensor.name, quantize(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("kind", choices=FILE_TYPES)
    options = parser.parse_args()
    export(options.source, options.target, options.kind)
