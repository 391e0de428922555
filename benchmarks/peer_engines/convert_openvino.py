"""Compress the weights of an exported OpenVINO folder, without data: PRECISION EXPORTED OUT."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nncf
import openvino as ov


def main() -> None:
    precision, exported, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True)
    for file in exported.iterdir():
        if not file.name.startswith("openvino_model."):
            shutil.copy(file, out)
    model = ov.Core().read_model(exported / "openvino_model.xml")
    if precision == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=128, ratio=1.0)
    ov.save_model(model, out / "openvino_model.xml")


if __name__ == "__main__":
    main()
