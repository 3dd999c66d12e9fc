"""Programs to plans: which kernels, which sweeps over memory."""
