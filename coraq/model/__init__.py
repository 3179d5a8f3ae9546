"""Networks: loading, BatchNorm folding, layers as matrices, the calibration engine, installing codes."""
