"""Training and fitting, a module a task: `accelerate launch -m train.train_uvit --help`, or `python -m train.train_uvit` alone."""
