"""Turns zeros into speed and smaller size: 2:4, CSR and 8-bit weights, packed files, smaller models, timings."""

from prune_callbacks.deploy.compression import load_compressed, save_compressed
from prune_callbacks.deploy.compression_size import Compression, measure_compression
from prune_callbacks.deploy.conversion import Conversion
from prune_callbacks.deploy.csr import convert_to_csr_, revert_csr_
from prune_callbacks.deploy.csr_files import load_csr, save_csr
from prune_callbacks.deploy.low_precision import convert_fp8_, convert_int8_
from prune_callbacks.deploy.packing import pack_nm, unpack_nm
from prune_callbacks.deploy.semi_structured import convert_, revert_
from prune_callbacks.deploy.shrinking import shrink

__all__ = [
    "Compression",
    "Conversion",
    "convert_",
    "convert_fp8_",
    "convert_int8_",
    "convert_to_csr_",
    "load_compressed",
    "load_csr",
    "measure_compression",
    "pack_nm",
    "revert_",
    "revert_csr_",
    "save_compressed",
    "save_csr",
    "shrink",
    "unpack_nm",
]
