"""Triton kernels and their launchers, one file per operation; installed as ``difffit_fast.kernels``.

``adaln``, ``residual``, ``attention``, ``frozen_mlp``, ``modulation`` and ``colsum`` hold the operations; ``tiles`` says how a
row is cut, ``sums`` finishes the reductions, ``config`` holds every tuning number. Only torch and Triton are imported.

The launchers trust their caller (``difffit_fast.ops``): contiguous tensors of matching shapes on one device. They
allocate their outputs, read no number back from the device and take the same path on every call, so they can be
captured in a CUDA graph. Where no row exists nothing is launched: outputs are empty and sums are zero.
"""
