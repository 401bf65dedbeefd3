"""What a layer can reach on a device, from `blrlab_ops`' cost model: predictions, bounds and advice.

`python -m blrlab.roofline --help` tells what can be asked. `predict` holds the times of one layer, `advice` what can
beat dense at all, `single_peak` the model of arXiv 2512.20861 beside this one. None of them loads JAX or PyTorch.
"""
